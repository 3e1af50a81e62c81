"""A mirror of a model: modules of its own that share the model's parameters and buffers.

What is set on a mirror (an attribute, a submodule, a hook, train or eval mode) is read by its own
``forward`` and leaves the original as it is. What is set on the original later is set on the mirror
by :meth:`Mirror.follow`. Weights are never copied.
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

REPLACED = "_popc_replaced"  # where a compiled module keeps the attributes that popc replaced
_MISSING = object()
_CONTAINERS = (dict, list, tuple)
_DEPTH = 4  # how deep containers within containers are searched for modules
# Bound to one module, so nn.Module itself does not copy the first either.
_NOT_COPIED = (COMPILED_CALL, REPLACED)


class Mirror:
    """Copies of all modules of ``model``, in the same structure.

    Attributes:
        root: the copy of ``model``, of the same class.
    """

    def __init__(self, model: nn.Module) -> None:
        self.original = model
        self._lock = threading.Lock()
        self._copies: dict[int, nn.Module] = {}  # by the id of the original
        # These keep the originals alive, and so their ids unique.
        self._snapshots: list[tuple[nn.Module, dict[str, Any]]] = []
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
            for number, (module, before) in enumerate(self._snapshots):
                copied = self._copies[id(module)]
                if type(copied) is not type(module):  # a parametrization was added or removed
                    copied.__class__ = type(module)
                now = _attributes_of(module)
                if _is_unchanged(before, now):
                    continue
                changed = True
                self._snapshots[number] = module, _snapshot(now)
                self._replay(before, now, copied.__dict__)
            if changed:
                self._drop_removed()

    def _drop_removed(self) -> None:
        """Drop the copies of modules that the original no longer has."""
        ids = {id(module) for module in self.original.modules()}
        self._snapshots = [pair for pair in self._snapshots if id(pair[0]) in ids]
        self._copies = {id_: copied for id_, copied in self._copies.items() if id_ in ids}

    def hooks(self) -> list[tuple[nn.Module, str, Any]]:
        """The hooks of the mirror's submodules: module, kind and hook.

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

    def replace_parameter(self, parameter: torch.Tensor, other: torch.Tensor) -> bool:
        """Put ``other`` in the place of a parameter, wherever the mirror has it; whether it has."""
        found = False
        with self._lock:
            for copied in self._copies.values():
                for name, value in copied._parameters.items():
                    if value is parameter:
                        copied._parameters[name] = other  # type: ignore[assignment]
                        found = True
        return found

    def free_parameter(self, parameter: torch.Tensor, left: torch.Tensor) -> None:
        """Leave ``left`` in the original's modules where they have ``parameter``, and free that."""
        with self._lock:
            for number, (module, _) in enumerate(self._snapshots):
                names = [name for name, p in module._parameters.items() if p is parameter]
                for name in names:
                    module._parameters[name] = left  # type: ignore[assignment]
                if names:
                    self._snapshots[number] = module, _snapshot(_attributes_of(module))
            # Whoever else holds the parameter finds it empty: memory goes back now.
            if type(parameter) is nn.Parameter:
                parameter.data = parameter.data.new_empty(0)

    def _copy_tree(self, model: nn.Module) -> nn.Module:
        new = []
        for module in modules_of(model):
            copied = None if id(module) in self._copies else _empty_copy(module)
            if copied is not None:
                self._copies[id(module)] = copied
                new.append(module)
        for module in new:
            attributes = _attributes_of(module)
            self._snapshots.append((module, _snapshot(attributes)))
            target = self._copies[id(module)].__dict__
            target.update((name, self._mapped(value)) for name, value in attributes.items())
            for name in _dicts_of(attributes):
                target[name] = _mapped_items(attributes[name], self._mapped)
            target.update((name, set(attributes[name])) for name in _SETS & attributes.keys())
            for name in _slot_names(module):
                object.__setattr__(self._copies[id(module)], name, getattr(module, name))
        return self.of(model)

    def _replay(
        self, before: Mapping[str, Any], now: Mapping[str, Any], copied: dict[str, Any]
    ) -> None:
        replaced = copied.get(REPLACED, {})  # the mirror's forward stays the compiled one
        for name in before.keys() - now.keys() - replaced.keys():
            copied.pop(name, None)
        for name, value in now.items():
            old = before.get(name, _MISSING)
            if name in replaced:
                continue
            if isinstance(old, _DictSnapshot) and isinstance(value, dict):
                for key in old.items.keys() - value.keys():
                    copied[name].pop(key, None)
                for key, item in value.items():
                    if old.items.get(key, _MISSING) is not item:
                        added = [one for k, one in copied[name].items() if k not in old.items]
                        # A hook that a library installs on both at first use is not added twice.
                        if name not in _HOOKS or not any(_is_same_hook(item, one) for one in added):
                            copied[name][key] = self._copied_or_mapped(item)
                for key in [*value, *(key for key in copied[name] if key not in value)]:
                    if key in copied[name]:
                        copied[name][key] = copied[name].pop(key)  # in the original's order
            elif isinstance(old, frozenset):
                copied[name] = (copied[name] - old) | set(value)
            elif old is not value:
                copied[name] = self._copied_or_mapped(value)

    def _copied_or_mapped(self, value: Any) -> Any:
        """``value`` as it is set on the mirror; a module that is new to it is copied, but for one
        that was compiled on its own, which stays what it is."""
        if isinstance(value, nn.Module):
            return value if REPLACED in value.__dict__ else self._copy_tree(value)
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
            mapped = map(inner, value)
            return type(value)._make(mapped) if hasattr(value, "_make") else type(value)(mapped)
        copied: Any = copy.copy(value)  # keeps a subclass and its state, as a defaultdict's factory
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
                content = cell.cell_contents
            except ValueError:  # not filled yet
                return value
            mapped = self._mapped(content, depth - 1)
            cells.append(cell if mapped is content else types.CellType(mapped))
        if all(a is b for a, b in zip(cells, value.__closure__, strict=True)):
            return value
        copied = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
        )
        copied.__kwdefaults__ = value.__kwdefaults__
        vars(copied).update(vars(value))
        return copied

    def _mapped_partial(self, value: functools.partial[Any]) -> functools.partial[Any]:
        """As Accelerate's hooks have it: ``module.forward = partial(new_forward, module)``."""
        parts = value.func, value.args, value.keywords
        function, args, keywords = map(self._mapped, parts)
        if function is value.func and args is value.args and keywords is value.keywords:
            return value
        copied = functools.partial(function, *args, **keywords)
        vars(copied).update({name: self._mapped(item) for name, item in vars(value).items()})
        return copied


