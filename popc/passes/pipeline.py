"""The one list of passes, in the order in which they run on every graph.

Each does what there is to do for it in a graph's :class:`~popc.planning.rewrite_plan.RewritePlan`:
the graph of a prompt is measured, that of a decode step is pruned, one that runs on whole inputs
at once, as an encoder's, may be both; and a graph that stays dense gains by the last ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from popc.analysis.capture import Captured
from popc.log import log_graph, logger
from popc.passes.base import Binding, Pass
from popc.passes.dense.fold_repeat_kv import fold_repeat_kv
from popc.passes.dense.gemv_kernels import use_gemv_kernels
from popc.passes.dense.hoist_masks import hoist_masks
from popc.passes.dense.quantized_kernels import use_quantized_kernels
from popc.passes.measure_inputs import measure_inputs
from popc.passes.measure_units import measure_units
from popc.passes.pack_weights import pack_weights
from popc.passes.prune_units import prune_units
from popc.passes.threshold_inputs import threshold_inputs
from popc.passes.weight_layout import store_channel_major
from popc.planning.rewrite_plan import RewritePlan
from popc.stages import run_stage

PASSES: tuple[Pass, ...] = (
    # How weights are stored decides what the others can do: first.
    store_channel_major,
    # What prompts measure, on the graph as it was captured.
    measure_inputs,
    measure_units,
    # What decode steps leave out.
    threshold_inputs,
    prune_units,
    pack_weights,
    # What makes any graph faster and prunes nothing.
    fold_repeat_kv,
    hoist_masks,
    use_quantized_kernels,
    use_gemv_kernels,
)


@dataclass
class Rewritten:
    """What passes made of a graph.

    Attributes:
        matches: by the names of passes, at how many places each rewrote it; none where it did not.
        bindings: of those that added inputs or outputs, in the order in which they stand there.
        inputs: those that were added.
    """

    matches: dict[str, int] = field(default_factory=dict)
    bindings: list[Binding[Any]] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)


def rewrite(captured: Captured, work: RewritePlan) -> Rewritten:
    """Run all passes on ``captured``, in place."""
    done = Rewritten()
    graph = captured.gm.graph
    before = len(graph.find_nodes(op="placeholder"))
    for run in PASSES:
        name = getattr(run, "__name__", type(run).__name__)
        matches, binding = run_stage(name, run, captured, work)
        assert matches or binding is None, f"{name} changed the graph, but gives no matches"
        if binding is not None:
            done.bindings.append(binding)
        if matches:
            done.matches[name] = matches
            log_graph(f"after {name}", captured.gm)
    done.inputs = graph.find_nodes(op="placeholder")[before:]
    logger.info(
        "%d regions and %d inputs of linears, %d refusals; passes: %s",
        len(work.findings.regions),
        len(work.findings.inputs),
        len(work.findings.skipped),
        done.matches or "none changed the graph",
    )
    return done
