"""Imports go one way: what stands lower in this list knows nothing of what stands higher."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import popc

LAYERS = """
errors log version files plots compat ops policies config analysis planning passes runtime backend
compiled_model api models tools bench report harness testing cli
""".split()
ROOT = Path(popc.__file__).parent


def imported(path: Path) -> set[str]:
    """The parts of popc that a file imports when it is itself imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("popc"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name.split(".")[1] for name in names)
    return found


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


def private_names(path: Path) -> Iterator[str]:
    """What a file names of torch that torch marks as private."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch" and node.attr[0] == "_" and node.attr[:2] != "__":
                yield f"torch.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._"):
            yield str(node.module)


def test_private_names_of_torch_stand_in_one_module() -> None:
    found = {path.name: set(private_names(path)) for path in ROOT.rglob("*.py")}
    assert found.pop("dynamo.py")
    assert not {name: names for name, names in found.items() if names}


def test_every_part_has_its_place() -> None:
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.name[0] != "_"}
    assert parts - {"py.typed"} == set(LAYERS)
