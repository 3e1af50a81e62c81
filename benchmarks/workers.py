"""An engine in a process of its own: it shares no threads and no memory with the others."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import Engine, Spec, Task, engine_of
from popc.errors import ModelError


class Worker:
    """Calls an engine's methods in another process, which waits in between.

    Attributes:
        memory: bytes that the process had in memory once the engine was built and warm.
        empty: the same before, with everything imported.

    Raises:
        ModelError: the engine could not be built; the message holds its last line.
    """

    def __init__(self, spec: Spec, task: Task) -> None:
        self.name = spec.name
        # What a fork inherits of torch's thread pools does not work; and not all systems fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        environment = {
            "OMP_NUM_THREADS": str(task.threads),
            # Else Inductor keeps a pool of idle processes beside each engine.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._process = context.Process(target=_serve, args=(theirs, spec, task), daemon=True)
            self._process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        self.empty, self.memory = self._receive()

    def call(self, method: str, *args: Any) -> Any:
        """The result of one of the engine's methods.

        Raises:
            ModelError: it failed.
        """
        try:
            self._connection.send((method, args))
        except BrokenPipeError:
            raise self._ended() from None
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self) -> Any:
        try:
            result, error = self._connection.recv()
        except EOFError:
            raise self._ended() from None
        if error is not None:
            raise ModelError(f"{self.name}: {error}")
        return result

    def _ended(self) -> ModelError:
        self._process.join()
        return ModelError(f"{self.name}: exit code {self._process.exitcode}")


def _serve(connection: Connection, spec: Spec, task: Task) -> None:
    """Build the engine, and call its methods until the other end closes."""
    torch.set_num_threads(task.threads)
    torch.set_grad_enabled(False)
    engine: Engine | None = None

    def build() -> tuple[int, int]:
        nonlocal engine
        empty = resident()
        engine = engine_of(spec, task)
        gc.collect()
        return empty, resident()

    call: Any = build
    args: tuple[Any, ...] = ()
    while True:
        try:
            connection.send((call(*args), None))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            connection.send((None, f"{type(error).__name__} in {place}: {error}"))
        try:
            method, args = connection.recv()
        except EOFError:
            return
        call = getattr(engine, method)


def resident() -> int:
    """Bytes that this process has in memory, mapped files included; 0 where that isn't known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
