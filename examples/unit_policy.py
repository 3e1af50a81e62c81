"""A policy of units in one file: keep the channels that fired most often in the prompt."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import popc

aten = torch.ops.aten


class FirstCome(popc.UnitPolicy):
    """Counts how often a channel was among a token's larger half, instead of how strongly."""

    name = "first_come"

    def counts(self, units, sparsity, candidate):
        active = max(1, round((1 - sparsity) * units))
        return popc.Counts(retained=active, candidate=0, active=active)

    def measured(self, emit, h):
        size = emit.call(aten.abs.default, h)
        usual = emit.call(aten.mean.dim, size, [-1], True)
        return emit.call(aten.to.dtype, emit.call(aten.gt.Tensor, size, usual), torch.float32)

    def importance(self, squares, norm, *more):
        return squares  # of zeros and ones: a count


popc.register_policy(FirstCome())

config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
)
model = LlamaForCausalLM(config).eval()
pruned = popc.compile(model, policy="first_come", sparsity=0.4)
prompt = torch.randint(96, (1, 16))
print(pruned.popc_config.policy_name, pruned.generate(prompt, max_new_tokens=8)[0, 16:].tolist())
