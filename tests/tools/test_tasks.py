"""Generation tasks: their scores, their examples, and both models' answers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import popc
from popc.tools.tasks import (
    CITIES,
    TASKS,
    contains,
    equal_tokens,
    equal_words,
    first_number,
    perform,
    tasks_of,
)
from tests.helpers.models import tiny_llama

TEXTS = [f"Article {i} tells of a river. It is long. " * 20 for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(95)} | {"[UNK]": 95}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def test_scores() -> None:
    assert equal_tokens([1, 2, 3, 4], [1, 2, 5, 4]) == 0.75
    assert equal_tokens([1, 2], [1]) == 0.5
    assert contains("48213", " it is 48213.") == 1.0 and contains("48213", "4821 3") == 0.0
    assert equal_words("river stone", " river stone\nSay: more") == 1.0
    assert equal_words("river stone", "stone river") == 0.0
    assert equal_words("river", "") == 0.0
    assert first_number("19", " 19.\n") == 1.0
    assert first_number("19", " 190") == first_number("19", "") == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_the_same_each_time(name: str) -> None:
    made = TASKS[name].examples(TEXTS, 3)
    assert made == TASKS[name].examples(TEXTS, 3)
    assert len({example.prompt for example in made}) == 3


def test_the_answer_is_in_the_prompt_where_it_should_be() -> None:
    for example in TASKS["retrieval"].examples(TEXTS, 4):
        city = example.prompt.removesuffix(" is").rpartition(" of ")[2]
        assert city in CITIES
        assert example.prompt.count(f"The access code of {city} is {example.answer}") == 1
        assert example.prompt.count("The access code of") == 4
    for example in TASKS["arithmetic"].examples(TEXTS, 4):
        a, b = example.prompt.splitlines()[-1].removesuffix(" =").split(" + ")
        assert example.answer == str(int(a) + int(b))
    for example in TASKS["copy"].examples(TEXTS, 4):
        assert example.prompt.splitlines()[-2] == f"Say: {example.answer}"


@pytest.mark.parametrize(("sparsity", "equal"), [(0.0, True), (0.8, False)])
def test_what_equals_dense_scores_one(
    sparsity: float, equal: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.compiler.reset()
    model = tiny_llama()
    compiled = popc.compile(model, sparsity=sparsity, codegen="eager")
    seen: list[None] = []
    texts = ["w1 w2 w3 w4 w5 w6", "w9 w8 w7 w1 w2 w9"]
    task = TASKS["continuation"]
    done = perform(task, model, compiled, tokenizer, texts, 2, lambda: seen.append(None))
    assert (done.task, done.count, done.dense_score) == ("continuation", 2, 1.0)
    assert (done.score == 1.0) is equal
    assert len(seen) == 2


def test_both_models_are_judged_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.compiler.reset()
    model = tiny_llama()
    compiled = popc.compile(model, sparsity=0, codegen="eager")
    for name in ("retrieval", "arithmetic", "copy"):
        done = perform(TASKS[name], model, compiled, tokenizer, TEXTS, 1)
        assert done.score == done.dense_score < 1  # random weights know no answer


def test_bad_names_and_counts() -> None:
    with pytest.raises(popc.ConfigError, match="tasks='poem' is not allowed"):
        tasks_of(["copy", "poem"])
    with pytest.raises(popc.ConfigError, match="examples=5 is not allowed: at most 4"):
        TASKS["retrieval"].examples(TEXTS, 5)
