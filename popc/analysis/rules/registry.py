"""Rules that users register for the ops of their own libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from popc import compat
from popc.analysis.labels import LabeledValue, Mixes
from popc.analysis.linears import grouped_ops
from popc.analysis.propagation import Labels, Propagation, Rule
from popc.analysis.rules import elementwise, reductions, views
from popc.analysis.rules.table import RULES
from popc.analysis.rules.traits import Trait, declare, forget, has, is_declared
from popc.errors import ConfigError

# What a rule can be called, with the traits that it implies.
NAMED: dict[str, tuple[Rule, Trait]] = {
    "pointwise": (elementwise.pointwise, Trait.POINTWISE),
    "same": (elementwise.same, Trait.NOTHING),
    "glu": (elementwise.glu, Trait.NOTHING),
    "last_dim": (reductions.last_dim, Trait.NOTHING),
    "reshape": (views.view, Trait.RESHAPE),
    "attention": (reductions.attention, Trait.ATTENTION),
}
_registered: dict[Any, Rule] = {}


class RuleError(Exception):
    """A rule that a user registered has failed. It is caught where any failing pass is."""


def rule_of(op: Any) -> Rule | None:
    """The rule for an op: its own, or that of elementwise ops; None if popc has none."""
    rule = _registered.get(op) or RULES.get(op)
    if rule is None and has(op, Trait.POINTWISE):
        return elementwise.pointwise
    return rule


def register_rule(op: Any, rule: str | Rule | None, traits: str | Iterable[str] = ()) -> None:
    """Tell popc what an op of your own library does to the channels of its inputs.

    Without a rule popc takes an op for one that mixes channels, and prunes nothing on either side
    of it. (An elementwise op needs none where torch knows that it is one:
    ``torch.library.custom_op(..., tags=(torch.Tag.pointwise,))``.) What is compiled from then on
    goes by the rule; registered again, the op takes the new one.

    .. code-block:: python

        @torch.library.custom_op("mylib::swiglu", mutates_args=())
        def swiglu(gate: Tensor, up: Tensor) -> Tensor:
            return torch.nn.functional.silu(gate) * up

        @swiglu.register_fake
        def _(gate: Tensor, up: Tensor) -> Tensor:
            return torch.empty_like(gate)

        popc.register_rule(swiglu, "pointwise")
        popc.register_rule(swiglu, None)  # it has no rule any more

    A wrong rule gives wrong results: :func:`popc.testing.assert_equivalent` shows it.

    Args:
        op: what ``torch.library.custom_op`` gave, or ``torch.ops.mylib.swiglu``, or one overload.
        rule: None takes an earlier one back. A function ``(propagation, node) -> labels`` is a
            rule of your own, as those in ``popc/analysis/rules``. Else one of these names:

            - ``"pointwise"``: elementwise over all inputs, with broadcasting.
            - ``"same"``: each position of the output is made of the same position of the one input
              that has channels; others, as a scale, are weights.
            - ``"glu"``: ``[..., 2F]`` to ``[..., F]``, of each channel of the first half with its
              like in the second; along the argument ``dim`` if the op has one.
            - ``"last_dim"``: of the first input's shape, each row mixed: a norm, a softmax.
            - ``"reshape"``: the first input's values in the same order, in another shape.
            - ``"attention"``: ``softmax(q kᵀ + mask) v`` of the first three inputs, each
              ``[..., H, T, E]``; with arguments ``attn_mask`` and ``enable_gqa`` if it has them.
        traits: names of :class:`popc.analysis.rules.traits.Trait` in lower case, such as
            ``"rowwise"``, that are true of the op besides.

    Raises:
        ConfigError: ``op`` is no op of PyTorch's, or one that popc has a rule of its own for;
            ``rule`` or a trait is not known.
    """
    overloads = compat.overloads(op)
    if not overloads:
        allowed = "an op, as torch.library.custom_op or torch.ops.mylib.name gives it"
        raise ConfigError("op", op, allowed)
    if any(map(_is_known, overloads)):
        raise ConfigError(
            "op", str(op), "an op that popc has no rule of its own for, and no traits"
        )
    if rule is None:
        for overload in overloads:
            if _registered.pop(overload, None) is not None:
                forget(overload)
        return
    if isinstance(rule, str) and rule in NAMED:
        function, implied = NAMED[rule]
    elif callable(rule):
        function, implied = rule, Trait.NOTHING
    else:
        names = ", ".join(map(repr, NAMED))
        raise ConfigError("rule", rule, f"{names}, a function (propagation, node), or None")
    for name in [traits] if isinstance(traits, str) else traits:
        implied |= _trait(name)
    for overload in overloads:
        _registered[overload] = _checked(overload, function)
        declare(overload, implied)


def _is_known(op: Any) -> bool:
    """Whether popc has a rule or traits of its own for an op, or takes it for a linear."""
    if op in RULES or op in grouped_ops() or (is_declared(op) and op not in _registered):
        return True
    return op.namespace == "aten" and torch.Tag.pointwise in op.tags


def _trait(name: object) -> Trait:
    known = {str(trait.name).lower(): trait for trait in Trait}
    if not isinstance(name, str) or name not in known:
        raise ConfigError("traits", name, ", ".join(map(repr, known)))
    return known[name]


def _checked(op: Any, rule: Rule) -> Rule:
    """``rule``, with what it gives checked against the op's outputs."""

    def checked(propagation: Propagation, node: fx.Node) -> Labels:
        try:
            labels = rule(propagation, node)
        except Mixes:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuleError(f"the rule registered for {op} failed: {what}") from error
        if not _fits(labels, node.meta["val"]):
            raise RuleError(f"the rule registered for {op} gave labels that do not fit its output")
        return labels

    return checked


def _fits(labels: Any, value: Any) -> bool:
    """Whether ``labels`` can be those of ``value``: as many outputs, dims and positions."""
    if labels is None:
        return True
    if isinstance(value, list | tuple):
        fits = isinstance(labels, list) and len(labels) == len(value)
        return fits and all(map(_fits, labels, value))
    if not isinstance(labels, LabeledValue) or not isinstance(value, torch.Tensor):
        return False
    return len(labels.dims) == value.dim() and all(map(_fills, labels.dims, value.shape))


def _fills(dim: Any, size: Any) -> bool:
    product = 1
    for factor in dim:
        product = product * factor.size
    known = isinstance(product, int) and isinstance(size, int)
    return not known or product == size
