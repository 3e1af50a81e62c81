"""popc's logger: ``POPC_LOGS=popc`` or ``logging.getLogger("popc")`` shows what each pass did.

``POPC_LOGS=graphs`` prints also every graph before and after the passes, as a readable program.
A pass that fails is a warning, and its graph runs dense; ``POPC_RAISE=1`` raises the error instead.
"""

from __future__ import annotations

import logging
import os

from torch import fx

logger = logging.getLogger("popc")
graph_logger = logging.getLogger("popc.graphs")

if os.environ.get("POPC_LOGS"):
    logging.basicConfig(format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    if "graphs" in os.environ["POPC_LOGS"]:
        graph_logger.setLevel(logging.DEBUG)


def log_graph(stage: str, gm: fx.GraphModule) -> None:
    """Print ``gm`` as a program under ``stage``, if graphs are to be logged."""
    if graph_logger.isEnabledFor(logging.DEBUG):
        graph_logger.debug("=== %s\n%s", stage, gm.print_readable(print_output=False))
