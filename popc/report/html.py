"""Pages that need nothing from outside: HTML, its style, and tables for a terminal as well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rich.table import Table
from rich.text import Text


def page(title: str, body: str) -> str:
    """A whole HTML document; ``body`` is HTML, the title is not."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title></head>\n"
        f'<body style="margin: 0">{body}</body></html>\n'
    )


@dataclass(frozen=True)
class Sheet:
    """A table as plain strings; ``numbers`` are the columns to align at the right."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...] = ()

    def rich(self) -> Table:
        """As a table for a terminal."""
        table = Table(title=Text(self.title), title_justify="left")
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i in self.numbers else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))  # Text: a name is no markup
        return table

    def html(self) -> str:
        """As a heading and a table of a page; texts are escaped."""

        def line(tag: str, cells: Iterable[str]) -> str:
            align = [' class="n"' if i in self.numbers else "" for i in range(len(self.headings))]
            pairs = zip(align, cells, strict=True)
            return "<tr>" + "".join(f"<{tag}{a}>{escape(c)}</{tag}>" for a, c in pairs) + "</tr>\n"

        body = "".join(line("td", row) for row in self.rows)
        head = line("th", self.headings)
        return (
            f"<h2>{escape(self.title)}</h2>\n<div class='wide'><table>\n"
            f"<thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n"
        )


CSS = """
.popc { --ink: #1c2024; --paper: #fff; --line: #d8dce0; --refused: #b4bac1; --mlp: #3f8fd9;
  --attention: #e39a2d; --experts: #4aa564; color: var(--ink); background: var(--paper);
  font: 14px/1.45 system-ui, sans-serif; padding: 16px 24px; max-width: 1400px; margin: auto; }
@media (prefers-color-scheme: dark) {
  .popc { --ink: #e4e7ea; --paper: #16191c; --line: #3a4046; --refused: #5b636b; --mlp: #2f74b5;
    --attention: #b57417; --experts: #36824c; }
}
.popc h1 { font-size: 20px; } .popc h2 { font-size: 15px; font-weight: 600; margin-top: 28px; }
.popc svg { width: 100%; max-width: 1000px; } .popc .legend svg { width: 14px; height: 14px; }
.popc svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.popc .layer { text-anchor: end; }
.popc .mlp { fill: var(--mlp); } .popc .attention { fill: var(--attention); }
.popc .experts { fill: var(--experts); } .popc .refused { fill: var(--refused); }
.popc .unread { fill: url(#popc-hatch); }
.popc .gap { fill: var(--paper); opacity: .65; }
.popc .stripe { fill: var(--ink); opacity: .45; }
.popc .legend span { margin-right: 18px; } .popc .legend svg { vertical-align: -2px; }
.popc .wide { overflow-x: auto; } .popc table { border-collapse: collapse; }
.popc th, .popc td { text-align: left; vertical-align: top; padding: 3px 9px;
  border-bottom: 1px solid var(--line); } .popc .n { text-align: right; white-space: nowrap; }
"""
