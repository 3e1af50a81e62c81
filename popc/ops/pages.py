"""Advice to the kernel on the memory of weights; it never changes a value.

Each returns whether it was done: elsewhere than on Linux, or where the kernel does not want to, all
stays as it is.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_HUGE = 2 << 20
_MADV_PAGEOUT = 21  # Linux 5.4 and later
_MADV_COLLAPSE = 25  # Linux 6.1 and later


def collapse(weight: Tensor) -> bool:
    """Hold the memory of ``weight`` in huge pages, where it has whole ones.

    Gathers of 4 KB rows were seen to run 9 % faster: each row is elsewhere, and so is its page's
    entry.
    """
    return _advise(weight, _HUGE, _MADV_COLLAPSE)


def page_out(weight: Tensor) -> bool:
    """Release the pages of ``weight``: a file's are read again if anybody asks for them.

    A model that was loaded from safetensors is mapped, and its pages count as the process's own
    for as long as the file is, whether or not a tensor is still there.
    """
    return _advise(weight, mmap.PAGESIZE, _MADV_PAGEOUT)


def _advise(weight: Tensor, page: int, advice: int) -> bool:
    storage = weight.untyped_storage()
    start = -(-storage.data_ptr() // page) * page
    size = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if sys.platform != "linux" or weight.device.type != "cpu" or size <= 0:
        return False
    advise = ctypes.CDLL(None).madvise
    return advise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice) == 0
