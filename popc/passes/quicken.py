"""What makes a graph faster and prunes nothing: passes for all that stays dense."""

from __future__ import annotations

from popc.analysis.capture import Captured
from popc.log import logger
from popc.passes.base import run_pass
from popc.passes.heads import share_heads
from popc.passes.masks import share_masks
from popc.passes.stream import stream_linears


def quicken(captured: Captured, decodes: bool) -> bool:
    """Run the passes; ``decodes`` as in :func:`popc.passes.stream.stream_linears`.

    Returns:
        Whether the graph changed.
    """
    found = (
        run_pass("share heads", share_heads, captured),
        run_pass("share masks", share_masks, captured),
        run_pass("stream linears", stream_linears, captured, decodes),
    )
    logger.info("%d attentions by heads as held, %d masks made once, %d linears streamed", *found)
    return any(found)
