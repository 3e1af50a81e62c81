"""What makes a graph faster and prunes nothing: passes for all that stays dense."""

from __future__ import annotations

from popc.analysis.capture import Captured
from popc.log import logger
from popc.passes.base import run_pass
from popc.passes.dense.fold_repeat_kv import share_heads
from popc.passes.dense.gemv_kernels import stream_linears
from popc.passes.dense.hoist_masks import share_masks


def quicken(captured: Captured, decodes: bool) -> bool:
    """Run the passes; ``decodes`` as in :func:`popc.passes.dense.gemv_kernels.stream_linears`.

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
