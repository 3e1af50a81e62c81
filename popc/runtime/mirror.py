"""A mirror of a model: modules of its own that share the model's parameters and buffers.

What is set on a mirror (an attribute, a submodule, a hook, train or eval mode) is read by its own
``forward`` and leaves the original as it is. What is set on the original later reaches the mirror
with :meth:`Mirror.follow`. Weights are never copied.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from popc.compat import COMPILED_CALL

REPLACED = "_popc_replaced"  # what a compiled module holds of its own attributes, as they were
_MISSING = object()
_CONTAINERS = (dict, list, tuple)
_DEPTH = 4  # containers within containers that are looked into
# What nn.Module itself leaves out of a copy, too: it is bound to the module that it was made for.
_LEFT_OUT = (COMPILED_CALL, REPLACED)


class Mirror:
    """Copies of all modules of ``model``, in the same structure.

    Attributes:
        root: the copy of ``model``, of the same class.
    """

    def __init__(self, model: nn.Module) -> None:
        self.original = model
        self._lock = threading.Lock()
        self._copies: dict[int, nn.Module] = {}  # by the id of the original, which `_seen` holds
        self._seen: list[tuple[nn.Module, dict[str, Any]]] = []
        self.root = self._copy_tree(model)

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of a module; the module itself if it has none."""
        return self._copies.get(id(module), module)

    def follow(self) -> None:
        """Repeat on the mirror what was set on the original since the last time.

        What was set on both is as the original has it. Takes a few microseconds for each module.
        """
        with self._lock:
            changed = False
            for number, (module, before) in enumerate(self._seen):
                copied = self._copies[id(module)]
                if type(copied) is not type(module):  # a parametrization was added or removed
                    copied.__class__ = type(module)
                now = _plain(module)
                if _is_same(before, now):
                    continue
                changed = True
                self._seen[number] = module, _snapshot(now)
                self._repeat(before, now, copied.__dict__)
            if changed:
                self._forget_removed()

    def _forget_removed(self) -> None:
        """Let go of modules that the original has no more."""
        held = {id(module) for module in self.original.modules()}
        self._seen = [(module, before) for module, before in self._seen if id(module) in held]
        self._copies = {number: copied for number, copied in self._copies.items() if number in held}

    def hooks(self) -> list[tuple[nn.Module, str, Any]]:
        """What hooks the mirror's parts have: module, kind and hook.

        Not those of the root: they are called around its forward. Dynamo does not guard on hooks.
        """
        return [
            (part, kind, hook)
            for part in self.root.modules()
            if part is not self.root
            for kind in _HOOKS
            if part.__dict__.get(kind)
            for hook in part.__dict__[kind].values()
        ]

    def _copy_tree(self, model: nn.Module) -> nn.Module:
        new = []
        for module in modules_of(model):
            copied = None if id(module) in self._copies else _empty_copy(module)
            if copied is not None:
                self._copies[id(module)] = copied
                new.append(module)
        for module in new:
            held = _plain(module)
            self._seen.append((module, _snapshot(held)))
            own = self._copies[id(module)].__dict__
            own.update((name, self._mapped(value)) for name, value in held.items())
            for name in _registries(held):
                own[name] = _mapped_items(held[name], self._mapped)
            own.update((name, set(held[name])) for name in _SETS & held.keys())
            for name in _slots(module):
                object.__setattr__(self._copies[id(module)], name, getattr(module, name))
        return self.of(model)

    def _repeat(
        self, before: Mapping[str, Any], now: Mapping[str, Any], own: dict[str, Any]
    ) -> None:
        fixed = own.get(REPLACED, {})  # by popc: the mirror's forward stays the compiled one
        for name in before.keys() - now.keys() - fixed.keys():
            own.pop(name, None)
        for name, value in now.items():
            known = before.get(name, _MISSING)
            if name in fixed:
                continue
            if isinstance(known, _Registry) and isinstance(value, dict):
                for key in known.items.keys() - value.keys():
                    own[name].pop(key, None)
                for key, item in value.items():
                    if known.items.get(key, _MISSING) is not item:
                        mine = [one for k, one in own[name].items() if k not in known.items]
                        # What a library installs on either when it is first used, once each.
                        if name not in _HOOKS or not any(_is_alike(item, one) for one in mine):
                            own[name][key] = self._taken(item)
                for key in [*value, *(key for key in own[name] if key not in value)]:
                    if key in own[name]:
                        own[name][key] = own[name].pop(key)  # in the original's order
            elif isinstance(known, frozenset):
                own[name] = (own[name] - known) | set(value)
            elif known is not value:
                own[name] = self._taken(value)

    def _taken(self, value: Any) -> Any:
        """``value`` as it is set on the mirror; a module that is new to it is copied."""
        if isinstance(value, nn.Module):
            return self._copy_tree(value)
        return self._mapped(value)

    def _mapped(self, value: Any, depth: int = _DEPTH) -> Any:
        """``value`` with the copies of modules in their place; the same object if it has none."""
        if isinstance(value, nn.Module):
            return self.of(value)
        if isinstance(value, types.MethodType):
            owner = self._mapped(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            return self._mapped_partial(value)
        if isinstance(value, types.FunctionType):
            return self._mapped_function(value, depth)
        if not isinstance(value, _CONTAINERS) or not depth:
            return value
        inner = functools.partial(self._mapped, depth=depth - 1)
        items = value.values() if isinstance(value, dict) else value
        if all(inner(item) is item for item in items):
            return value
        if isinstance(value, tuple):
            made = map(inner, value)
            return type(value)._make(made) if hasattr(value, "_make") else type(value)(made)
        copied: Any = copy.copy(value)  # of a subclass, as defaultdict, with what it is made of
        if isinstance(value, dict):
            copied.update((key, inner(item)) for key, item in value.items())
        else:
            copied[:] = map(inner, value)
        return copied

    def _mapped_function(self, value: types.FunctionType, depth: int) -> types.FunctionType:
        """As in ``old = model.forward; model.forward = lambda x: old(x)``."""
        if not value.__closure__ or not depth:
            return value
        cells = []
        for cell in value.__closure__:
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                return value
            made = self._mapped(held, depth - 1)
            cells.append(cell if made is held else types.CellType(made))
        if all(a is b for a, b in zip(cells, value.__closure__, strict=True)):
            return value
        found = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
        )
        found.__kwdefaults__ = value.__kwdefaults__
        vars(found).update(vars(value))
        return found

    def _mapped_partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        """As Accelerate's hooks have it: ``module.forward = partial(new_forward, module)``."""
        held = value.func, value.args, value.keywords
        function, args, keywords = map(self._mapped, held)
        if function is value.func and args is value.args and keywords is value.keywords:
            return value
        made = functools.partial(function, *args, **keywords)
        vars(made).update({name: self._mapped(item) for name, item in vars(value).items()})
        return made


