"""Advice to the kernel: values stay, and a mapped file's pages can go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from popc.ops.pages import collapse, page_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's madvise")


def file_pages() -> int:
    """Bytes of mapped files that this process holds in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("RssFile:"))
    return 1024 * int(line.split()[1])


def test_a_mapped_files_pages_go_and_come_back(tmp_path: Path) -> None:
    size = 16 << 20
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.arange(size // 4, dtype=torch.float32)}, path)
    weight, empty = load_file(path)["weight"], file_pages()
    assert weight.sum() > 0  # all of it is read
    before = file_pages()
    if before < empty + size // 2:
        pytest.skip("this folder's files are not mapped as files: it is in memory")
    assert page_out(weight)
    assert file_pages() < before - size // 2
    assert torch.equal(weight, torch.arange(size // 4, dtype=torch.float32))


@pytest.mark.parametrize("advise", [collapse, page_out])
def test_values_and_addresses_stay(advise) -> None:
    tensor = torch.arange(4 << 20, dtype=torch.float32)
    where, expected = tensor.data_ptr(), tensor.clone()
    advise(tensor)
    assert tensor.data_ptr() == where
    assert torch.equal(tensor, expected)


def test_what_has_no_page_of_its_own_is_left() -> None:
    assert not page_out(torch.ones(4))
    assert not collapse(torch.ones(4096))
    assert not page_out(torch.ones(1 << 20, device="meta"))
