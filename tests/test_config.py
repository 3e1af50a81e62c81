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
