"""popc as a torch.compile backend: popc is never imported, the installed package registers it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 99, (1, 12))

# In place, so that generate() uses it; torch.compile(model, backend=...) works for plain calls.
model.compile(backend="popc", options={"sparsity": 0.4})
with torch.no_grad():
    print(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
