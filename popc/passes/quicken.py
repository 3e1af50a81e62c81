"""What makes a graph faster and prunes nothing: passes for all that stays dense."""

from __future__ import annotations

from popc.analysis.capture import Captured
from popc.passes.masks import share_masks
from popc.passes.stream import stream_linears


def quicken(captured: Captured, decodes: bool) -> bool:
    """Run the passes; ``decodes`` as in :func:`popc.passes.stream.stream_linears`.

    Returns:
        Whether the graph changed.
    """
    changed = [share_masks(captured), stream_linears(captured, decodes)]
    return any(changed)
