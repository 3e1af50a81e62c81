"""Strategies of hypothesis: models, prompts and configs, small ones first."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from popc.config import Config
from popc.testing.blocks import ACTIVATIONS, DECOYS, LAYOUTS, MLP, Attention, Decoy, Low, MoE
from popc.testing.transformer import RESIDUALS, Layer, Prompt, Transformer


def lows(*names: str) -> st.SearchStrategy[Any]:
    """Chains of two linears in place of some of the linears of these names, or beside them; or
    none, as most weights are of full rank."""
    chains = st.builds(
        Low,
        rank=st.integers(1, 6),
        beside=st.booleans(),
        scale=st.sampled_from([0.5, 1.0, 2.0]),
    )
    pairs = st.lists(
        st.tuples(st.sampled_from(names), chains), unique_by=lambda pair: pair[0], max_size=3
    )
    return st.just(()) | pairs.map(tuple)


def mlps(low: bool = True) -> st.SearchStrategy[MLP]:
    """Gated and plain, of 2 to 24 channels, with projections split, fused or interleaved.

    ``low``: some with chains of low rank, which are regions of their own.
    """
    return st.builds(
        MLP,
        channels=st.integers(2, 24),
        act=st.sampled_from(list(ACTIVATIONS)),
        gated=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        bias=st.booleans(),
        transposed=st.booleans(),
        low=lows("gate", "up", "down") if low else st.just(()),
    )


def attentions() -> st.SearchStrategy[Attention]:
    """MHA, GQA and MQA, with projections split, fused or interleaved; rotary; written out."""
    return st.builds(
        Attention,
        kv_heads=st.integers(1, 4),
        group=st.integers(1, 3),
        size=st.sampled_from([2, 4]),
        layout=st.sampled_from(LAYOUTS),
        bias=st.booleans(),
        rotary=st.booleans(),
        written=st.booleans(),
        low=lows("q", "k", "v", "qkv", "o"),
    )


def moes() -> st.SearchStrategy[MoE]:
    """2 to 4 experts in stacked weights, of which each token uses 1 or 2."""
    return st.builds(
        MoE,
        experts=st.integers(2, 4),
        top=st.integers(1, 2),
        channels=st.integers(2, 12),
        picked=st.booleans(),
    )


def decoys() -> st.SearchStrategy[Decoy]:
    """What looks like an MLP and must not be pruned."""
    return st.builds(Decoy, channels=st.integers(2, 12), how=st.sampled_from(DECOYS))


def blocks() -> st.SearchStrategy[Any]:
    """Any block: an MLP, a mixture of experts, or one that must not be pruned."""
    return st.one_of(mlps(), moes(), decoys())


def transformers(
    dtypes: tuple[str, ...] = ("float64",),
    most: int = 2,
    caches: tuple[str, ...] = ("object",),
) -> st.SearchStrategy[Transformer]:
    """One to ``most`` layers of any of these, tied or not, with norms anywhere.

    ``caches``: where keys and values may be kept, of :data:`popc.testing.caches.CACHES`.
    """
    layers = st.builds(
        Layer,
        attention=attentions(),
        block=st.none() | blocks(),
        residual=st.sampled_from(RESIDUALS),
        norm=st.sampled_from(["rms", "layer"]),
    )
    return st.builds(
        Transformer,
        layers=st.lists(layers, min_size=1, max_size=most).map(tuple),
        width=st.sampled_from([8, 12, 16]),
        vocabulary=st.integers(5, 40),
        tied=st.booleans(),
        low=lows("head"),
        cache=st.sampled_from(caches),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**16),
    )


def prompts(sequences: int = 3, longest: int = 7) -> st.SearchStrategy[Prompt]:
    """One to ``sequences`` of them, of 2 to ``longest`` tokens, padded left or right."""
    return st.builds(
        Prompt,
        lengths=st.lists(st.integers(2, longest), min_size=1, max_size=sequences).map(tuple),
        side=st.sampled_from(["left", "right"]),
        seed=st.integers(0, 2**16),
    )


def configs(
    policies: tuple[str, ...] = ("pop", "threshold"), **fixed: Any
) -> st.SearchStrategy[Config]:
    """Of every sparsity, candidate width, scope and guards; ``fixed`` fields are constant."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "sparsity": st.floats(0, 0.9),
        "candidate": st.floats(0, 1),
        "policy": st.sampled_from(policies),
        "scope": st.sampled_from(["batch", "sequence"]),
        "guards": st.sampled_from(["token", "prompt"]),
    }
    constant = {name: st.just(value) for name, value in fixed.items()}
    return st.builds(Config, **{**drawn, **constant})
