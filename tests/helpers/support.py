"""The table in ``docs/support.md``, from the zoo: ``python -m tests.helpers.support`` writes it.

What it says is what ``tests/test_zoo.py`` checks.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.zoo import ZOO, Entry

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
START, END = (
    "<!-- support table: python -m tests.helpers.support -->",
    "<!-- end of support table -->",
)
KINDS = {
    "causal": "decoder",
    "seq2seq": "encoder and decoder",
    "encoder": "encoder",
    "vlm": "vision and language",
}


def table() -> str:
    """Architectures with the same regions in one row, counted in models of two layers."""
    rows: dict[tuple[str, tuple[int, int, int]], list[str]] = {}
    for entry in ZOO:
        rows.setdefault((KINDS[entry.kind], entry.expected), []).append(entry.name)
    lines = ["| | MLP | attention | experts | architectures |", "|---|---|---|---|---|"]
    for (kind, counts), names in rows.items():
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} | {', '.join(names)} |")
    refused = [entry for entry in ZOO if any(entry.refused)]
    lines += ["", "Refused, though an expert could prune it:", ""]
    lines += [f"- {entry.name}: {_missing(entry)}; {_why(entry)}" for entry in refused]
    return "\n".join(lines)


def _missing(entry: Entry) -> str:
    kinds = ("MLP", "attention", "experts")
    return ", ".join(f"{n} {kind}" for n, kind in zip(entry.refused, kinds, strict=True) if n)


def _why(entry: Entry) -> str:
    return entry.note.rpartition("refused: ")[2]


def with_table(text: str) -> str:
    """``text`` with the table in its place."""
    body = f"{START}\n{table()}\n{END}"
    return re.sub(f"{re.escape(START)}.*{re.escape(END)}", lambda _: body, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