class _DictSnapshot:
    """The items of a dict of nn.Module's, such as ``_parameters``, at one time."""

    __slots__ = ("items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self.items = dict(items)


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """The module's attributes; of a compiled one, those that it had before."""
    attributes = module.__dict__
    replaced: Mapping[str, Any] = attributes.get(REPLACED, {})
    if not replaced and not any(name in attributes for name in _NOT_COPIED):
        return attributes
    plain = {name: value for name, value in attributes.items() if name not in _NOT_COPIED}
    for name, value in replaced.items():
        plain.pop(name, None)
        if value is not _MISSING:
            plain[name] = value
    return plain


def replace(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Set attributes of the instance that mirrors and copies of it do not take over."""
    instance = module.__dict__
    before = {name: instance.get(name, _MISSING) for name in attributes}
    instance[REPLACED] = {**before, **instance.get(REPLACED, {})}
    instance.update(attributes)


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model, but those within parts that were compiled on their own."""
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        yield module
        for part in module.children():
            compiled_alone = part.__dict__.get("popc_plan") is not model.__dict__.get("popc_plan")
            if id(part) not in seen and not (REPLACED in part.__dict__ and compiled_alone):
                seen.add(id(part))
                stack.append(part)


def _empty_copy(module: nn.Module) -> nn.Module | None:
    """An object of the same class, without its ``__init__`` and ``__new__``, which ran for the
    original. None for a class that is not plain Python."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        return object.__new__(type(module))
    except TypeError:
        return None


def _slot_names(module: nn.Module) -> list[str]:
    """Names of the slots that are set."""
    named = [vars(cls).get("__slots__", ()) for cls in type(module).__mro__]
    flat = [name for names in named for name in ([names] if isinstance(names, str) else names)]
    return [
        name for name in flat if name not in ("__dict__", "__weakref__") and hasattr(module, name)
    ]


def _is_same_hook(one: Any, other: Any) -> bool:
    """Whether two hooks are the same function over the same values."""
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(other, "__code__", None):
        return False
    cells = zip(one.__closure__ or (), other.__closure__ or (), strict=True)
    try:
        return all(_is_same_value(a.cell_contents, b.cell_contents) for a, b in cells)
    except ValueError:  # a cell that is not filled yet
        return False


def _is_same_value(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, types.FunctionType):
        return _is_same_hook(one, other)
    return isinstance(one, str | int | float | bool) and one == other


def _dicts_of(attributes: Mapping[str, Any]) -> list[str]:
    """Names of the dicts that nn.Module itself keeps: parameters, buffers, submodules, hooks."""
    return [name for name in _DICTS if isinstance(attributes.get(name), dict)]


_DICTS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


_SETS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, set))
_HOOKS = tuple(name for name in sorted(_DICTS) if "forward" in name and "hooks" in name)


def _snapshot(attributes: Mapping[str, Any]) -> dict[str, Any]:
    snapshot = dict(attributes)
    snapshot.update((name, _DictSnapshot(attributes[name])) for name in _dicts_of(attributes))
    sets = ((name, value) for name, value in attributes.items() if isinstance(value, set))
    snapshot.update((name, frozenset(value)) for name, value in sets if name in _SETS)
    return snapshot


def _is_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """By identity: tensors must not be compared."""
    if len(before) != len(now):
        return False
    for name, value in now.items():
        old = before.get(name, _MISSING)
        if old is value or (isinstance(old, frozenset) and old == value):
            continue
        if not isinstance(old, _DictSnapshot) or not isinstance(value, dict):
            return False
        if len(old.items) != len(value):
            return False
        if value and any(old.items.get(k, _MISSING) is not v for k, v in value.items()):
            return False
    return True


def _mapped_items(items: Mapping[Any, Any], function: Callable[[Any], Any]) -> dict[Any, Any]:
    mapped: dict[Any, Any] = OrderedDict() if isinstance(items, OrderedDict) else {}
    mapped.update((key, function(value)) for key, value in items.items())
    return mapped
