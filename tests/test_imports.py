"""Imports go one way: what stands lower in this list knows nothing of what stands higher."""

from __future__ import annotations

import ast
from pathlib import Path

import popc
from tests.helpers import private_names

LAYERS = """
errors log version files plots compat stages ops quant policies config analysis planning sessions
passes codegen runtime backend
compiled_model api models tools bench report harness testing cli
""".split()
ROOT = Path(popc.__file__).parent


def imported(path: Path) -> set[str]:
    """The parts of popc that a file imports when it is itself imported."""
    parts = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("popc"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts.update(name.split(".")[1] for name in names)
    return parts


def test_imports_go_one_way() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for other in imported(path) & set(LAYERS):
            if LAYERS.index(other) > LAYERS.index(part):
                wrong.append(f"{path.relative_to(ROOT)} imports popc.{other}")
    assert not wrong, "\n".join(wrong)


def test_private_names_of_torch_are_in_one_folder() -> None:
    private = {path.relative_to(ROOT): private_names.of_torch(path) for path in ROOT.rglob("*.py")}
    named = {path: names for path, names in private.items() if names}
    assert named and {path.parts[0] for path in named} == {"compat"}, named


def test_every_part_has_its_place() -> None:
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.name[0] != "_"}
    assert parts - {"py.typed"} == set(LAYERS)
