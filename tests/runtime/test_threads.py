"""What threads share: compiled graphs, what guards have learned, identities of weights."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from popc import compat
from popc.analysis import capture
from popc.runtime import weight_watch
from popc.runtime.guards import PromptGuards
from popc.runtime.instances import LastInstance
from tests.helpers.generation import compiled_of, generated, prompt
from tests.helpers.models import tiny_llama
from tests.helpers.oracle import relative


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    torch.compiler.reset()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(run: Callable[[int], None], count: int = 4) -> None:
    """``run(number)`` in ``count`` threads that begin together; their first error is raised."""
    errors: list[BaseException] = []
    begin = threading.Barrier(count)

    def guarded(number: int) -> None:
        begin.wait()
        try:
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_guards_by_prompt_in_threads_and_a_change_meanwhile() -> None:
    """No thread takes from another that the model has changed."""
    model = tiny_llama()
    compiled = compiled_of(model, guards="prompt")
    expected = [generated(compiled, prompt(seed, 6 + seed)) for seed in range(4)]

    def run(seed: int) -> None:
        for _ in range(3):
            assert torch.equal(generated(compiled, prompt(seed, 6 + seed)), expected[seed])

    in_threads(run)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    got: dict[int, torch.Tensor] = {}
    in_threads(lambda seed: got.update({seed: generated(compiled, prompt(seed, 6 + seed))}))
    torch.compiler.reset()
    changed = tiny_llama()
    changed.model.layers[1].mlp.act_fn = nn.ReLU()
    other = compiled_of(changed)
    for seed in range(4):
        assert torch.equal(got[seed], generated(other, prompt(seed, 6 + seed)))
        assert relative(got[seed], expected[seed]) > 1e-2


def test_a_change_is_reported_once_to_one_of_many() -> None:
    guards = PromptGuards()
    for _ in range(50):
        guards._changed = True
        taken: list[bool] = []
        in_threads(lambda _: taken.append(guards.take_change()), 8)  # noqa: B023
        assert sum(taken) == 1


def test_calls_of_threads_count_their_own_graphs() -> None:
    """Two prompts that are compiled at once are no sign of a graph that breaks."""
    guards = PromptGuards()
    guards.expect(False, [])

    def run(_: int) -> None:
        guards.begin_call()
        guards([])

    in_threads(run, 8)
    assert guards.off is None
    guards.begin_call()
    guards([])
    guards([])
    assert guards.off is not None


def entry(make: object, kind: str, source: object = None) -> SimpleNamespace:
    guard = SimpleNamespace(create_fn=make, originating_source=source)
    return SimpleNamespace(orig_guard=guard, guard_type=kind)


def test_a_guard_that_says_nothing_known_is_kept() -> None:
    from torch._dynamo.guards import GuardBuilder

    assert compat.guard_condition(entry(GuardBuilder.TYPE_MATCH, "TYPE_MATCH")) == ""
    for make in (lambda guard: None, GuardBuilder.ID_MATCH, None):
        assert compat.guard_condition(entry(make, "TYPE_MATCH")) is None
    assert compat.guard_condition(SimpleNamespace(guard_type="TYPE_MATCH")) is None
    assert compat.guard_place(entry(None, "TYPE_MATCH")).root == "call"
    assert compat.guard_place(SimpleNamespace()).root == "call"


def test_a_weight_has_one_identity_in_all_threads() -> None:
    for _ in range(50):
        parameter, identities = nn.Parameter(torch.zeros(1)), []
        in_threads(lambda _: identities.append(capture.identity(parameter)), 8)  # noqa: B023
        assert len(set(identities)) == 1


def test_the_instance_of_the_last_call_goes_with_its_weights() -> None:
    """An id may be another tensor's, once its own is gone; a weight that Python has let go of while
    torch still holds it is not gone."""
    kept, dropped = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    last = LastInstance([kept, dropped], SimpleNamespace())
    assert last.instance is not None
    holder = nn.Module()
    holder.weight = dropped
    del dropped
    assert last.instance is not None
    del holder
    assert last.instance is None


def test_a_changed_weight_leaves_other_models_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from popc.runtime.instances import Instances

    one, other = tiny_llama(), tiny_llama(seed=1)
    first, second = compiled_of(one), compiled_of(other)
    before = generated(second, prompt(0))
    generated(first, prompt(0))
    made: list[object] = []
    make = Instances._new

    def counted(self: Instances, args: object) -> object:
        made.append(self)
        return make(self, args)

    monkeypatch.setattr(Instances, "_new", counted)
    number = weight_watch.changes()
    with torch.no_grad():
        one.model.layers[0].mlp.up_proj.weight.mul_(2)
    generated(first, prompt(0))
    assert weight_watch.changes() > number and made
    made.clear()
    assert torch.equal(generated(second, prompt(0)), before)
    assert not made
