"""Strategies of hypothesis: models, prompts and configs, small ones first."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from popc.config import Config
from popc.testing.blocks import ACTIVATIONS, DECOYS, LAYOUTS, MLP, Attention, Decoy, MoE
from popc.testing.transformer import RESIDUALS, Layer, Prompt, Transformer


def mlps() -> st.SearchStrategy[MLP]:
    """Gated and plain, of 2 to 24 channels, with projections split, fused or interleaved."""
    return st.builds(
        MLP,
        channels=st.integers(2, 24),
        act=st.sampled_from(list(ACTIVATIONS)),
        gated=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        bias=st.booleans(),
        transposed=st.booleans(),
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
    )


def moes() -> st.SearchStrategy[MoE]:
    """2 to 4 experts in stacked weights, of which each token meets 1 or 2."""
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
    return st.one_of(mlps(), moes(), decoys())


def transformers(
    dtypes: tuple[str, ...] = ("float64",), most: int = 2
) -> st.SearchStrategy[Transformer]:
    """One to ``most`` layers of any of these, tied or not, with norms anywhere."""
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
    policies: tuple[str, ...] = ("pop", "contraction"), **fixed: Any
) -> st.SearchStrategy[Config]:
    """Of every sparsity, candidate width, scope and guards; ``fixed`` fields are as given."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "sparsity": st.floats(0, 0.9),
        "candidate": st.floats(0, 1),
        "policy": st.sampled_from(policies),
        "scope": st.sampled_from(["batch", "sequence"]),
        "guards": st.sampled_from(["token", "prompt"]),
    }
    given = {name: st.just(value) for name, value in fixed.items()}
    return st.builds(Config, **{**drawn, **given})
