"""Pack pass: what runs where the kernels could not be built."""

from __future__ import annotations

import pytest
import torch

import popc
from popc.ops import native
from popc.sessions import Session, use
from tests.helpers.models import AddmmMLP, Gated, Parallel, Plain, tiny_llama

IDS = torch.arange(3, 20)[None]
MODELS = {
    "gated": lambda: Gated(),
    "gated, bias": lambda: Gated(bias=True),
    "plain": lambda: Plain(),
    "conv1d": lambda: AddmmMLP(),
    "two in one linear": lambda: Parallel(),
}


@pytest.fixture
def no_kernels(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(native, "load", lambda: False)


def steps(model: torch.nn.Module, **options: object) -> tuple[list[torch.Tensor], Session]:
    torch._dynamo.reset()
    torch.manual_seed(1)
    options = {"policy": "pop", "sparsity": 0.4, "candidate": 0.3, **options}
    pruned = torch.compile(model, backend="popc", options=options)
    outputs = []
    session = Session()
    with use(session), torch.no_grad():
        pruned(torch.randn(2, 9, 16))
        for _ in range(3):
            outputs.append(pruned(torch.randn(2, 1, 16)))
    return outputs, session


CASES = [*(("eager", name) for name in MODELS), ("inductor", "gated, bias"), ("inductor", "conv1d")]


@pytest.mark.parametrize(("codegen", "name"), CASES)
def test_packed_is_what_the_kernels_do(codegen, name, monkeypatch) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    expected, without = steps(model, codegen="eager")
    assert all(p.weights is None for p in without.units._partitions.values())
    monkeypatch.setattr(native, "load", lambda: False)
    outputs, session = steps(model, codegen=codegen)
    (partition,) = session.units._partitions.values()
    assert partition.weights is not None
    assert len(partition.weights) == len([w for w in model.parameters() if w.dim() == 2])
    read = sum(weight.numel() for weight in partition.weights)
    assert read < 0.9 * sum(w.numel() for w in model.parameters() if w.dim() == 2)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_kernels_weights_keep_their_strides(no_kernels) -> None:
    model = Gated().eval()
    steps(model, codegen="eager")
    assert model.c.weight.is_contiguous()


def test_each_prompt_has_copies_of_its_own(no_kernels) -> None:
    model = tiny_llama()
    pruned = popc.compile(model, policy="pop", sparsity=0.4, codegen="eager")
    other = torch.arange(40, 60)[None]
    alone = [pruned.generate(ids, max_new_tokens=5, do_sample=False) for ids in (IDS, other)]
    again = [pruned.generate(ids, max_new_tokens=5, do_sample=False) for ids in (IDS, other)]
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    torch._dynamo.reset()


def test_a_sequence_of_its_own_list_is_left_to_the_reference(no_kernels) -> None:
    _, session = steps(Gated().eval(), codegen="eager", scope="sequence")
    (partition,) = session.units._partitions.values()
    assert partition.weights is None


def test_nan_in_a_pruned_channel_counts_for_nothing(no_kernels) -> None:
    """As with a kernel, which never reads it."""
    model = Plain(act=torch.relu).eval()
    model.a.weight.data[7] = torch.nan  # measured as nothing, so pruned
    outputs, _ = steps(model, codegen="eager")
    assert all(torch.isfinite(y).all() for y in outputs)
