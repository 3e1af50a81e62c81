"""Where in a model a node comes from, for people: no rule reads it."""

from __future__ import annotations

import re

import torch
from torch import fx


def where(node: fx.Node) -> str:
    """The module path of ``node``, for people; falls back to the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    # Dynamo's own prefix for the root: a local variable, and the bound method's module.
    return re.sub(r"^(L\['\w+'\]\.?|L__self___?)?(__self__\.)?", "", path) or node.name


def common(names: list[str]) -> str:
    """The longest dotted path that all ``names`` share, or the first name."""
    parts = [name.split(".") for name in names]
    shared = []
    for group in zip(*parts, strict=False):
        if len(set(group)) > 1:
            break
        shared.append(group[0])
    return ".".join(shared) or names[0]


def source_of(node: fx.Node) -> str:
    """The innermost ``file:line`` of the model's own code behind ``node``."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [f for f in frames if not f[0].startswith(torch.__path__[0])]
    if not outside:
        return ""
    path, line = outside[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"
