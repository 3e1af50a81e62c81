"""The Dynamo backend: capture, analysis, passes, Inductor, and what runs around the compiled graph.

``torch.compile(model, backend="popc", options={"sparsity": 0.4})``
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from popc import compat, state
from popc.analysis.capture import Captured, capture_dynamo
from popc.analysis.plan import Linear, Plan, Region
from popc.analysis.regions import find_regions
from popc.analysis.rules import same_size, shape
from popc.analysis.tokens import is_decode
from popc.config import Config
from popc.errors import GraphError
from popc.log import log_graph, logger
from popc.passes.decode import prune_regions
from popc.passes.prefill import add_statistics
from popc.state import RegionState, Session

Compiled = Callable[..., Sequence[Any]]


def popc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    config: Config | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Compiled:
    """Compile one Dynamo graph; registered with ``torch.compile`` as ``"popc"``.

    Args:
        options: fields of :class:`popc.Config` by name.
        mode: a mode of ``torch.compile``, turned into Inductor's options.
        on_plan: called with the plan of each graph; ``popc.compile`` collects them.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
    """
    config = Config.of(config, options)
    inductor = {**(torch._inductor.list_mode_options(mode) if mode else {}), **config.inductor}

    def generate(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        if config.codegen == "eager":
            return graph
        return compat.inductor(graph, inputs, inductor)

    if _needs_grad(example_inputs):
        warnings.warn(
            "popc prunes inference only: this call needs gradients and runs dense. "
            "Call the model under torch.no_grad() to have it pruned.",
            stacklevel=2,
        )
        return generate(gm, example_inputs)
    try:
        captured = capture_dynamo(gm, example_inputs)
    except GraphError as error:
        logger.warning("left dense: %s", error)
        return generate(gm, example_inputs)
    log_graph("captured", captured.gm)
    plan = find_regions(captured)
    if on_plan is not None:
        on_plan(plan)
    regions = [r for r in plan.regions if _prunable(r, config)]
    decode = [region for region in regions if is_decode(region)]
    prefill = [region for region in regions if not is_decode(region)]
    logger.info(
        "%d regions: %d decode, %d prefill; %d refusals",
        len(plan.regions),
        len(decode),
        len(prefill),
        len(plan.skipped),
    )
    if not regions:
        return generate(gm, example_inputs)
    try:
        return _CompiledGraph(gm, captured, decode, prefill, example_inputs, config, generate)
    except GraphError as error:
        # The passes work on a re-trace: the graph that Dynamo gave is as it was.
        logger.warning("left dense: %s", error)
        return generate(gm, example_inputs)


def _needs_grad(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


def _prunable(region: Region, config: Config) -> bool:
    """Whether ``config`` wants the region rewritten; with every channel active it stays dense."""
    if region.kind not in config.targets:
        return False
    if config.scope == "sequence" and len(shape(region.hidden)) != 3:
        return False
    return config.counts(region.channels).active < region.channels


class _CompiledGraph:
    """One compiled graph: finds the session, feeds the partition, takes the statistics.

    A graph with decode regions has a dense twin, compiled when a call first needs it, for tokens
    that come without a partition.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        captured: Captured,
        decode: list[Region],
        prefill: list[Region],
        example_inputs: Sequence[Any],
        config: Config,
        generate: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
    ) -> None:
        self.gm = gm
        self.scope = config.scope
        self.decode = [_region_state(r, captured, config) for r in decode]
        self.prefill = [_region_state(r, captured, config) for r in prefill]
        placeholders = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
        self.batch = _batch_of(decode if config.scope == "sequence" else [], placeholders)
        self.activations = [
            i
            for i, node in enumerate(placeholders)
            if node not in captured.parameters and _is_cache_like(node.meta.get("val"))
        ]
        self.written = [i for i in self.activations if _is_written(placeholders[i])]
        self.owner = object()
        self._dense: Compiled | None = None
        inputs = list(example_inputs)
        if prefill:
            add_statistics(captured, prefill, config.scope)
        if decode:
            prune_regions(captured, decode, config)
            added = [n for n in captured.gm.graph.nodes if n.op == "placeholder"][-2:]
            inputs += [node.meta["val"] for node in added]
        log_graph("rewritten", captured.gm)
        self.run = generate(captured.gm, inputs)

    def __call__(self, *args: Any) -> Sequence[Any]:
        session = state.named()
        by_tensors = session is None
        if session is None:
            session = self._session_of(args)
        if self.decode:
            partition = session.partition(self.owner, self.decode, self.scope, self.batch(args))
            if partition is None:
                outputs = self.dense(*args)
                if by_tensors:
                    self._touch(session, args, outputs)
                return outputs
            args = (*args, partition.index, partition.norm)
        outputs = self.run(*args)
        if self.prefill:
            *outputs, sums = outputs
            session.add(self.prefill, self.scope, sums)
        if by_tensors:
            self._touch(session, args, outputs)
        return outputs

    @property
    def dense(self) -> Compiled:
        """The graph as Dynamo gave it, compiled on its own (with guards of its own)."""
        if self._dense is None:
            self._dense = torch.compile(self.gm)
        return self._dense

    def _session_of(self, args: Sequence[Any]) -> Session:
        """The session of the cache tensors among ``args``; a new one where there is none."""
        session = state.of_tensors(args[i] for i in self.activations)
        if session is None:
            return Session()
        if self.prefill and self.written and not any(bool(args[i].any()) for i in self.written[:1]):
            # A static cache that was reset holds zeros: a new generation begins in it.
            return Session()
        return session

    def _touch(self, session: Session, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        written = [args[i] for i in self.written]
        state.touch([*written, *(t for t in outputs if _is_cache_like(t))], session)


def _is_cache_like(value: Any) -> bool:
    """A floating tensor with batch, token and feature axes, as caches and hidden states are."""
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _is_written(node: fx.Node) -> bool:
    """Whether the graph writes to this input in place, as it does to a static cache."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        first = schema.arguments[0].alias_info if schema.arguments else None
        if first is None or user.args[:1] != (node,):
            continue
        if first.is_write or _is_written(user):
            return True
    return False


def _batch_of(
    regions: Sequence[Region], placeholders: Sequence[fx.Node]
) -> Callable[[Sequence[Any]], int | None]:
    """How to tell the batch size of ``regions`` from a call's inputs; None: it can't be told."""
    if not regions:
        return lambda args: None
    batch = shape(regions[0].hidden)[0]
    if isinstance(batch, int):
        return lambda args: batch
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and same_size(value.shape[0], batch):
            return lambda args: int(args[i].shape[0])
    return lambda args: None


# --- what the runtime keeps of a region ---------------------------------------------------------

_norms = WeakTensorKeyDictionary()


def _region_state(region: Region, captured: Captured, config: Config) -> RegionState:
    norms = [column_norm(captured, linear) for linear in region.consumers]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)
    return RegionState(region.key, region.channels, config.counts(region.channels), norm)


def column_norm(captured: Captured, linear: Linear) -> torch.Tensor:
    """``‖down[:, c]‖₂`` for each channel, float32 ``[F]``; kept for as long as the weight lives."""
    weight = captured.parameters[linear.weight.node]
    version, norm = _norms.get(weight, (None, None))
    if version != weight._version or norm is None:
        with torch.no_grad():
            other = 1 - linear.weight.channel_dim
            wide = torch.promote_types(weight.dtype, torch.float32)
            norm = torch.linalg.vector_norm(weight.detach(), dim=other, dtype=wide).float()
        _norms[weight] = (weight._version, norm)
    return norm
