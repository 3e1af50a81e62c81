"""The means to know that popc is right, for a model of yours or for ones that hypothesis draws.

``pip install 'popc[testing]'``. :func:`assert_equivalent` compares a compiled model with the masked
dense one, call by call, and names the first region that differs. :func:`masked_dense` is that
oracle for a partition that you choose. :func:`transformers` and its like are strategies; what they
draw is plain data with ``make()``, and its ``repr`` is the code that makes it.
:func:`session_machine` interleaves generations on one compiled model.

.. code-block:: python

    @given(transformers(), prompts(), configs(codegen="eager"))
    def test_pruned_is_the_oracle(spec, prompt, config):
        model = spec.make()
        assert_equivalent(model, prompt.inputs(spec.vocabulary), config)
"""

from __future__ import annotations

from popc.testing.blocks import MLP, Attention, Decoy, Low, MoE
from popc.testing.caches import Decoding
from popc.testing.equivalence import Equivalence, EquivalenceError, assert_equivalent, relative
from popc.testing.oracle import masked_dense
from popc.testing.sessions import session_machine
from popc.testing.strategies import (
    attentions,
    blocks,
    configs,
    decoys,
    lows,
    mlps,
    moes,
    prompts,
    transformers,
)
from popc.testing.transformer import Layer, Prompt, Transformer

__all__ = [
    "MLP",
    "Attention",
    "Decoding",
    "Decoy",
    "Equivalence",
    "EquivalenceError",
    "Layer",
    "Low",
    "MoE",
    "Prompt",
    "Transformer",
    "assert_equivalent",
    "attentions",
    "blocks",
    "configs",
    "decoys",
    "lows",
    "masked_dense",
    "mlps",
    "moes",
    "prompts",
    "relative",
    "session_machine",
    "transformers",
]
