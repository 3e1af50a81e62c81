"""Options that several commands have, and what is made of them: values, and a Config."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import typer

import popc
from popc import policies as known
from popc.config import WEIGHTS
from popc.models import DEFAULT

Model = Annotated[str, typer.Argument(help=f"'{DEFAULT}', a model folder, or a hub id.")]
Sparsity = Annotated[float, typer.Option(help="r: share of channels inactive at decode.")]
Candidate = Annotated[float, typer.Option(help="γ: share of channels each token re-scores.")]
Policy = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(known.names())}; by default graded for quantised weights, else threshold."
    ),
]
Targets = Annotated[
    str | None, typer.Option(help="mlp,attention,experts,other,head; the policy's usual ones.")
]
Bytes = Annotated[
    float | None, typer.Option(help="Share of the weight bytes to read; replaces the sparsity.")
]
Mass = Annotated[
    float | None, typer.Option(help="Share of its scores that each prompt keeps: elastic budget.")
]
Weights = Annotated[
    str | None, typer.Option(help=f"Quantise them: {', '.join(WEIGHTS)}; else the model's own.")
]
Bits = Annotated[
    float | None,
    typer.Option(help="Bits to read of each weight, scales counted; replaces the sparsity."),
]
Calibration = Annotated[
    int, typer.Option(min=1, help="Windows of other text, for policies that need one beforehand.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]

Number = TypeVar("Number", int, float)


def words(text: str) -> tuple[str, ...]:
    """Those between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(name: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """Those between commas.

    Raises:
        ConfigError: a word is no number; ``name`` is the option's.
    """
    try:
        return tuple(kind(word) for word in words(text))
    except ValueError:
        raise popc.ConfigError(name, text, "numbers with commas between them") from None


def config_of(policy: str | None, targets: str | None = None, **options: Any) -> popc.Config:
    """Options of a command as a Config.

    Args:
        policy: a name, ``mlp=pop,attention=...``, or None: the weights' usual one.
        options: fields of the Config; a ``mass`` makes the budget elastic.
    """
    policies: Any = policy
    if options.get("mass") is not None:
        options["budget"] = "elastic"
    else:
        options.pop("mass", None)
    if policy is not None and "=" in policy:
        policies = dict(word.split("=", 1) for word in words(policy))
    return popc.Config(policy=policies, targets=words(targets) if targets else None, **options)
