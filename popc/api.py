"""popc's entry points: ``compile`` and ``analyze``."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import fx

from popc import compat, state
from popc.analysis.capture import Captured, capture_dynamo, capture_module
from popc.analysis.inputs import find_inputs
from popc.analysis.plan import Plan
from popc.analysis.regions import find_regions
from popc.backend import popc_backend
from popc.caches import in_session
from popc.config import Config
from popc.errors import ConfigError, GraphError, ModelError
from popc.guards import PromptGuards
from popc.runtime import CompiledGraph
from popc.templates import InputsTemplate, Template

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(
    model: Model,
    config: Config | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> Model:
    """A compiled twin of ``model`` that prunes while it decodes.

    The twin is used like the model: same forward signature, ``generate`` with any cache, the same
    config, device and parameters (shared, not copied). ``model`` itself behaves as before. In eval
    mode the twin runs without gradients; inputs that require grad run dense, with a warning.

    Args:
        model: any ``nn.Module``.
        config: a :class:`popc.Config`; ``options`` are its fields by name and override it.
        calibration: for policies that need a text beforehand, as ``"wanda_sp"`` and ``"flap"``:
            batches of it, each a mapping of the model's inputs or a tensor, its first one. They run
            through the twin at once, dense.

    Returns:
        The twin, with ``popc_plan``: the :class:`popc.Plan` of all graphs compiled so far.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed; ``calibration`` is
            missing, or given to a policy that does not need it.
        ModelError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"popc.compile takes an nn.Module, not {type(model).__name__}")
    # Of a twin, the twin of what it was made of.
    model = model.__dict__.get("popc_original", model)
    config = Config.of(config, options)
    _check_calibration(config, calibration)
    _save_as_before(model)
    twin = copy.copy(model)
    forward = model.forward
    plan = Plan()
    guards = PromptGuards() if config.guards == "prompt" else None
    backend = _backend(config, plan, guards)
    compiled = compat.compile_alone(forward, backend, guards)
    base: state.Session | None = None
    by_sequence = config.scope == "sequence"
    warned = False

    @functools.wraps(forward)
    def pruned_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned, compiled
        if guards is not None:
            if guards.changed:
                compiled = compat.compile_alone(forward, backend, guards)
            guards.graphs, guards.changed = 0, False
        before = compat.graph_breaks()
        frees = torch.is_grad_enabled() and not _wants_grad(twin, args, kwargs)
        with torch.no_grad() if frees else nullcontext():
            out = compat.call_compiled(in_session, compiled, args, kwargs, base, by_sequence)
        _note_breaks(plan, before)
        if not warned and not plan.regions and not plan.inputs and plan.skipped:
            warned = True
            warnings.warn(
                "popc found nothing to prune in this model; it runs dense. "
                "popc.analyze(model) says why.",
                stacklevel=2,
            )
        return out

    # object.__setattr__ and the instance dict: the class, and so the original, stays as it is.
    twin.__dict__["forward"] = pruned_forward
    twin.__dict__["popc_plan"] = plan
    twin.__dict__["popc_config"] = config
    twin.__dict__["popc_original"] = model
    calibrated = calibration is not None
    twin.__dict__["__deepcopy__"] = functools.partial(_copied, model, config, calibrated)
    twin.__dict__["__reduce_ex__"] = _refuse_to_pickle
    if hasattr(model, "get_compiled_call"):
        # transformers' generate would compile the call once more.
        twin.__dict__["get_compiled_call"] = lambda *_: twin.__call__
    if calibration is not None:
        base = _measured(compiled, calibration)
    return twin


def _copied(model: Model, config: Config, calibrated: bool, memo: dict[int, Any]) -> Model:
    """A deep copy of a twin: the twin of a copy, with weights of its own."""
    if calibrated:
        raise ModelError(
            f"a twin with policy {config.policy_name!r} can't be copied, as its text is not kept: "
            "copy the model, and compile the copy with its calibration"
        )
    return compile(copy.deepcopy(model, memo), config)


def _refuse_to_pickle(_: Any) -> Any:
    raise ModelError(
        "a compiled twin can't be pickled: save its state_dict(), or pickle the model that it was "
        "made of, whose weights it shares, and compile that where it is loaded"
    )


