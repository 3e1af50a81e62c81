"""A process of its own that builds a model and runs it, with a compiler that has compiled nothing.

``python -m popc.bench.cold dense SETTINGS`` prints a :class:`Start` as JSON; :func:`cold_start`
runs that.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from popc.bench.decode import COMPILED, dense_ways, pruned_way, random_prompt
from popc.bench.models import build
from popc.bench.rates import Context, Stopwatch, wait
from popc.bench.results import Start
from popc.bench.settings import Settings
from popc.errors import ModelError
from popc.ops import native

WAYS = ("dense", "popc")
COMPILING = 2  # decode calls that count as compilation
RUNNING = 8  # decode calls that memory is then watched over
HERE = Path(__file__).parents[2]


def cold_start(way: str, settings: Settings) -> Start:
    """Run ``way``, one of :data:`WAYS`, in a new process with empty caches of compiled code.

    Raises:
        ModelError: the process failed; the message holds its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        if settings.codegen != "inductor":
            caches = {}  # only popc's own kernels are compiled
        done = subprocess.run(
            [sys.executable, "-m", "popc.bench.cold", way, settings.to_json()],
            capture_output=True,
            text=True,
            env={**os.environ, **caches, "PYTHONPATH": path},
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(f"a cold start of {way} failed: {last}")
    return Start(**json.loads(lines[-1]))


@torch.no_grad()
def start(way: str, settings: Settings) -> Start:
    """What :func:`cold_start` measures, in this process."""
    model = build(settings)
    settings.compiled(torch.sin)(torch.ones(64, device=settings.device))  # finds the tool chain
    begin = time.perf_counter()
    if way == "popc" and not settings.cuda:
        native.load()
    kernels = time.perf_counter() - begin
    if way == "popc":
        forward = pruned_way(model, settings.most_pruned).forward
    else:
        forward = dense_ways(model, settings)[COMPILED].forward
    prompt = random_prompt(model, 1, min(settings.context), settings.device)
    watch = Stopwatch()

    @functools.wraps(forward)
    def whole(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        wait(prompt.device)
        return out

    def context() -> Context:
        return Context(model.config, prompt, RUNNING, watch.timed(whole), allocate=model.forward)

    filled = context()
    prefill = watch.seconds
    decode, _ = filled.decode(forward, COMPILING)
    peak = _peak(settings)
    watched = _forget_peak(settings)
    context().decode(forward, RUNNING)
    return Start(kernels, prefill, decode, peak, _peak(settings) if watched else None)


def _peak(settings: Settings) -> int:
    """The most bytes in use so far: of the CUDA device, else of this process's memory."""
    if settings.cuda:
        return torch.cuda.max_memory_allocated()
    status = _status("VmHWM")
    if status is not None:
        return status
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _forget_peak(settings: Settings) -> bool:
    """Let the peak be what is in use now, where that can be done."""
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(field: str) -> int | None:
    """Bytes of a field in /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    size = next(sizes, None)
    return int(size) << 10 if size is not None else None


if __name__ == "__main__":
    print(json.dumps(asdict(start(sys.argv[1], Settings.from_json(sys.argv[2])))))
