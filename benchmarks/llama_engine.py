"""llama.cpp as an engine of :mod:`benchmarks.engines`, through its C interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engines import Task
from benchmarks.llama_files import llama_cpp
from benchmarks.scores import Scores
from benchmarks.stored import Stored, stored_in
from popc.errors import ModelError

CACHED = 2  # bytes of a key's or a value's element: llama.cpp keeps them as float16


class LlamaCpp:
    """A GGUF file in llama.cpp. Between two steps Python takes the argmax, and no more."""

    def __init__(self, file: Path, task: Task) -> None:
        self.file, self.task = file, task
        self.api = llama_cpp()
        self.api.llama_backend_init()
        options = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise ModelError(f"llama.cpp can't load {file.name}")
        vocabulary = self.api.llama_model_get_vocab(self.model)
        self.tokens = self.api.llama_vocab_n_tokens(vocabulary)
        room = max(task.short.shape[1] + task.tokens, task.long.shape[1])
        self.context = self._context(room)
        self.memory = self.api.llama_get_memory(self.context)
        self.first: int | None = None  # token after the short prompt, while that is in memory
        self.prefill()
        self.decode()

    def _context(self, room: int) -> Any:
        options = self.api.llama_context_default_params()
        options.n_ctx = options.n_batch = room
        options.n_threads = options.n_threads_batch = self.task.threads
        return self.api.llama_init_from_model(self.model, options)

    def decode(self) -> float:
        """Seconds of the steps, after the short prompt."""
        if self.first is None:
            self.api.llama_memory_clear(self.memory, True)
            self.first = self._next(self.task.short[0].tolist())
        self.api.llama_memory_seq_rm(self.memory, 0, self.task.short.shape[1], -1)
        token = self.first
        start = time.perf_counter()
        for _ in range(self.task.tokens):
            token = self._next([token])
        return time.perf_counter() - start

    def prefill(self) -> float:
        """Seconds of the long prompt, in a cache that was emptied."""
        self.first = None
        self.api.llama_memory_clear(self.memory, True)
        ids = self.task.long[0].tolist()
        start = time.perf_counter()
        self._next(ids)
        return time.perf_counter() - start

    def _next(self, ids: Sequence[int]) -> int:
        """The most likely token after ``ids``, which are added to what is in memory."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        self._run(self.api.llama_batch_get_one(tokens, len(ids)))
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.tokens,)).argmax())

    def _run(self, batch: Any) -> None:
        if self.api.llama_decode(self.context, batch):
            raise ModelError(f"llama.cpp failed to run {self.file.name}")

    def logits(self, window: Tensor, prompt: int) -> Tensor:
        """Float32 logits ``[T - prompt, V]`` of all tokens of ``window`` but the prompt's."""
        self.first = None
        self.api.llama_memory_clear(self.memory, True)
        count = len(window)
        batch = self.api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for at, token in enumerate(window.tolist()):
            batch.token[at], batch.pos[at] = token, at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = prompt - 1 <= at < count - 1
        try:
            self._run(batch)
        finally:
            self.api.llama_batch_free(batch)
        rows = self.api.llama_get_logits(self.context)
        shape = (count - prompt, self.tokens)
        return torch.from_numpy(np.ctypeslib.as_array(rows, shape).copy())

    def scores(self, windows: Tensor, prompt: int) -> tuple[Scores, float]:
        """Each window in one call; and 1, as everything is read."""
        longest = windows.shape[1]
        if longest > self.api.llama_n_batch(self.context):
            self.api.llama_free(self.context)
            self.context = self._context(longest)
            self.memory = self.api.llama_get_memory(self.context)
        return Scores.of(windows, prompt, self.logits), 1.0

    def stored(self) -> Stored:
        """What the file's weights take."""
        return stored_in(self.file)

    def share_read(self) -> float:
        """1: everything is read."""
        return 1.0

    def cached(self) -> int:
        """Bytes of keys and values at the last step."""
        heads = self.api.llama_model_n_head_kv(self.model)
        size = self.api.llama_model_n_embd(self.model) // self.api.llama_model_n_head(self.model)
        layers = self.api.llama_model_n_layer(self.model)
        return 2 * CACHED * layers * heads * size * (self.task.short.shape[1] + self.task.tokens)
