"""Whole benchmarks, from settings to a result."""

from __future__ import annotations

from popc.bench import decode, extras, ffn
from popc.bench.machine import copy_bandwidth, machine
from popc.bench.models import build
from popc.bench.rates import Progress
from popc.bench.results import Result, model_of
from popc.bench.settings import Settings


def _silent(name: str) -> None:
    pass


def total_steps(settings: Settings, with_extras: bool) -> int:
    """How often :func:`bench_model` calls ``progress``."""
    return 1 + decode.steps(settings) + (extras.extra_steps(settings) if with_extras else 0)


def bench_model(
    settings: Settings, with_extras: bool = True, progress: Progress = _silent
) -> Result:
    """Decode rates of a model, dense and pruned; with extras, the overhead of pruning.

    Raises:
        ModelError: the model can't be loaded, or is not pruned.
    """
    where = machine(settings.device)
    # Before this process holds any model: they take its memory, and are timed.
    starts = extras.cold_starts(settings, progress) if with_extras else {}
    progress("copy bandwidth, and building the model")
    bandwidth = copy_bandwidth(settings.device)
    # popc changes strides of a model's weights, so the dense runs use another instance.
    dense, model = build(settings), build(settings)
    runs = decode.decode(dense, model, settings, bandwidth, progress)
    more = extras.extras(dense, model, settings, starts, progress) if with_extras else None
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    made = model_of(settings.model, dense, layers)
    return Result.of("decode", where, made, settings, bandwidth, runs, more)


def bench_ffn(shape: ffn.Shape, settings: Settings, progress: Progress = _silent) -> Result:
    """Seconds of one FFN alone, dense and pruned; ``settings.layers`` counts the blocks."""
    where = machine(settings.device)
    bandwidth = copy_bandwidth(settings.device)
    runs, blocks = ffn.ffn(shape, settings, bandwidth, progress)
    made = model_of(str(shape), blocks, len(blocks))
    return Result.of("ffn", where, made, settings, bandwidth, runs)
