"""What runs around a compiled graph: it finds the session, and serves what passes have added."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from popc import sessions
from popc.analysis.plan import Plan
from popc.analysis.unwrap import Unwrapping
from popc.errors import PopcWarning
from popc.passes.base import Binding, Call
from popc.planning.rewrite_plan import RewritePlan
from popc.runtime.instances import Instance, Instances
from popc.runtime.signature import Signature, is_cache_like
from popc.runtime.variants import CompiledFunction, Variants
from popc.sessions import Session

_SPLIT = (
    "its prompt was measured at another batch size, or in a graph that splits the model otherwise"
)
_UNSEEN = (
    "nothing is known of its prompt. Its KV cache was filled by another model or read from a file, "
    "or it is one that popc can't follow from call to call"
)


class CompiledGraph:
    """One compiled graph.

    A graph that prunes has variants, compiled when a call first needs them: a dense one, for tokens
    that come without a partition, and such that prune those regions alone that prompts measured.

    Args:
        run: the code of the rewritten graph.
        bindings: of the passes that rewrote it, in the order of their inputs and outputs.
        signature: of the graph before them.
        work: what was to be done in it.
        unwrapping: makes the inputs that ``run`` takes of what Dynamo calls the graph with.
        variants: None for one that prunes nothing.
        is_variant: whether it is a dense variant of another, which decode steps run too.
        on_plan: called with the regions and inputs of each layer that the graph runs for.
    """

    def __init__(
        self,
        run: CompiledFunction,
        bindings: Sequence[Binding[Any]],
        signature: Signature,
        work: RewritePlan,
        unwrapping: Unwrapping,
        *,
        variants: Variants | None,
        is_variant: bool,
        on_plan: Callable[[Plan], None] | None,
    ) -> None:
        self.run, self.signature, self._unwrapping = run, signature, unwrapping
        self.variants, self.is_variant = variants, is_variant
        self.measures, self.decodes = work.measures, work.decodes
        self._bindings = bindings
        # What only decodes goes by what a prompt's graph saw.
        self._instances = Instances(bindings, not work.decodes, on_plan)
        self._warned = False

    def __call__(self, *args: Any) -> Sequence[Any]:
        """What the graph that Dynamo gave returns for ``args``, its parameters among them."""
        session = sessions.named()
        by_tensors = session is None
        if session is None:
            session = self._session_of(args)
        # Entering no_grad once more takes longer than checking.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            outputs = self._run(self._unwrapping(args), args, session)
        if by_tensors:
            self._touch(session, args, outputs)
        return outputs

    def _run(self, args: Sequence[Any], given: Sequence[Any], session: Session) -> Sequence[Any]:
        """Feed each binding's inputs, run the graph, have each take its outputs.

        Args:
            args: plain tensors; ``given``: with quantised weights as they are.
        """
        instance = self._instances.of(args)
        measures = not self.is_variant or self._is_prompt(instance, session)
        if measures:
            instance = self._instances.renewed(instance, args)
        if self.decodes and sessions.is_prefill():
            return self._run_dense(given, session, instance)
        call = Call(
            args, session, self.signature.batch(args), measures, self._warn_split, list(args)
        )
        for binding, state in zip(self._bindings, instance.states, strict=True):
            fed = binding.feed(call, state)
            if fed is None:
                known = binding.known(call, state)
                return self._run_partly(given, session, instance, known)
            call.inputs += fed
        outputs = self.run(*call.inputs)
        start = self.signature.outputs
        if len(outputs) == start:
            return outputs
        outputs, appended = outputs[:start], outputs[start:]
        for binding, state in zip(self._bindings, instance.states, strict=True):
            if binding.outputs:
                binding.absorb(call, state, appended[: binding.outputs])
                appended = appended[binding.outputs :]
        return outputs

    def _is_prompt(self, instance: Instance, session: Session) -> bool:
        """Whether one token that runs dense is of a prompt: else it measures nothing.

        It is, if it is said to be, and if it is the first there is.
        """
        return sessions.is_prefill() or (session.whole and not session.has_seen(instance.measured))

    def _run_dense(
        self, args: Sequence[Any], session: Session, instance: Instance
    ) -> Sequence[Any]:
        if not self._is_prompt(instance, session):
            self._warn("whole", _SPLIT if session.has_seen(instance.pruned) else _UNSEEN)
        assert self.variants is not None  # what only measures is fed whatever is known
        with sessions.use(session):
            return self.variants.dense(args)

    def _run_partly(
        self,
        args: Sequence[Any],
        session: Session,
        instance: Instance,
        known: Mapping[Hashable, bool],
    ) -> Sequence[Any]:
        """Prune the regions that prompts have measured, where those are not all.

        So it does not matter to a token in which graphs Dynamo has split its prompt, and it.
        """
        if not 0 < sum(known.values()) < len(known):
            return self._run_dense(args, session, instance)
        self._warn_split(f"{len(known) - sum(known.values())} of {len(known)} regions")
        assert self.variants is not None
        with sessions.use(session):
            return self.variants.pruning(known, args)

    def _warn_split(self, what: str) -> None:
        self._warn(what, _SPLIT)

    def _warn(self, what: str, reason: str) -> None:
        """Warn once that a decode step leaves nothing out of ``what``."""
        if not self._warned:
            self._warned = True
            message = f"popc: a decode step runs dense ({what}): {reason}"
            warnings.warn(message, PopcWarning, stacklevel=2)

    def _session_of(self, args: Sequence[Any]) -> Session:
        """The session of the cache tensors among ``args``; a new one where there is none."""
        activations, written = self.signature.activations, self.signature.written
        session = sessions.of_tensors(args[i] for i in activations)
        if session is None:
            if activations and self.decodes:
                return Session(whole=False, base=sessions.offered().base)
            return sessions.offered()
        if self.measures and written and not bool(args[written[0]].any()):
            # A static cache that was reset holds zeros: a new generation begins in it.
            return sessions.offered()
        return session

    def _touch(self, session: Session, args: Sequence[Any], outputs: Sequence[Any]) -> None:
        written = [args[i] for i in self.signature.written]
        sessions.touch([*written, *(t for t in outputs if is_cache_like(t))], session)
