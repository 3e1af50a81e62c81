"""popc in ten lines: compile a model, generate."""

import torch

import popc
from popc.models import load_model

model, tokenizer = load_model("smollm2")
pruned = popc.compile(model, sparsity=0.2)

torch.manual_seed(0)
prompt = tokenizer("The capital of France is", return_tensors="pt")
answer = pruned.generate(**prompt, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(answer[0]))
