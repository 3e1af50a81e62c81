from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import popc


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", "0.4"),
        ("sparsity", True),
        ("sparsity", float("nan")),
        ("candidate", 1.5),
        ("policy", "best"),
        ("weights", "int3"),
        ("bits", 0),
        ("bits", 65),
        ("bits", "4"),
        ("bits", True),
        ("bits", float("nan")),
        ("targets", ("mlp", "conv")),
        ("targets", 3),
        ("scope", "layer"),
        ("codegen", "c"),
        ("inductor", ["max_autotune"]),
    ],
)
def test_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(popc.ConfigError) as error:
        popc.Config(**{field: value})
    assert error.value.field == field
    assert repr(value) in str(error.value)
    assert field in str(error.value)


def test_unknown_option_suggests_the_near_one() -> None:
    with pytest.raises(popc.ConfigError, match="did you mean 'sparsity'"):
        popc.Config.of(None, {"sparsety": 0.3})


def test_frozen_and_options_override() -> None:
    config = popc.Config.of(popc.Config(sparsity=0.5), {"candidate": 0.2})
    assert (config.sparsity, config.candidate) == (0.5, 0.2)
    with pytest.raises(AttributeError):
        config.sparsity = 0.1  # type: ignore[misc]


@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 20000))
def test_counts(sparsity: float, candidate: float, channels: int) -> None:
    counts = popc.Config(sparsity=sparsity, candidate=candidate).counts(channels)
    assert counts.active == max(1, round((1 - sparsity) * channels))
    assert 0 <= counts.retained <= counts.active <= counts.live <= channels
    if 0 < 1 - sparsity - candidate / 2 and 1 - sparsity + candidate / 2 < 1:
        assert abs(counts.retained - (1 - sparsity - candidate / 2) * channels) <= 1
        assert abs(counts.candidate - candidate * channels) <= 1


def test_the_usual_policy_follows_from_the_weights() -> None:
    assert popc.Config().policy == "threshold"
    assert popc.Config(weights="int8").policy == "graded"
    assert popc.Config(weights="int8", policy="threshold").policy == "threshold"
    assert popc.Config.of(popc.Config(), {"weights": "int4"}).policy == "graded"
    assert popc.Config.of(popc.Config(weights="int8"), {"weights": None}).policy == "threshold"
    assert popc.Config.of(popc.Config(policy="pop"), {"weights": "int8"}).policy == "pop"
    config = popc.Config.of(popc.Config(weights="int8", targets=("mlp",)), {"bits": 4.5})
    assert config.policy == "graded" and config.targets == ("mlp",)


@pytest.mark.parametrize("other", [{"bytes": 0.5}, {"model_sparsity": 0.5}])
def test_one_budget_is_given(other: dict[str, float]) -> None:
    with pytest.raises(popc.ConfigError, match=r"bits=4\.5.*None where"):
        popc.Config(bits=4.5, **other)
