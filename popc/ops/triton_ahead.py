"""The Triton kernels compiled for a GPU that need not be there.

To see, on any machine, that they compile, and into what. Importing this needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    GPUTarget,
)
from triton.compiler import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    ASTSource,
)
from triton.compiler import compile as compile_kernel

from popc.ops import triton_planes
from popc.ops.planes import GROUP_ZERO, ZERO
from popc.ops.triton_gather import BLOCK_M
from popc.ops.triton_kernels import gather_columns, gather_kernel, gather_rows
from popc.ops.triton_plane_kernels import by_input, by_output, values_kernel

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OF_THRESHOLDS = ("norm", "threshold", "center", "base")
_USUAL = (torch.bfloat16, torch.float32)


def cubins(capability: int, dtypes: Iterable[torch.dtype] = _USUAL) -> dict[str, bytes]:
    """The binaries of :func:`compile_ahead`."""
    return {name: made["cubin"] for name, made in compile_ahead(capability, dtypes).items()}


def compile_ahead(
    capability: int, dtypes: Iterable[torch.dtype] = _USUAL, every_config: bool = False
) -> dict[str, Mapping[str, Any]]:
    """Compile the kernels for an NVIDIA GPU of ``capability`` 80, 90, ...

    Returned is what Triton made (``"ptx"``, ``"cubin"``, ...), by tiling, form, tokens at once,
    dtype and blocks: with the first config of each tiling, or with every one.
    """
    target = GPUTarget("cuda", capability, 32)
    made = {}
    for kernel, tiling in ((gather_rows, "rows"), (gather_columns, "columns")):
        configs = kernel.configs if every_config else kernel.configs[:1]
        forms = [("linear", 1), ("linear", BLOCK_M), ("experts", 1)]
        forms += [("threshold", 1), ("threshold", BLOCK_M)]
        for (form, block), dtype, config in product(forms, dtypes, configs):
            source = _source(tiling, form, block, _TYPES[dtype], config.kwargs)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            sizes = "x".join(map(str, config.kwargs.values()))
            binary = compile_kernel(source, target=target, options=options)
            made[f"{tiling} {form} {block} {_TYPES[dtype]} {sizes}"] = binary.asm
    return made


def compile_planes_ahead(
    capability: int, dtypes: Iterable[torch.dtype] = _USUAL, every_config: bool = False
) -> dict[str, Mapping[str, Any]]:
    """The kernels on quantised weights likewise, by form, planes, tokens at once, dtype and blocks.

    ``apart``: with a float32 scale for each output and 128 inputs, else with scales in rows.
    """
    target = GPUTarget("cuda", capability, 32)
    made = {}
    forms = {"graded": by_input, "by_input": by_input, "apart": by_input, "by_output": by_output}
    for form, planes, block, dtype in product(forms, (2, 1), (1, BLOCK_M), dtypes):
        configs = forms[form].configs if every_config else forms[form].configs[:1]
        for config in configs:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            constants = {"BLOCK_M": block, **config.kwargs}
            source = _planes_source(forms[form].fn, form, planes, _TYPES[dtype], constants)
            binary = compile_kernel(source, target=target, options=options)
            sizes = "x".join(map(str, config.kwargs.values()))
            made[f"{form} {planes} {block} {_TYPES[dtype]} {sizes}"] = binary.asm
    for by_rows, dtype in product((True, False), dtypes):
        constants = {"BY_INPUT": by_rows, **triton_planes.VALUES_BLOCK}
        source = _planes_source(values_kernel, "values", 2, _TYPES[dtype], constants)
        binary = compile_kernel(source, target=target)
        made[f"values {'by_input' if by_rows else 'by_output'} {_TYPES[dtype]}"] = binary.asm
    return made


def _planes_source(
    kernel: Any, form: str, planes: int, dtype: str, constants: dict[str, Any]
) -> ASTSource:
    """The kernel as a model calls it, whose sizes are multiples of 512."""
    apart, graded = form == "apart", form == "graded"
    names = kernel.arg_names
    fixed: dict[str, Any] = {"PLANES": planes, "UNIT": 16, "SPLITS": 8, **constants}
    fixed["ZERO"] = (GROUP_ZERO if apart else ZERO)[planes]
    fixed["GROUP"] = 128 if apart else triton_planes.ALL
    absent = [] if apart else ["scale", "zero"]
    absent += [] if graded else ["norm", "low_norm", "threshold", "center", "base"]
    fixed |= dict.fromkeys(absent)
    fixed = {name: value for name, value in fixed.items() if name in names}
    types = dict.fromkeys(("x", "bias"), f"*{dtype}")
    types |= dict.fromkeys((*_OF_THRESHOLDS, "low_norm", "scale", "zero"), "*fp32")
    types |= {"packed": "*u8", "y": "*fp32" if "SPLITS" in fixed else f"*{dtype}"}
    signature = {a: "constexpr" if a in fixed else types.get(a, "i32") for a in names}
    odd = ("tokens", "per_sequence", "row_units")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(names)
        if a not in fixed and a not in odd
    }
    return ASTSource(kernel, signature, fixed, aligned)


def _source(tiling: str, form: str, block: int, dtype: str, blocks: dict[str, int]) -> ASTSource:
    """The kernel as a model calls it, with the list and the strides that the tiling is for."""
    rows = tiling == "rows"
    constants: dict[str, int | None] = {"SPLITS": 1 if rows else 8, "BLOCK_M": block, **blocks}
    constants |= {"x_input": 1, "weight_input" if rows else "weight_output": 1}
    absent = ["bias"] if form == "experts" else ["expert", "full"]
    absent += (
        ["rows", "columns"] if form == "threshold" else ["norm", "threshold", "center", "base"]
    )
    constants |= dict.fromkeys([*absent, "columns" if rows else "rows"])
    types = dict.fromkeys(("x", "weight", "bias"), f"*{dtype}")
    types |= dict.fromkeys(("rows", "columns", "expert", "full"), "*i64")
    types |= dict.fromkeys(_OF_THRESHOLDS, "*fp32")
    types["y"] = f"*{dtype}" if rows else "*fp32"
    names = gather_kernel.arg_names
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in names}
    # Lists may be slices, and as long as they please.
    odd = ("rows", "columns", "tokens", "listed_rows" if rows else "listed_columns")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(names)
        if a not in constants and a not in odd
    }
    return ASTSource(gather_kernel, signature, constants, aligned)
