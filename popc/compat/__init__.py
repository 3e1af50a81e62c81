"""Every private API of torch that popc uses, and what differs between versions of transformers.

No other module of popc names one, which ``tests/test_imports.py`` holds; ``tests/test_compat.py``
has a canary for each, which says what breaks without it. Each docstring says why nothing public
serves, and for which versions of torch where that is not all of 2.11 - 2.13, on which this was seen
working. What all of popc reads is an op's ``_schema``: nothing public tells its arguments and
aliases.
"""

from __future__ import annotations

from popc.compat.codegen import (
    inductor,
    inductor_cache,
    is_held_by_module,
    keep_inputs,
    load_cpp,
    mode_options,
)
from popc.compat.dynamo import (
    RECOMPILE_LIMIT,
    breaks_off,
    breaks_since,
    call_compiled,
    compile_alone,
    graph_break,
    graph_breaks,
    is_for_dynamo,
    mark_dynamic,
    running,
    traces_for,
)
from popc.compat.eager import (
    COMPILED_CALL,
    OpOverload,
    grouped_mm,
    is_traceable_wrapper_subclass,
    no_torch_function,
    overloads,
    pytree,
    storage_users,
    wrapper_subclass,
    writes_to,
)
from popc.compat.fake import (
    dynamo_fake_mode,
    fakify,
    is_trace_only,
    is_whole,
    new_fake_mode,
    record_whole,
    take_new_parameters,
    take_new_strides,
)
from popc.compat.guards import Place, guard_condition, guard_place, written_places
from popc.compat.transformers import cache_keyword, grouped_mm_fallback, marked_prefill

__all__ = [
    "COMPILED_CALL",
    "RECOMPILE_LIMIT",
    "OpOverload",
    "Place",
    "breaks_off",
    "breaks_since",
    "cache_keyword",
    "call_compiled",
    "compile_alone",
    "dynamo_fake_mode",
    "fakify",
    "graph_break",
    "graph_breaks",
    "grouped_mm",
    "grouped_mm_fallback",
    "guard_condition",
    "guard_place",
    "inductor",
    "inductor_cache",
    "is_for_dynamo",
    "is_held_by_module",
    "is_trace_only",
    "is_traceable_wrapper_subclass",
    "is_whole",
    "keep_inputs",
    "load_cpp",
    "mark_dynamic",
    "marked_prefill",
    "mode_options",
    "new_fake_mode",
    "no_torch_function",
    "overloads",
    "pytree",
    "record_whole",
    "running",
    "storage_users",
    "take_new_parameters",
    "take_new_strides",
    "traces_for",
    "wrapper_subclass",
    "writes_to",
    "written_places",
]
