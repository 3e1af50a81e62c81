"""The policy of grades: what its thresholds read of quantised weights, on tensors and in models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import popc
from popc import policies
from popc.ops import measure_inputs, planes
from popc.passes.region_binding import InputGroupBinding
from popc.policies import Graded
from popc.policies.allocation import READ_ALL, Budget, GroupSpec, HighPlane, allocate
from popc.testing import EquivalenceError, assert_equivalent
from tests.helpers.models import tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHARE = 4.5 / 8.5


def weights(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Both readings of one quantised weight, float32 ``[N, K]``."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=make) * torch.rand(inputs, generator=make)
    packed = planes.pack(w, 1, 2)
    both, high = (
        planes.unpack(packed, None, None, w.shape, 1, 2, torch.float32, bits) for bits in (8, 4)
    )
    return both, high


class Group:
    """A group of linears and its prompt ``[T, K]``."""

    def __init__(self, outputs: int, inputs: int, seed: int, power: int, quantized: bool) -> None:
        self.both, self.high = weights(outputs, inputs, seed)
        self.x = torch.randn(400, inputs, generator=torch.Generator().manual_seed(-seed)) ** power
        norm = self.both.norm(dim=0)
        squares = (self.high - self.both).square().sum(0)
        self.norm = self.low_norm = norm
        high = None
        if quantized:
            high = HighPlane(SHARE, float(squares.sum() / norm.square().sum()))
            self.norm, self.low_norm = Graded().scales(norm, squares / norm.square(), SHARE)
        bits = 8.5 if quantized else 16
        self.spec = GroupSpec(inputs, round(outputs * inputs * bits / 8), seed, high)
        known = torch.zeros(1, 2 * inputs + 1, dtype=torch.float64)
        self.histogram = measure_inputs(self.x[None], self.norm, None, known)[1]

    def read(self, limit: Tensor) -> tuple[float, float]:
        """The share of bytes that the prompt's tokens read, and the relative error of that."""
        high = self.x.abs() * self.norm > limit
        low = high & (self.x.abs() * self.low_norm > limit)
        scores = (self.x * self.both.norm(dim=0)).double().square()
        coarse = (self.high - self.both).square().sum(0) / self.both.square().sum(0)
        cost = torch.where(high, torch.where(low, 0.0, scores * coarse), scores)
        typical = scores.sum(-1).log().mean().exp()
        share = SHARE if self.spec.high is not None else 1.0
        read = share * high.float().mean() + (1 - share) * low.float().mean()
        return float(read), float(cost.sum(-1).mean() / typical)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.9])
def test_groups_read_their_bytes_at_equal_error(share: float) -> None:
    """Of any kind of weight: the third group is not quantised."""
    groups = [Group(96, 64, 1, 1, True), Group(64, 128, 2, 3, True), Group(64, 128, 3, 1, False)]
    specs = [group.spec for group in groups]
    histograms = torch.cat([group.histogram for group in groups])
    result = Graded().allocate(histograms, specs, Budget(share))
    size = torch.tensor([float(spec.bytes) for spec in specs], dtype=torch.float64)
    assert float(result.shares @ size / size.sum()) == pytest.approx(share, abs=1e-6)
    for group, limit, expected in zip(groups, result.thresholds, result.shares, strict=True):
        read, error = group.read(limit)
        assert read == pytest.approx(float(expected), abs=0.02)
        assert error == pytest.approx(result.error, rel=0.15)


def test_a_mass_is_kept_at_fewer_bytes_than_without_grades() -> None:
    group = Group(96, 64, 1, 1, True)
    read = {}
    for graded in (True, False):
        budget = Budget(1.0, error=0.01, least=0.05)
        result = allocate(group.histogram, [group.spec], budget, graded)
        read[graded] = float(result.shares[0])
        assert result.error == 0.01
    assert group.read(Graded().allocate(group.histogram, [group.spec], budget).thresholds[0])[
        1
    ] == pytest.approx(0.01, rel=0.15)
    assert read[True] < 0.8 * read[False]


def test_everything_is_read_where_the_budget_is_all() -> None:
    group = Group(32, 64, 1, 1, True)
    for graded in (True, False):
        result = allocate(group.histogram, [group.spec], Budget(1.0), graded)
        assert result.thresholds.tolist() == [READ_ALL] and result.shares.tolist() == [1.0]


@given(
    st.floats(0, 100, width=32),
    st.floats(0, 2, width=32),
    st.floats(0.05, 0.95),
    st.floats(0.01, 9),
)
def test_a_grade_is_the_cheapest(score: float, error: float, share: float, limit: float) -> None:
    """Of nothing, one plane and both, by the error that is left and λ for each byte."""
    norm = torch.tensor([score], dtype=torch.float64)
    high, low = Graded().scales(norm, torch.tensor([error], dtype=torch.float64), share)
    grade = 0 if high <= limit else 1 if low <= limit else 2
    price = limit**2 / share  # of both planes, as limit² is that of the high one
    costs = [score**2, error * score**2 + price * share, price]
    assert costs[grade] <= min(costs) * (1 + 1e-9)


def test_policies_that_know_no_grades_read_both_planes_or_none() -> None:
    norm, error = torch.rand(8), torch.rand(8)
    high, low = policies.get("threshold").scales(norm, error, SHARE)  # type: ignore[attr-defined]
    assert torch.equal(high, norm) and torch.equal(low, norm)
    assert isinstance(policies.get("graded"), popc.InputPolicy)


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(96, (batch, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "options",
    [
        {"codegen": "inductor"},
        {"scope": "sequence"},
        {"policy": "threshold"},
        {"weights": "int4", "bits": 3.0},
        {"bits": 8.5},
        {"targets": ("mlp",), "bits": 6.0},
    ],
    ids=str,
)
def test_a_model_is_the_oracle(options: dict[str, object]) -> None:
    defaults = {"weights": "int8", "bits": 4.5, "codegen": "eager"}
    result = assert_equivalent(tiny_llama(), tokens(), **{**defaults, **options})
    assert result.plan.inputs
    assert (result.masked > 0) == (options.get("bits") != 8.5)


def test_transposed_weights_are_the_oracle() -> None:
    """As GPT-2 has them."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    options = {"weights": "int8", "bits": 4.5, "codegen": "eager"}
    result = assert_equivalent(model, tokens(1), **options)
    assert result.masked and {group.kind for group in result.plan.inputs} == {"attention", "mlp"}


def test_what_is_too_small_to_be_quantised_is_masked_beside_what_is() -> None:
    """Keys and values of 16 channels: their group of linears is read as floats are."""
    model = tiny_llama(num_key_value_heads=1)
    result = assert_equivalent(model, tokens(1), weights="int8", bits=6.0, codegen="eager")
    sizes = {linear.element_bytes for group in result.plan.inputs for linear in group.linears}
    assert result.masked and {8.0, 1.0625} <= sizes


def test_the_first_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low planes that are never read, where some should be."""
    scales = InputGroupBinding.scales

    def wrong(self: InputGroupBinding, args: object, policy: object) -> tuple[Tensor, Tensor]:
        high, low = scales(self, args, policy)
        return high, low * 0 if self.group.width == 160 else low

    monkeypatch.setattr(InputGroupBinding, "scales", wrong)
    with pytest.raises(EquivalenceError, match=r"first that differs, in call 1: .*layers\.0\.mlp"):
        assert_equivalent(tiny_llama(), tokens(), weights="int8", bits=6.0, codegen="eager")
