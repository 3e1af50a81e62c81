"""Models without a decode phase, and those whose decoder has no prompt."""

from __future__ import annotations

import pytest
import torch

import popc
from tests.helpers.oracle import relative
from tests.helpers.profiles import few
from tests.helpers.zoo import ZOO, Entry

ALL = ("mlp", "attention", "experts")


def zoo(name: str) -> Entry:
    return next(entry for entry in ZOO if entry.name == name)


@pytest.mark.parametrize("name", few(["bert", "distilbert"], 1))
def test_padding_counts_in_no_score(name: str) -> None:
    """Each padded sentence is what it is alone."""
    torch._dynamo.reset()
    model = zoo(name).make()
    options = {
        "policy": "pop",
        "sparsity": 0.5,
        "targets": ALL,
        "codegen": "eager",
        "scope": "sequence",
    }
    rows = [torch.randint(3, 90, (1, n)) for n in (5, 9)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, : row.shape[1]], mask[b, : row.shape[1]] = row, 1
    with torch.no_grad():
        compiled = popc.compile(model, **options)
        both = compiled(input_ids=ids, attention_mask=mask)[0]
        assert all(region.one_pass for region in compiled.popc_plan.regions)
        for b, row in enumerate(rows):
            alone = popc.compile(model, **options)(input_ids=row)[0]
            assert relative(both[b, : row.shape[1]], alone[0]) < 1e-4
            assert relative(alone, model(input_ids=row)[0]) > 1e-2


@pytest.mark.parametrize("name", few(["bart", "t5", "whisper"], 1))
def test_encoder_decoder_generates(name: str) -> None:
    """The decoder's first token is all its prompt."""
    torch._dynamo.reset()
    entry = zoo(name)
    model = entry.make()
    inputs = entry.inputs(model)
    del inputs["decoder_input_ids"]
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **inputs}
    how |= {"decoder_start_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    dense = torch.stack(model.generate(**how).logits)
    exact = popc.compile(model, sparsity=0, targets=ALL, codegen="eager").generate(**how)
    assert relative(torch.stack(exact.logits), dense) < 1e-4
    compiled = popc.compile(model, policy="pop", sparsity=0.5, targets=ALL, codegen="eager")
    pruned = torch.stack(compiled.generate(**how).logits)
    assert pruned.shape == dense.shape
    assert relative(pruned, dense) > 1e-2
    decoder = [region for region in compiled.popc_plan.regions if not region.one_pass]
    assert {region.kind for region in decoder} == {"mlp", "attention"}
