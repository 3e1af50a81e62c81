"""Where figures were taken: the machine and its bandwidth, versions, and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from popc.bench.rates import Spread, wait
from popc.version import __version__

# Parts of the instruction set that decide which kernels run.
FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm"),
)
PACKAGES = ("torch", "transformers", "triton", "numpy")
COPIED = 256 << 20  # bytes that a bandwidth is measured on, at least


@dataclass(frozen=True)
class Machine:
    """A CPU, and the CUDA device if figures were taken on one.

    Attributes:
        cores: that this process may run on; ``threads``: that torch uses.
        flags: of :data:`FLAGS`, those that the CPU has.
        memory, cache: bytes of main memory, and of the last-level cache (0: not known).
        load: how many processes wanted a core, on average of the minute before. Figures taken
            beside other work are worth little.
        gpu, gpu_memory: name and bytes, or None.
    """

    system: str
    cpu: str
    cores: int
    threads: int
    flags: tuple[str, ...]
    memory: int
    cache: int
    load: float
    gpu: str | None
    gpu_memory: int | None


def machine(device: str = "cpu") -> Machine:
    """What this machine is, and how busy."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=name,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cache=last_level_cache(),
        load=os.getloadavg()[0],
        gpu=gpu.name if gpu else None,
        gpu_memory=gpu.total_memory if gpu else None,
    )


def last_level_cache() -> int:
    """Bytes of the first core's last-level cache; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        digits, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1:]
        if digits.isdigit():
            sizes.append(int(digits) << {"K": 10, "M": 20, "G": 30}.get(unit, 0))
    return max(sizes)


def versions() -> dict[str, str | None]:
    """Of popc, Python and the packages that decide about speed; None: not installed."""
    installed: dict[str, str | None] = {"popc": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    installed["cuda"] = torch.version.cuda
    return installed


def commit() -> str | None:
    """popc's commit, with ``-dirty`` if its files differ from it; None outside a checkout."""
    package = Path(__file__).parent.parent
    # A checkout that merely holds the environment which popc is installed in is not popc's.
    if _git(package, "ls-files", "--error-unmatch", "version.py") is None:
        return None
    head = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".")
    return f"{head}-dirty" if head and changed else head


def copy_bandwidth(device: str = "cpu", rounds: int = 9) -> Spread:
    """Bytes per second of a large copy, read and written bytes both counted.

    On a CPU a decode step, which only reads, may exceed it: what is written is first read there.
    """
    count = max(COPIED, 4 * last_level_cache())
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for number in range(rounds + 1):
        wait(source.device)
        start = time.perf_counter()
        target.copy_(source)
        wait(source.device)
        if number:  # the first touches the pages
            rates.append(2 * count / (time.perf_counter() - start))
    return Spread.of(rates)


def read_bandwidth(device: str = "cpu", rounds: int = 9) -> Spread:
    """Bytes per second of reading a large tensor, with as many threads as torch uses."""
    count = max(COPIED, 4 * last_level_cache()) // 4
    source = torch.ones(count, dtype=torch.float32, device=device)
    rates = []
    for number in range(rounds + 1):
        wait(source.device)
        start = time.perf_counter()
        source.max()
        wait(source.device)
        if number:  # the first starts threads
            rates.append(source.nbytes / (time.perf_counter() - start))
    return Spread.of(rates)


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None if it can't."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
