"""What makes a graph faster and prunes nothing: passes for all that stays dense."""

from __future__ import annotations

from popc.analysis.capture import Captured
from popc.log import logger
from popc.passes.base import run_pass
from popc.passes.dense.fold_repeat_kv import fold_repeat_kv
from popc.passes.dense.gemv_kernels import use_gemv_kernels
from popc.passes.dense.hoist_masks import hoist_masks


def run_dense_passes(captured: Captured, decodes: bool) -> bool:
    """Run the passes; ``decodes`` as in :func:`popc.passes.dense.gemv_kernels.use_gemv_kernels`.

    Returns:
        Whether the graph changed.
    """
    found = (
        run_pass("share heads", fold_repeat_kv, captured),
        run_pass("share masks", hoist_masks, captured),
        run_pass("stream linears", use_gemv_kernels, captured, decodes),
    )
    logger.info("%d attentions by heads as held, %d masks made once, %d linears streamed", *found)
    return any(found)
