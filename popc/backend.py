"""The Dynamo backend: capture, plan, rewrite, generate code.

``torch.compile(model, backend="popc", options={"sparsity": 0.4})``
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from popc import compat, version
from popc.analysis.capture import Captured, capture_dynamo
from popc.analysis.findings import Findings
from popc.analysis.mutation import is_written
from popc.analysis.plan import Plan
from popc.analysis.unwrap import Unwrapping
from popc.codegen import fits_cpp_wrapper, generate_code
from popc.config import Config
from popc.errors import ConfigError, GraphError, PassError, PopcWarning
from popc.log import log_graph, logger
from popc.passes.pipeline import rewrite
from popc.passes.quantize_weights import ReplaceParameter, quantize_weights
from popc.planning.rewrite_plan import RewritePlan, plan_rewrite
from popc.runtime.compiled_graph import CompiledGraph
from popc.runtime.interpreter import Interpreted
from popc.runtime.signature import Signature
from popc.runtime.variants import CompiledFunction, Variants
from popc.stages import run_stage


def popc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    config: Config | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    measure_only: bool = False,
    only: Collection[Hashable] | None = None,
    has_calibration: bool = False,
    replace_parameter: ReplaceParameter | None = None,
) -> CompiledFunction:
    """Compile one Dynamo graph; registered with ``torch.compile`` as ``"popc"``.

    A graph in which a pass fails, or that can't be traced, runs dense, with a warning.

    Args:
        options: fields of :class:`popc.Config` by name.
        mode: a mode of ``torch.compile``, turned into Inductor's options.
        on_plan: called with the plan of each graph; ``popc.compile`` collects them.
        measure_only: treat a decode graph as a prefill: dense, with statistics.
        only: keys of the regions that are pruned by units; None: all that ``config`` has.
        has_calibration: whether a calibration text was, or will be, measured.
        replace_parameter: gives the model quantised weights: see
            :mod:`popc.passes.quantize_weights`.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
    """
    config = _checked(config, options, has_calibration, replace_parameter is not None)
    codegen = _Codegen(gm, config, mode)
    if _needs_grad(example_inputs):
        warnings.warn(_NEEDS_GRAD, stacklevel=2)
        return codegen(gm, example_inputs)
    variant = None
    if not measure_only:
        variant = functools.partial(
            popc_backend,
            mode=mode,
            has_calibration=has_calibration,
            replace_parameter=replace_parameter,
        )
    compiled, captured, findings = None, None, Findings()
    try:
        # Passes work on a trace of their own, so the graph that Dynamo gave stays as it is.
        captured = run_stage("capture", capture_dynamo, gm, example_inputs)
        log_graph("captured", captured.gm)
        skipped = []
        if config.weights is not None and replace_parameter is not None:
            args = captured, config, replace_parameter
            skipped = run_stage("quantize weights", quantize_weights, *args)
            log_graph("after quantize_weights", captured.gm)
        work = plan_rewrite(captured, findings, config, measure_only=measure_only, only=only)
        findings.skipped += skipped
        if captured.runnable:
            compiled = _rewritten(captured, work, codegen, variant, on_plan)
    except GraphError as error:
        logger.warning("left dense: %s", error)
        findings.refuse_all(str(error), "capture")
    except PassError as error:
        findings.refuse_all(str(error), "failed")
        warnings.warn(_FAILED.format(error), PopcWarning, stacklevel=2)
    if on_plan is not None:
        on_plan(findings.plan())
    return compiled or _dense(captured, codegen, example_inputs)


def _dense(
    captured: Captured | None, codegen: _Codegen, example_inputs: Sequence[Any]
) -> CompiledFunction:
    """Code of the graph as Dynamo gave it."""
    run = codegen(codegen.gm, example_inputs)
    traced = Unwrapping.of(example_inputs)
    if captured is None or captured.unwrapping == traced:
        return run
    # It was traced with plain weights, and has quantised ones by now.
    unwrapping = captured.unwrapping
    return lambda *args: run(*unwrapping.dequantized(args))


def _rewritten(
    captured: Captured,
    work: RewritePlan,
    codegen: _Codegen,
    variant: Callable[..., CompiledFunction] | None,
    on_plan: Callable[[Plan], None] | None,
) -> CompiledFunction | None:
    """Run the passes and generate code; None if no pass found anything to do.

    Args:
        variant: :func:`popc_backend`, for variants of the graph; None if it is a dense one itself.
    """
    original = codegen.gm
    signature = run_stage("read the signature", Signature.of, captured, work)
    rewritten = rewrite(captured, work)
    unwrapping = captured.unwrapping
    if not rewritten.matches and not unwrapping:
        return None
    run = run_stage(
        "generate code", codegen.of_rewritten, captured.gm, rewritten.inputs, work.measures
    )
    if not rewritten.bindings:
        return (lambda *args: run(*unwrapping(args))) if unwrapping else run
    variants = None
    if variant is not None and work.prunes:
        variants = Variants(original, functools.partial(variant, config=work.config))
    return CompiledGraph(
        run,
        rewritten.bindings,
        signature,
        work,
        unwrapping,
        variants=variants,
        is_variant=variant is None,
        on_plan=on_plan,
    )


_NEEDS_GRAD = (
    "popc prunes inference only: this call needs gradients and runs dense. "
    "Call the model under torch.no_grad() to have it pruned."
)
_FAILED = (
    "popc: {}. This graph runs dense: what it gives is right, but nothing is saved. It is a fault "
    "of popc's, please report it; with POPC_RAISE=1 in the environment the error itself is raised."
)


def _checked(
    config: Config | None,
    options: Mapping[str, Any] | None,
    has_calibration: bool,
    has_model: bool,
) -> Config:
    """The configuration, one that this entry point can serve."""
    config = Config.of(config, options)
    if config.calibrated and not has_calibration:
        allowed = "one that goes by the prompt; popc.compile(..., calibration=...) takes a text"
        raise ConfigError("policy", config.calibrated, allowed)
    if config.weights is not None and not has_model:
        allowed = "None, or popc.compile: torch.compile's backends can't give a model other weights"
        raise ConfigError("weights", config.weights, allowed)
    if options and config.guards != "token":
        allowed = "'token', or popc.compile: torch.compile itself makes the guards"
        raise ConfigError("guards", config.guards, allowed)
    return config


@dataclass(frozen=True)
class _Codegen:
    """Makes code of ``gm``, as Dynamo gave it, and of what popc traced and rewrote of it."""

    gm: fx.GraphModule
    config: Config
    mode: str | None

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> CompiledFunction:
        """Of the graph that Dynamo gave."""
        if self.config.codegen == "eager":
            return Interpreted(graph)
        return self._inductor(graph, inputs, self._options())

    def of_rewritten(
        self, graph: fx.GraphModule, fed: Sequence[fx.Node], measures: bool
    ) -> CompiledFunction:
        """Of the graph that passes have rewritten.

        Args:
            fed: the inputs that passes have added.
            measures: whether it is that of a prompt.
        """
        if self.config.codegen == "eager":
            return Interpreted(graph)
        options = self._options()
        if measures:
            # CUDA graphs of prompts gain nothing, and each length is recorded on its own.
            options["triton.cudagraphs"] = False

        def compiler(
            piece: fx.GraphModule, inputs: Sequence[Any], *, calls: int, whole: bool
        ) -> CompiledFunction:
            if whole:
                compat.keep_inputs(piece, self.gm, is_written)
            # A decode step's kernels take less time than Python takes to call them.
            in_cpp = calls > 1 and not measures and fits_cpp_wrapper(piece)
            wrapper = {"cpp_wrapper": True} if in_cpp else {}
            return self._inductor(piece, inputs, {**wrapper, **options})

        if options.get("triton.cudagraphs"):  # a step is recorded as one
            inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
            return compiler(graph, inputs, calls=1, whole=True)
        return generate_code(graph, fed, compiler)

    def _options(self) -> dict[str, Any]:
        return {**compat.mode_options(self.mode), **self.config.inductor}

    def _inductor(
        self, graph: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
    ) -> CompiledFunction:
        # Inductor's own key has the graph and its options; of the rest of Config nothing reaches
        # the code, so that thresholds of another sparsity find it again. What does is how popc's
        # ops and passes are written.
        return compat.inductor(graph, inputs, options, f"popc {version.sources_digest()}")


def _needs_grad(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )
