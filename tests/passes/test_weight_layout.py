"""Layout pass: who is laid out by channel, who is refused, and that nothing else shows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import popc
from popc.ops.pages import collapse
from popc.passes.weight_layout import transpose_storage
from popc.sessions import Session, use
from tests.helpers.models import AddmmMLP, Gated, tiny_llama

IDS = torch.arange(3, 20)[None]
R = 0.4


def decoded(model: nn.Module) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


def prefill_and_step(model: nn.Module, d: int = 16, **options: object) -> nn.Module:
    """Compile a module without a cache and run a prompt and a token through it."""
    torch._dynamo.reset()
    pruned = popc.compile(model.eval(), policy="pop", sparsity=R, codegen="eager", **options)
    with use(Session()):
        pruned(torch.randn(1, 9, d))
        pruned(torch.randn(1, 1, d))
    return pruned


def lies_by_input(weight: torch.Tensor) -> bool:
    return weight.stride() == (1, weight.shape[0])


def test_down_is_channel_major_and_the_rest_as_before() -> None:
    model = Gated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    pruned = prefill_and_step(model)
    assert len(pruned.popc_plan.regions) == 1
    assert lies_by_input(model.c.weight)
    assert model.a.weight.is_contiguous() and model.b.weight.is_contiguous()
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_no_second_copy_stays() -> None:
    model = Gated()
    size = model.c.weight.nbytes
    prefill_and_step(model)
    assert model.c.weight.untyped_storage().nbytes() == size


def test_a_conv1d_is_transposed_the_other_way_round() -> None:
    """GPT-2's weights are [in, out]: it is the producer whose channels are apart."""
    model = AddmmMLP()
    prefill_and_step(model)
    assert lies_by_input(model.w1) and model.w2.is_contiguous()


def test_saving_is_as_before(tmp_path) -> None:
    model = tiny_llama()
    dense = copy.deepcopy(model)
    popc.compile(model, policy="pop", sparsity=R, codegen="eager").generate(IDS, max_new_tokens=3)
    assert lies_by_input(model.model.layers[0].mlp.down_proj.weight)
    state = model.state_dict()
    save_file(
        {name: v.clone().contiguous() for name, v in state.items()}, tmp_path / "a.safetensors"
    )
    for name, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(value, dense.state_dict()[name])
    model.save_pretrained(tmp_path / "after")
    dense.save_pretrained(tmp_path / "before")
    names = [tmp_path / part / "model.safetensors" for part in ("before", "after")]
    assert names[0].read_bytes() == names[1].read_bytes()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["lm_head.weight"], state["lm_head.weight"])


def test_what_is_written_through_a_state_dict_reaches_the_weights() -> None:
    """As averaging of weights, surgery, and loading a part do it."""
    model = Gated()
    pruned = prefill_and_step(model)
    assert lies_by_input(model.c.weight)
    for weights in (model.state_dict(), pruned.state_dict()):
        assert weights["c.weight"].data_ptr() == model.c.weight.data_ptr()
        weights["c.weight"].mul_(0.5)
        weights["c.weight"][:, 3] = 7.0
        assert (model.c.weight[:, 3] == 7.0).all() and (pruned.c.weight[:, 3] == 7.0).all()


def test_loading_weights_keeps_the_layout() -> None:
    model, other = Gated(), Gated()
    prefill_and_step(model)
    model.load_state_dict(other.state_dict())
    assert lies_by_input(model.c.weight) and torch.equal(model.c.weight, other.c.weight)


def test_the_original_answers_as_before() -> None:
    model = tiny_llama()
    expected = decoded(model)
    decoded(popc.compile(model, policy="pop", sparsity=R))
    assert torch.equal(decoded(model), expected)


class Tied(Gated):
    """``down`` is also read as a table, row by row."""

    def forward(self, x):
        return super().forward(x) + self.c.weight[:1, : x.shape[-1]].sum()


def refusal(model: nn.Module) -> str:
    pruned = prefill_and_step(model)
    assert not pruned.popc_plan.regions
    assert model.c.weight.is_contiguous()
    (skipped,) = {s.reason for s in pruned.popc_plan.skipped if s.kind == "layout"}
    return skipped


def test_a_weight_that_others_read_is_refused() -> None:
    assert "shared with aten" in refusal(Tied())


def test_a_weight_whose_storage_others_hold_is_refused() -> None:
    model = Gated()
    table = nn.Parameter(model.c.weight.data)
    assert "tied" in refusal(model)
    assert table.data_ptr() == model.c.weight.data_ptr()


def test_a_part_of_a_larger_storage_is_refused() -> None:
    model = Gated()
    storage = torch.randn(2, *model.c.weight.shape)
    model.c.weight = nn.Parameter(storage[1])
    assert "larger storage" in refusal(model)


def test_a_weight_of_inference_mode_is_refused() -> None:
    model = Gated()
    with torch.inference_mode():
        model.c.weight = nn.Parameter(torch.randn(16, 40), requires_grad=False)
    assert "inference mode" in refusal(model)


def test_refused_runs_dense() -> None:
    torch.manual_seed(0)
    model = Tied()
    x = torch.randn(1, 1, 16)
    expected = model(x)
    pruned = prefill_and_step(model)
    torch.testing.assert_close(pruned(x), expected)


def test_without_pruning_nothing_is_transposed() -> None:
    model = Gated().eval()
    popc.compile(model, policy="pop", sparsity=0.0, codegen="eager")(torch.randn(1, 9, 16))
    assert model.c.weight.is_contiguous()


def test_shared_layers_are_transposed_once() -> None:
    """One block used twice: all its readers want the same."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = Gated(), nn.LayerNorm(16)

        def forward(self, x):
            return x + self.block(self.norm(x + self.block(x)))

    model = Twice()
    prefill_and_step(model)
    assert lies_by_input(model.block.c.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_graph_reads_transposed_weights_right(dtype) -> None:
    """Prefill and dense steps too: in 16 bits they go through popc's own product."""
    torch.manual_seed(0)
    model = tiny_llama().to(dtype)
    expected = model(IDS).logits
    pruned = popc.compile(model, policy="pop", sparsity=R)
    for _ in range(2):
        torch.testing.assert_close(
            pruned(IDS).logits, expected, atol=0.15 if dtype is torch.bfloat16 else 1e-4, rtol=0.1
        )


def test_transposing_keeps_values() -> None:
    value = torch.randn(3, 4, 5)
    stored = transpose_storage(value)
    assert torch.equal(stored, value) and stored.stride() == (20, 1, 4)


def test_huge_pages_keep_values() -> None:
    weight = torch.randn(4096, 512)  # 8 MB
    before, where = weight.clone(), weight.data_ptr()
    done = collapse(weight)
    assert torch.equal(weight, before) and weight.data_ptr() == where
    assert isinstance(done, bool)
    assert not collapse(torch.randn(8, 8)), "less than a page"
