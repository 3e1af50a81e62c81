"""One gated FFN, alone: ``x + down(silu(gate y) * up y)`` with ``y = norm(x)``.

Steps run through as many blocks as exceed the last-level cache several times, so weights come from
memory, as they do in a model.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from popc import compat, sessions
from popc.analysis.plan import Plan
from popc.backend import popc_backend
from popc.bench.decode import COMPILED, EAGER, check_pruned, name_of
from popc.bench.machine import last_level_cache
from popc.bench.models import fill
from popc.bench.rates import WARMING, Progress, interleaved, wait
from popc.bench.reads import channels_read, counting
from popc.bench.results import Run, Spread, runs_of, step_bytes
from popc.bench.settings import DTYPES, Settings
from popc.config import Config

PROMPT = 64  # tokens that the partition is made from
WEIGHTS = 512 << 20  # bytes of all blocks, at least
FEWEST, MOST = 8, 64  # blocks


@dataclass(frozen=True)
class Shape:
    """D and F of an FFN: gate and up ``[F, D]``, down ``[D, F]``."""

    hidden: int = 2048
    channels: int = 5632

    def __str__(self) -> str:
        return f"FFN D={self.hidden} F={self.channels}"


class Block(nn.Module):
    """An FFN as it is in a model, with norm and residual: without, values would explode."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden, elementwise_affine=False)
        self.gate = nn.Linear(shape.hidden, shape.channels, bias=False)
        self.up = nn.Linear(shape.hidden, shape.channels, bias=False)
        self.down = nn.Linear(shape.channels, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to the same."""
        y = self.norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def build_blocks(shape: Shape, settings: Settings) -> nn.Sequential:
    """``settings.layers`` blocks, or as many as exceed the cache, with random weights."""
    each = 3 * shape.hidden * shape.channels * DTYPES[settings.dtype].itemsize
    wanted = -(-max(WEIGHTS, 4 * last_level_cache()) // each)
    count = settings.layers or min(max(wanted, FEWEST), MOST)
    with torch.device("meta"):
        blocks = nn.Sequential(*(Block(shape) for _ in range(count)))
    blocks = blocks.to(DTYPES[settings.dtype]).to_empty(device=settings.device)
    fill(blocks)
    return blocks.eval()


def ffn_steps(settings: Settings) -> int:
    """How often :func:`ffn` calls ``progress``."""
    ways = 2 + len(settings.policies) * len(settings.sparsity)
    return len(settings.batch) * (len(settings.policies) + ways * (1 + settings.rounds))


@torch.no_grad()
def ffn(
    shape: Shape, settings: Settings, bandwidth: Spread, progress: Progress
) -> tuple[list[Run], nn.Sequential]:
    """Every way to run the blocks, at every batch size; and the blocks.

    A run's seconds and bytes are those of one block. There is no cache, so a session is set
    around the calls, where a model's cache would identify it.
    """
    dense = build_blocks(shape, settings)
    # Each policy stores weights in its own layout.
    blocks = {policy: build_blocks(shape, settings) for policy in settings.policies}
    runs = []
    for batch in settings.batch:
        torch.compiler.reset()
        runs += _ffn_at(dense, blocks, shape, settings, bandwidth, progress, batch)
    return runs, dense


def _ffn_at(
    dense: nn.Sequential,
    blocks: Mapping[str, nn.Sequential],
    shape: Shape,
    settings: Settings,
    bandwidth: Spread,
    progress: Progress,
    batch: int,
) -> list[Run]:
    prompt, x = (_random(batch, count, shape, settings) for count in (PROMPT, 1))
    configs = {name_of(config): config for config in settings.configs()}
    plans = {name: Plan() for name in configs}
    # What prunes nothing leaves weights as they are.
    owners = {n: blocks[c.policy_name] if c.sparsity else dense for n, c in configs.items()}
    pruned = {
        name: compat.compile_alone(
            owners[name].forward,
            functools.partial(popc_backend, config=config, on_plan=plans[name].extend),
        )
        for name, config in configs.items()
    }
    by_policy = {}
    for policy in settings.policies:
        progress(f"batch {batch}: compiling the prefill")
        by_policy[policy] = _prefilled(policy, configs, pruned, prompt)
    forwards: dict[str, Callable[[Tensor], Tensor]]
    forwards = {EAGER: dense.forward, COMPILED: settings.compiled(dense.forward), **pruned}

    def seconds(name: str, times: int) -> float:
        """Of one block."""
        forward = forwards[name]
        with sessions.use(
            by_policy[configs[name].policy_name if name in configs else settings.policies[0]]
        ):
            wait(x.device)
            start = time.perf_counter()
            for _ in range(times):
                forward(x)
            wait(x.device)
        return (time.perf_counter() - start) / times / len(dense)

    reads = {}
    for name in forwards:
        progress(f"batch {batch}: compiling {name}")
        seconds(name, WARMING)
        if name in configs:
            session = by_policy[configs[name].policy_name]
            reads[name] = _reads(owners[name], configs[name], plans[name], session, x)
    turns = {name: lambda name=name: seconds(name, settings.tokens) for name in forwards}
    rounds = interleaved(turns, settings.rounds, lambda name: progress(f"batch {batch}: {name}"))
    ways: dict[str, Config | None] = {name: configs.get(name) for name in forwards}
    whole = next(iter(plans.values()))
    read = {
        name: step_bytes(dense, plans.get(name, whole), config, batch, reads=reads.get(name))
        for name, config in ways.items()
    }
    each = {name: amount.each(len(dense)) for name, amount in read.items()}
    return runs_of(ways, rounds, each, bandwidth, batch)


def _prefilled(
    policy: str,
    configs: Mapping[str, Config],
    compiled: Mapping[str, Callable[[Tensor], Tensor]],
    prompt: Tensor,
) -> sessions.Session:
    """A session with ``prompt [B, T, D]`` prefilled, by the sparsest of the policy's ways."""
    ours = [name for name, config in configs.items() if config.policy_name == policy]
    most = max(ours, key=lambda name: configs[name].sparsity)
    session = sessions.Session()
    with sessions.use(session):
        compiled[most](prompt)
    return session


def _reads(
    owner: nn.Module, config: Config, plan: Plan, session: sessions.Session, x: Tensor
) -> Mapping[Hashable, Sequence[float]]:
    """The channels that decode steps of ``x [B, 1, D]`` read, by the key of their group.

    Raises:
        ModelError: nothing was pruned.
    """
    check_pruned(plan, config, session)
    backend = functools.partial(popc_backend, config=counting(config))
    forward = compat.compile_alone(owner.forward, backend)
    with sessions.use(session):
        return channels_read(plan, config, session, forward, x)


def _random(batch: int, tokens: int, shape: Shape, settings: Settings) -> Tensor:
    """``[batch, tokens, D]``; the same values each time."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, shape.hidden, generator=generator)
    return x.to(settings.device, DTYPES[settings.dtype])