def _measured(compiled: Callable[..., Any], calibration: Iterable[Any]) -> state.Session:
    """A session that has seen the batches of ``calibration``."""
    session = state.Session()

    def run(batch: Any) -> None:
        compiled(**batch) if isinstance(batch, Mapping) else compiled(batch)

    with torch.no_grad(), state.use(session):
        for batch in calibration:
            compat.call_compiled(run, batch)
    return session


def _check_calibration(config: Config, calibration: Iterable[Any] | None) -> None:
    needs = config.calibrated
    if needs and calibration is None:
        allowed = "batches of a text: popc.compile(model, ..., calibration=batches)"
        raise ConfigError("calibration", None, f"for policy {needs!r} {allowed}")
    if not needs and calibration is not None:
        given = type(calibration).__name__
        raise ConfigError("calibration", given, f"None for policy {config.policy_name!r}")


def _save_as_before(model: torch.nn.Module) -> None:
    """Have ``model.state_dict()`` give weights in the layout that they had: see ``passes.layout``.

    Their shapes and values are the same in either, but formats such as safetensors take only
    contiguous tensors.
    """
    if _contiguous not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_contiguous)


def _contiguous(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name, value in module.named_parameters(remove_duplicate=False):
        held = state_dict.get(prefix + name)
        if held is not None and held is not value and held.dim() > 1 and held.mT.is_contiguous():
            state_dict[prefix + name] = held.contiguous()


def _backend(config: Config, plan: Plan, guards: PromptGuards | None) -> Callable[..., Any]:
    """popc's backend with its options, reporting into ``plan``, telling ``guards`` of graphs."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        made = popc_backend(
            gm, example_inputs, config=config, on_plan=plan.extend, has_calibration=True
        )
        if guards is not None:
            decodes = isinstance(made, CompiledGraph) and made.decodes
            guards.expect(decodes, compat.written_places())
        return made

    return backend


def _note_breaks(plan: Plan, before: Mapping[str, int]) -> None:
    """Add the graph breaks that Dynamo met since it had counted ``before`` to ``plan``."""
    after = compat.graph_breaks()
    if after != before:
        new = [reason for reason, count in after.items() if count > before.get(reason, 0)]
        plan.extend(Plan(breaks=[reason.strip().splitlines()[0] for reason in new]))


def _wants_grad(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    values = (*args, *kwargs.values())
    asks = any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
    return model.training or asks


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
        ModelError: ``model`` is none of these, or it fails on the inputs.
        GraphError: a graph could not be traced to ATen ops.
    """
    if isinstance(model, torch.export.ExportedProgram):
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        return _found(capture_module(model.module(), args, kwargs))
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"popc.analyze takes an nn.Module or a graph, not {type(model).__name__}")
    if not args and not kwargs and hasattr(model, "dummy_inputs"):
        kwargs = cast(Mapping[str, Any], model.dummy_inputs)
    with torch.no_grad():
        if isinstance(model, fx.GraphModule):
            return _found(capture_module(model, args, kwargs))
        return _analyze_traced(model, args, kwargs or {})


def _found(captured: Captured) -> Plan:
    plan = find_regions(captured)
    plan.inputs = find_inputs(captured, plan.regions)
    return plan


def _analyze_traced(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
    plan = Plan()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            captured = capture_dynamo(gm, example_inputs)
        except GraphError as error:
            plan.extend(Plan(breaks=[str(error)]))
            return gm.forward
        found = _found(captured)
        plan.extend(found)
        templates = [Template.of(region, captured) for region in found.regions]
        inputs = [InputsTemplate.of(group, captured) for group in found.inputs]

        def run(*args: Any) -> Any:
            # One graph may serve several layers.
            named = [template.named(args) for template in templates]
            groups = [template.named(args) for template in inputs]
            plan.extend(Plan(regions=named, inputs=groups))
            return gm.forward(*args)

        return run

    before = compat.graph_breaks()
    try:
        compat.compile_alone(model.forward, backend)(*args, **kwargs)
    except Exception as error:
        raise ModelError(f"the model fails on these inputs: {error}") from error
    _note_breaks(plan, before)
    return plan
