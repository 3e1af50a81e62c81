"""Generation tasks that need no download, each scored in [0, 1], for a dense model and a pruned.

Prompts are plain text without a chat format, the same for every model and run; answers are greedy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from popc.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 128  # new tokens that continuations are compared over
FILLER = 3000  # characters of text that a fact is planted in
CITIES = "Lisbon Oslo Quito Perth Lagos Turin Osaka Cusco Basel Accra Hanoi Delhi".split()
WORDS = "apple river stone cloud table horse green paper light music bread winter".split()


@dataclass(frozen=True)
class Example:
    """A prompt, the answer that is hoped for, and how many tokens a model may use for it.

    Without an ``answer`` it is what the dense model says.
    """

    prompt: str
    answer: str | None
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """The mean scores of a task, in [0, 1]; ``count`` examples."""

    task: str
    score: float
    dense_score: float
    count: int


@dataclass(frozen=True)
class Task:
    """``examples(texts, count)`` makes examples of a list of texts; ``score(answer, said)``."""

    name: str
    examples: Callable[[Sequence[str], int], list[Example]]
    score: Callable[[Any, Any], float]


def equal_tokens(answer: Sequence[object], said: Sequence[object]) -> float:
    """The share of ``answer``'s tokens that ``said`` has at the same place."""
    same = sum(a == b for a, b in zip(answer, said, strict=False))
    return same / len(answer) if answer else 1.0


def contains(answer: str, said: str) -> float:
    """1.0 where ``answer`` stands in what was said, else 0.0."""
    return float(answer in said)


def equal_words(answer: str, said: str) -> float:
    """The share of ``answer``'s words that the first line of ``said`` has at the same place."""
    lines = said.strip().splitlines() or [""]
    return equal_tokens(answer.split(), lines[0].split())


def first_number(answer: str, said: str) -> float:
    """1 if the first word of ``said`` is the number ``answer``."""
    words = said.split() or [""]
    return float(words[0].rstrip(".,;") == answer)


def _continuation(texts: Sequence[str], count: int) -> list[Example]:
    return [Example(text[:1000], None, LENGTH) for text in _enough(texts, count)]


def _retrieval(texts: Sequence[str], count: int) -> list[Example]:
    """A code for a city somewhere in a long text, and other cities' codes elsewhere."""
    chance = random.Random(0)
    made = []
    for text in _enough(texts, count):
        sentences = text[:FILLER].split(". ")
        cities = chance.sample(CITIES, 3)
        codes = [str(chance.randrange(10000, 100000)) for _ in cities]
        for city, code in zip(cities, codes, strict=True):
            at = chance.randrange(1, len(sentences) + 1)
            sentences.insert(at, f"The access code of {city} is {code}")
        body = ". ".join(sentences)
        made.append(Example(f"{body}\n\nThe access code of {cities[0]} is", codes[0], 8))
    return made


def _arithmetic(texts: Sequence[str], count: int) -> list[Example]:
    chance = random.Random(1)

    def addends() -> tuple[int, int]:
        return chance.randrange(2, 50), chance.randrange(2, 50)

    made = []
    for _ in range(count):
        shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in (addends() for _ in range(8)))
        a, b = addends()
        made.append(Example(f"{shown}{a} + {b} =", str(a + b), 6))
    return made


def _copy(texts: Sequence[str], count: int) -> list[Example]:
    chance = random.Random(2)
    made = []
    for _ in range(count):
        lists = [" ".join(chance.sample(WORDS, 6)) for _ in range(4)]
        shown = "".join(f"Say: {words}\nAnswer: {words}\n" for words in lists[:-1])
        made.append(Example(f"{shown}Say: {lists[-1]}\nAnswer:", lists[-1], 24))
    return made


def _enough(texts: Sequence[str], count: int) -> Sequence[str]:
    if len(texts) < count:
        raise ConfigError("examples", count, f"at most {len(texts)}, one for each text")
    return texts[:count]


TASKS = {
    task.name: task
    for task in (
        Task("continuation", _continuation, equal_tokens),
        Task("retrieval", _retrieval, contains),
        Task("arithmetic", _arithmetic, first_number),
        Task("copy", _copy, equal_words),
    )
}


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of these names.

    Raises:
        ConfigError: there is none of a name.
    """
    for name in names:
        if name not in TASKS:
            raise ConfigError("tasks", name, f"of {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


@torch.no_grad()
def perform(
    task: Task,
    model: Any,
    compiled: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    count: int,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """Let both models answer ``count`` examples.

    Args:
        model: the dense causal language model. compiled: the same model from :func:`popc.compile`.
        texts: what prompts are made of, at least ``count``.
        progress: called after each example.

    Raises:
        ConfigError: there are fewer texts than examples.
    """
    score = dense_score = 0.0
    for example in task.examples(texts, count):
        ids = tokenizer(example.prompt, return_tensors="pt")
        dense, pruned = (_answer(each, ids, example.tokens) for each in (model, compiled))
        if example.answer is None:
            score += task.score(dense, pruned)
            dense_score += 1.0
        else:
            score += task.score(example.answer, tokenizer.decode(pruned, skip_special_tokens=True))
            said = tokenizer.decode(dense, skip_special_tokens=True)
            dense_score += task.score(example.answer, said)
        progress()
    return Outcome(task.name, score / count, dense_score / count, count)


def _answer(model: Any, ids: Mapping[str, Tensor], tokens: int) -> list[int]:
    out = model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return list(out[0, ids["input_ids"].shape[1] :].tolist())
