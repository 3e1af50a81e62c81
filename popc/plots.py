"""Pictures by matplotlib, which only those need who want one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from popc.errors import ModelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty one; inches.

    Raises:
        ModelError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelError("a plot needs matplotlib: pip install 'popc[bench]'") from error
    return Figure(figsize=(width, height), layout="constrained")
