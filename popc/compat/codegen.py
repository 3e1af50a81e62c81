"""Inductor: what ``torch.compile`` calls to generate code, and which inputs have fixed addresses.

Seen working on torch 2.11 - 2.13.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx


def inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], tag: str = ""
) -> Callable[..., Any]:
    """Inductor's ``compile_fx``, the entry that ``torch.compile`` itself calls.

    ``torch._inductor.compile`` is documented, but takes no fake inputs with symbolic shapes.

    Args:
        tag: what generated code is kept for; under another tag it is not found again.
    """
    tag = torch.compiler.config.cache_key_tag + tag
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(  # type: ignore[return-value]
            gm, list(inputs), config_patches=dict(options) or None
        )


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a mode of ``torch.compile`` is to Inductor. Documented, but in a private module."""
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def load_cpp(source: str) -> str:
    """Build C++ that registers ops as Inductor builds its own, and load it; the library's path.

    ``torch.utils.cpp_extension`` is public, but needs ninja, does not know this machine's vector
    instructions, and builds in a second cache.
    """
    from torch._inductor.codecache import CppCodeCache

    return str(CppCodeCache.load(source)._name)


def inductor_cache() -> str:
    """The folder in which Inductor keeps what it builds; private because nothing public tells."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def keep_inputs(
    gm: fx.GraphModule, original: fx.GraphModule, written: Callable[[fx.Node], bool]
) -> None:
    """Copy to the inputs of ``gm`` what Dynamo noted on those of ``original``, its first trace.

    That is where they come from, and which are at fixed addresses, as parameters and static caches
    are: CUDA graphs copy all others at each call, and are not used at all where one of those is
    written to. AOTAutograd takes it from attributes that nothing public sets, so they must be
    copied to a graph that was traced again.

    Args:
        gm: its inputs are those of ``original``, in their order, then others.
        written: whether an input is written to. Such a one counts as at a fixed address: a
            static cache that was allocated in a compiled prefill is not marked as one. At another
            address, CUDA graphs are recorded anew.
    """
    from torch._dynamo.source import ConstantSource

    originals = original.graph.find_nodes(op="placeholder")
    if "dynamo_compile_id" not in original.meta or not all(map(_has_source, originals)):
        return
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, source in itertools.zip_longest(placeholders, originals):
        node._dynamo_source = getattr(source, "_dynamo_source", None)
        recorded = {} if source is None else source.meta.get("tensor_dict", {})
        fixed = {"_dynamo_static_input_type": "unguarded"} if written(node) else {}
        node.meta["tensor_dict"] = {**recorded, **fixed}
    names = (name for name, _ in (*gm.named_parameters(), *gm.named_buffers()))
    gm._param_name_to_source = {name: ConstantSource(name) for name in names}  # type: ignore[assignment]
    gm.meta["dynamo_compile_id"] = original.meta["dynamo_compile_id"]


def _has_source(node: fx.Node) -> bool:
    return hasattr(node, "_dynamo_source")


def is_held_by_module(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a parameter or a buffer of the model. Private because
    nothing public tells the two from inputs of a call."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})
