"""The pages: their examples run and print what they say, their links and names lead somewhere.

A ``python`` block is run after those before it on its page, in one namespace, unless it is marked
``no-run``. A ``text`` block right after it is what it prints. Graphs are interpreted
(``codegen="eager"``), so that no test waits for Inductor, and ``load_model`` gives a small model.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import BatchEncoding

import popc
from popc import cli, models, policies
from tests.helpers.models import tiny_llama

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:popc|tests|examples|benchmarks|docs)/[\w./-]*)`")


@dataclass(frozen=True)
class Example:
    """A block of Python, and what the page says that it prints, if anything."""

    line: int
    code: str
    runs: bool
    printed: str | None


def examples(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    blocks = list(_FENCE.finditer(text))
    listed = []
    for block, after in zip_longest(blocks, blocks[1:]):
        language, options, code = block.groups()
        if language != "python":
            continue
        prints = after is not None and after[1] == "text"
        prints = prints and not text[block.end() : after.start()].strip()
        line = text.count("\n", 0, block.start()) + 1
        listed.append(Example(line, code, "no-run" not in options, after[3] if prints else None))
    return listed


class Bytes:
    """A tokenizer: a token for each byte, of 96."""

    def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
        ids = torch.tensor([[byte % 96 for byte in text.encode()]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture
def small(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model is a small one, and graphs are interpreted unless an example asks for more."""
    tiny = tiny_llama(num_hidden_layers=1)
    monkeypatch.setattr(models, "load_model", lambda name: (tiny, Bytes()))
    with_defaults = [field for field in fields(popc.Config) if field.default_factory is MISSING]
    place = [field.name for field in with_defaults].index("codegen")
    defaults = list(popc.Config.__init__.__defaults__)
    assert defaults[place] == "inductor"
    defaults[place] = "eager"
    monkeypatch.setattr(popc.Config.__init__, "__defaults__", tuple(defaults))


@pytest.fixture
def no_policy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is gone after it."""
    monkeypatch.setattr(policies.registry, "_known", dict(policies.registry._known))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if examples(page)], ids=lambda page: page.stem
)
def test_examples_run_and_print_what_they_say(
    page: Path, small, no_policy_of_ones_own, monkeypatch
) -> None:
    torch.manual_seed(0)
    module = types.ModuleType(f"example_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # Dynamo looks for globals there
    namespace = vars(module)
    for example in examples(page):
        if not example.runs:
            continue
        said = io.StringIO()
        padded = "\n" * example.line + example.code  # so that an error names the line of the page
        with contextlib.redirect_stdout(said):
            exec(compile(padded, str(page), "exec"), namespace)
        if example.printed is not None:
            assert lines(said.getvalue()) == lines(example.printed), f"{page.name}:{example.line}"


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_nearly_all_examples_run() -> None:
    listed = [example for page in PAGES for example in examples(page)]
    assert len(listed) >= 15
    assert sum(not example.runs for example in listed) <= 2


def links() -> Iterator[tuple[Path, str]]:
    for page in [*PAGES, ROOT / "benchmarks" / "README.md"]:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in _LINK.findall(text):
            if "://" not in target:
                yield page, target


def anchors(page: Path) -> set[str]:
    """As MkDocs makes them of headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def test_links_lead_somewhere() -> None:
    listed = list(links())
    assert len(listed) >= 40
    for page, target in listed:
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in _FILE.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def named(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from named(inner)

    assert sorted(named(site["nav"])) == [page.name for page in PAGES[1:]]


def test_readme_is_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The table below a heading: the other cells of each row, by the name in its first."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"# {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table[0].splitlines()[2:]]
    return {first.strip().strip("`"): [cell.strip() for cell in rest] for first, *rest in cells}


def test_all_options_are_documented_with_their_defaults() -> None:
    documented = {
        name: default.strip("`") for name, (default, _) in rows("usage.md", "Options").items()
    }
    defaults = {}
    for field in fields(popc.Config):
        value = field.default if field.default is not MISSING else field.default_factory()
        defaults[field.name] = repr(value).replace("'", '"')
    assert documented == defaults


def test_all_policies_are_documented() -> None:
    text = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    for name in policies.names():
        assert f"`{name}`" in text, name


def test_all_commands_are_documented() -> None:
    documented = {name.split()[1] for name in rows("cli.md", "The command line")}
    commands = cli.app.registered_commands
    assert documented == {c.name or c.callback.__name__ for c in commands if c.callback is not None}


def test_all_layers_are_documented() -> None:
    documented = {name for key in rows("architecture.md", "Layers") for name in key.split("`, `")}
    parts = {path.name.removesuffix(".py") for path in (ROOT / "popc").iterdir()}
    assert documented == {part for part in parts if part[0] != "_" and part != "py.typed"}


def test_policies_of_the_page_are_those_of_the_examples() -> None:
    blocks = [example.code for example in examples(ROOT / "docs" / "add-a-policy.md")]
    classes = [code[code.index("\nclass ") :] for code in blocks if "\nclass " in code]
    files = ("unit_policy.py", "input_policy.py")
    for code, name in zip(classes, files, strict=True):
        shown = code[: code.index("\n\n\n", 1)]
        assert shown in (ROOT / "examples" / name).read_text(encoding="utf-8")
