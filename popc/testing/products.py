"""Which products of a model, run eagerly, are consumers of a region, or read an input.

A weight may be part of several regions, and be used several times in one call: layers may share it.
So a product is identified by its weight and by the count of products with that weight before it in
the call. The traced graphs, whose order is that of the eager call, give the number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from popc import compat
from popc.analysis.capture import identity
from popc.analysis.linears import replayed, view_of
from popc.analysis.plan import InputRecord, LinearRecord, Plan, RegionRecord

Owner = RegionRecord | InputRecord
Observer = Callable[[Hashable, Tensor], None]

# The position and the keyword of x and of W among each op's operands.
PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    F.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    Tensor.matmul: ((0, "input"), (1, "other")),
    Tensor.__matmul__: ((0, "input"), (1, "other")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    F.grouped_mm: ((0, "mat_a"), (1, "mat_b")),
    compat.grouped_mm: ((0, "mat_a"), (1, "mat_b")),
}


class Use(NamedTuple):
    """A product that belongs to an owner.

    Attributes:
        owner: a region, or linears of one input.
        number: the weight's place in the owner's key.
        at: how many products with this weight come before it in a call.
        total: how many there are in a call; where graphs run again for another layer that has the
            same key, there are as many again.
    """

    owner: Owner
    number: int
    at: int
    total: int


class Uses:
    """Which owner a product belongs to, as the products of a call are met in order.

    Args:
        owners: whose products to recognise.
        traced: of :func:`popc.analyze`, for this very model: it has the owners' keys.
    """

    def __init__(self, model: nn.Module, owners: Sequence[Owner], traced: Plan) -> None:
        self.parameters = {identity(p): p for p in model.parameters()}
        self.owners = {owner.key: owner for owner in owners}
        every: list[Owner] = [*traced.regions, *traced.inputs]
        self.traced = [_Traced(owner) for owner in every]
        self.begin()

    def begin(self) -> None:
        """A new forward call: products are counted anew, of weights as they are stored now."""
        self.calls: Counter[Hashable] = Counter()
        self.by_view = self._by_view()

    def _by_view(self) -> dict[Hashable, list[Use]]:
        runs: Counter[Any] = Counter()
        begins: dict[Any, int] = {}
        totals: Counter[Hashable] = Counter()
        entries: list[tuple[Hashable, Owner, int, int]] = []
        for traced in self.traced:
            for part in traced.parts:
                view = self._view(part.linear, part.identity)
                graph, place, before, count = part.linear.position
                # A graph may serve several layers, one after the other: their keys differ.
                run = runs[type(traced.owner), graph, place]
                runs[type(traced.owner), graph, place] += 1
                if (view, graph, run) not in begins:
                    begins[view, graph, run] = totals[view]
                    totals[view] += count
                at = begins[view, graph, run] + before
                entries.append((view, traced.owner, part.number, at))
        by_view: dict[Hashable, list[Use]] = {}
        for view, owner, number, at in entries:
            # The plan of a compiled model has the same keys.
            if owner.key in self.owners:
                use = Use(self.owners[owner.key], number, at, totals[view])
                by_view.setdefault(view, []).append(use)
        return by_view

    def _view(self, linear: LinearRecord, key: int) -> Hashable:
        return view_of(replayed(linear.weight, self.parameters[key].detach()))

    def watches(self, weight: Tensor) -> bool:
        """Whether products with ``weight`` belong to any owner."""
        return view_of(weight) in self.by_view

    def of(self, weight: Tensor) -> list[tuple[Owner, int]]:
        """Owners of the next product with ``weight``, and its number among the owner's weights."""
        view = view_of(weight)
        known = self.by_view.get(view, [])
        if known:
            self.calls[view] += 1
        at = self.calls[view] - 1
        return [(use.owner, use.number) for use in known if at % use.total == use.at]


class _Part(NamedTuple):
    number: int
    linear: LinearRecord
    identity: int


class _Traced:
    """An owner of a traced plan, with its linears and the parameters that they have there."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        parameters = [parameter for parameter, *_ in owner.key[0]]
        pairs = zip(linears_of(owner), parameters, strict=True)
        self.parts = [_Part(number, *pair) for number, pair in enumerate(pairs)]


def linears_of(owner: Owner) -> Sequence[LinearRecord]:
    """The consumers of a region, or the linears that read an input."""
    return owner.consumers if isinstance(owner, RegionRecord) else owner.linears


class Watched(TorchFunctionMode):
    """Lets :meth:`treat` change what products with watched weights read.

    Args:
        owners: regions, or linears of one input.
        traced: see :class:`Uses`.
        observer: called with what was treated, as its key and the weight's place in that, and with
            the product's output.
    """

    def __init__(
        self,
        model: nn.Module,
        owners: Sequence[Owner],
        traced: Plan,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        self.observer = observer
        self.uses = Uses(model, owners, traced)
        self.norms = {owner.key: _norms(owner, self.uses.parameters) for owner in owners}
        self.picked: dict[int, tuple[Tensor, Tensor, Any]] = {}

    def begin(self) -> None:
        """A new forward call."""
        self.uses.begin()
        self.picked = {}

    def treat(self, owner: Any, number: int, x: Tensor, selector: Any) -> Tensor:
        """What is read in place of x.

        Args:
            number: the weight's place in the owner's key.
            selector: of experts, which one each row is multiplied with.
        """
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__ and self.uses.watches(args[0]):
            picked = func(*args, **kwargs)
            self.picked[id(picked)] = (picked, args[0], args[1])
            return picked
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        (x_at, x_name), (w_at, w_name) = PRODUCTS[func]
        operands = list(args)
        x = operands[x_at] if x_at < len(operands) else kwargs[x_name]
        weight = operands[w_at] if w_at < len(operands) else kwargs[w_name]
        if func is torch.bmm and id(x) in self.picked:  # bmm(W[ids], x[..., None])
            _, stack, ids = self.picked[id(x)]
            rows, keys = self._treated(weight.squeeze(-1), stack, ids)
            return self._seen(keys, func(x, rows[..., None]))
        selector = kwargs.get("offs", (*operands, None, None)[2])
        x, keys = self._treated(x, weight, selector)
        if x_at < len(operands):
            operands[x_at] = x
        else:
            kwargs[x_name] = x
        return self._seen(keys, func(*operands, **kwargs))

    def _treated(self, x: Tensor, weight: Tensor, selector: Any) -> tuple[Tensor, list[Hashable]]:
        keys: list[Hashable] = []
        for owner, number in self.uses.of(weight):
            x = self.treat(owner, number, x, selector)
            keys.append((owner.key, number))
        return x, keys

    def finished(self, keys: Sequence[Hashable], out: Tensor) -> Tensor:
        """What is taken in place of ``out``, a product; ``keys`` as for the observer."""
        return out

    def _seen(self, keys: Sequence[Hashable], out: Tensor) -> Tensor:
        out = self.finished(keys, out)
        if self.observer is not None:
            for key in keys:
                self.observer(key, out)
        return out


def _norms(owner: Owner, parameters: Mapping[int, Tensor]) -> Tensor:
    """``‖W[:, c]‖`` over all consumers, float64 ``[K]``; ``[E, K]`` of experts."""
    squares = [
        replayed(linear.weight, parameters[key].detach()).double().square().sum(linear.out_dim)
        for (key, *_), linear in zip(owner.key[0], linears_of(owner), strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()
