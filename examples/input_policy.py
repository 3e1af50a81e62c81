"""A policy of inputs in one file: TEAL's choice (arXiv 2408.14690), with the prompt's thresholds.

A channel is read if it is large, whatever its weights are, and each linear reads the same share.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import popc
from popc.policies.allocation import at_shares


class Magnitude(popc.InputPolicy):
    """The score of a channel is its distance from its mean alone."""

    name = "magnitude"

    def scale(self, norm):
        return torch.ones_like(norm)

    def allocate(self, histograms, groups, budget):
        shares = torch.full((len(groups),), budget.share, dtype=torch.float64)
        return at_shares(histograms, groups, shares)


popc.register_policy(Magnitude())

config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
)
model = LlamaForCausalLM(config).eval()
pruned = popc.compile(model, policy="magnitude", sparsity=0.4)
prompt = torch.randint(96, (1, 16))
print(pruned.popc_config.policy_name, pruned.generate(prompt, max_new_tokens=8)[0, 16:].tolist())
