"""One thread for each test process: the models are tiny, and the processes share the machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POPC_RAISE", "1")  # a pass that fails must not pass for one that refuses
# Tracing makes many small objects that live for long: a tenth of the time went to looking at them.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture
def fresh_compiler() -> None:
    """Nothing that another test had compiled."""
    import torch

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(scope="module")
def kernels() -> None:
    """The C++ kernels."""
    from popc.ops import native

    assert native.load(), "the kernels could not be built"


@pytest.fixture(scope="module")
def kernels_in_threads(kernels: None) -> Iterator[None]:
    """The same, with three threads to share the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)