class _Registry:
    """The items of one of a module's own dicts, as they were."""

    __slots__ = ("items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self.items = dict(items)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, those of a compiled one as they were before."""
    held = module.__dict__
    replaced: Mapping[str, Any] = held.get(REPLACED, {})
    if not replaced and not any(name in held for name in _LEFT_OUT):
        return held
    kept = {name: value for name, value in held.items() if name not in _LEFT_OUT}
    for name, value in replaced.items():
        kept.pop(name, None)
        if value is not _MISSING:
            kept[name] = value
    return kept


def replace(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Set attributes of the instance that a mirror of it, and a copy, leave out."""
    held = module.__dict__
    before = {name: held.get(name, _MISSING) for name in attributes}
    held[REPLACED] = {**before, **held.get(REPLACED, {})}
    held.update(attributes)


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model, but those within parts that were compiled on their own."""
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        yield module
        for part in module.children():
            apart = part.__dict__.get("popc_plan") is not model.__dict__.get("popc_plan")
            if id(part) not in seen and not (REPLACED in part.__dict__ and apart):
                seen.add(id(part))
                stack.append(part)


def _empty_copy(module: nn.Module) -> nn.Module | None:
    """An object of the same class, past ``__init__`` and ``__new__``: what the class does there was
    done for the original. None of one that is more than a Python object."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        return object.__new__(type(module))
    except TypeError:
        return None


def _slots(module: nn.Module) -> list[str]:
    """Names of what the module holds in slots."""
    named = [vars(cls).get("__slots__", ()) for cls in type(module).__mro__]
    flat = [name for names in named for name in ([names] if isinstance(names, str) else names)]
    return [
        name for name in flat if name not in ("__dict__", "__weakref__") and hasattr(module, name)
    ]


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two hooks are the same function over the same values."""
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(other, "__code__", None):
        return False
    cells = zip(one.__closure__ or (), other.__closure__ or (), strict=True)
    try:
        return all(_is_equal(a.cell_contents, b.cell_contents) for a, b in cells)
    except ValueError:  # a cell that is not filled yet
        return False


def _is_equal(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, types.FunctionType):
        return _is_alike(one, other)
    return isinstance(one, str | int | float | bool) and one == other


def _registries(held: Mapping[str, Any]) -> list[str]:
    """Names of the dicts that nn.Module itself keeps: parameters, buffers, submodules, hooks."""
    return [name for name in _OWN if isinstance(held.get(name), dict)]


_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


_SETS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, set))
_HOOKS = tuple(name for name in sorted(_OWN) if "forward" in name and "hooks" in name)


def _snapshot(held: Mapping[str, Any]) -> dict[str, Any]:
    before = dict(held)
    before.update((name, _Registry(held[name])) for name in _registries(held))
    sets = ((name, value) for name, value in held.items() if isinstance(value, set))
    before.update((name, frozenset(value)) for name, value in sets if name in _SETS)
    return before


def _is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """By identity: tensors must not be compared."""
    if len(before) != len(now):
        return False
    for name, value in now.items():
        known = before.get(name, _MISSING)
        if known is value or (isinstance(known, frozenset) and known == value):
            continue
        if not isinstance(known, _Registry) or not isinstance(value, dict):
            return False
        if len(known.items) != len(value):
            return False
        if value and any(known.items.get(k, _MISSING) is not v for k, v in value.items()):
            return False
    return True


def _mapped_items(items: Mapping[Any, Any], change: Callable[[Any], Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = OrderedDict() if isinstance(items, OrderedDict) else {}
    made.update((key, change(value)) for key, value in items.items())
    return made
