"""popc's entry points: ``compile`` and ``analyze``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import fx

from popc import compat
from popc.analysis.capture import Captured, capture_dynamo, capture_module, identity
from popc.analysis.findings import Findings
from popc.analysis.input_groups import find_input_groups
from popc.analysis.plan import Plan, Record, with_parameters
from popc.analysis.regions import find_regions
from popc.analysis.rules.registry import RuleError
from popc.compiled_model import Compiled, dense
from popc.config import Config
from popc.errors import ConfigError, GraphError, ModelError
from popc.passes.region_binding import input_positions
from popc.quant import torchao

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(
    model: Model,
    config: Config | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    inplace: bool = False,
    **options: Any,
) -> Model:
    """A compiled model that prunes while it decodes, made of ``model``.

    It is used like the model: same class, forward signature, ``generate`` with any cache, config,
    device and parameters (shared, not copied). Its modules are its own: what is set on it
    (``eval``, an attribute, a submodule, a hook) is seen by its forward and leaves ``model`` as it
    is; what is set on ``model`` later is seen with the next prompt, but for another ``forward`` or
    ``generate``. Casts and moves change weights, and so both. In eval mode it runs without
    gradients; inputs that require grad run dense, with a warning. Parts that ``generate`` by
    themselves, as the language model within a wrapper does, are compiled too; parts that were
    compiled on their own stay what they are.

    Its first calls lay weights out anew in memory, which are those of ``model``: no other thread
    may run ``model`` meanwhile. Values and shapes stay, strides change; ``state_dict()`` gives the
    weights themselves, as ever, and so with the new strides.

    Args:
        model: any ``nn.Module``.
        config: a :class:`popc.Config`; ``options`` are its fields by name and override it.
        calibration: for policies that need a calibration text, as ``"wanda_sp"`` and ``"flap"``:
            batches of it, each a mapping of the model's inputs or a tensor, its first one. They run
            through the model at once, dense.
        inplace: with ``weights``, free the model's own weights as they are quantised, one by one in
            the first call, so that no more memory is needed than the model has: using ``model``
            then raises a ModelError.

    Returns:
        The compiled model, with ``popc_plan``: the :class:`popc.Plan` of its graphs so far.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed; ``calibration`` is
            missing, or given to a policy that does not need it.
        ModelError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"popc.compile takes an nn.Module, not {type(model).__name__}")
    quantized = any(map(torchao.is_quantized, model.parameters()))
    if quantized and config is None and "policy" not in options:
        options["policy"] = "graded"  # the usual one of quantised weights
    config = Config.of(config, options)
    _check_calibration(config, calibration)
    if inplace and config.weights is None:
        raise ConfigError("inplace", inplace, "False, where weights is not given: none are freed")
    compiled = Compiled(model, config, inplace)
    if calibration is not None:
        compiled.measure(calibration)
    return compiled.model  # type: ignore[return-value]


def _check_calibration(config: Config, calibration: Iterable[Any] | None) -> None:
    needs = config.calibrated
    if needs and calibration is None:
        allowed = "batches of a text: popc.compile(model, ..., calibration=batches)"
        raise ConfigError("calibration", None, f"for policy {needs!r} {allowed}")
    if not needs and calibration is not None:
        kind = type(calibration).__name__
        raise ConfigError("calibration", kind, f"None for policy {config.policy_name!r}")


def analyze(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """What popc would prune in ``model``, and why it leaves the rest.

    Args:
        model: any ``nn.Module``, a ``fx.GraphModule``, or an ``ExportedProgram``.
        args, kwargs: one call's inputs; a transformers model without them is given its own
            ``dummy_inputs``.

    Raises:
        ModelError: ``model`` is none of these, it fails on the inputs, or a rule of
            :func:`popc.register_rule` does.
        GraphError: a graph could not be traced to ATen ops.
    """
    if isinstance(model, torch.export.ExportedProgram):
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        return _analyze_graph(model.module(), args, kwargs)
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"popc.analyze takes an nn.Module or a graph, not {type(model).__name__}")
    if not args and not kwargs and hasattr(model, "dummy_inputs"):
        kwargs = cast(Mapping[str, Any], model.dummy_inputs)
    model = dense(model)
    with torch.no_grad():
        if isinstance(model, fx.GraphModule):
            return _analyze_graph(model, args, kwargs)
        return _analyze_traced(model, args, kwargs or {})


def _analyze_graph(
    gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Plan:
    try:
        return _analysis_of(capture_module(gm, args, kwargs)).plan()
    except RuleError as error:
        raise ModelError(str(error)) from error


def _analysis_of(captured: Captured) -> Findings:
    findings = find_regions(captured)
    findings.inputs = find_input_groups(captured, findings.regions)
    return findings


def _named(
    records: Sequence[Record], places: Sequence[Sequence[int]], args: Sequence[Any]
) -> Iterator[Record]:
    """The records as they are for the parameters among ``args``, at ``places``."""
    for record, positions in zip(records, places, strict=True):
        yield with_parameters(record, [identity(args[i]) for i in positions])


def _analyze_traced(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
    plan = Plan()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            captured = capture_dynamo(gm, example_inputs)
        except GraphError as error:
            plan.extend(Plan(breaks=[str(error)]))
            return gm.forward
        findings = _analysis_of(captured)
        first = findings.plan()
        plan.extend(first)
        # ``run`` lives as long as Dynamo's caches do: the graph is not to.
        regions = [input_positions(region.consumers, captured) for region in findings.regions]
        inputs = [input_positions(group.linears, captured) for group in findings.inputs]
        captured_inputs = captured.unwrapping

        def run(*given: Any) -> Any:
            args = captured_inputs(given)
            # One graph may serve several layers.
            plan.extend(
                Plan(
                    regions=list(_named(first.regions, regions, args)),
                    inputs=list(_named(first.inputs, inputs, args)),
                )
            )
            return gm.forward(*given)

        return run

    before = compat.graph_breaks()
    try:
        compat.compile_alone(model.forward, backend)(*args, **kwargs)
    except Exception as error:
        raise ModelError(f"the model fails on these inputs: {error}") from error
    plan.extend(Plan(breaks=compat.breaks_since(before)))
    return plan
