"""A picture of a model's layers: SVG and CSS that need nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

_KINDS = ("mlp", "attention", "experts", "refused")
_LEFT, _RIGHT, _HEIGHT, _GAP = 230, 730, 24, 4


@dataclass(frozen=True)
class Box:
    """A region or a refused linear: ``size`` in bytes, of which ``unread`` is the share pruned."""

    kind: str
    name: str
    size: int
    unread: float
    text: str


def layers(boxes: Iterable[Box]) -> dict[str, list[Box]]:
    """The boxes of each layer, in the order of their first."""
    by_layer: dict[str, list[Box]] = {}
    for box in boxes:
        by_layer.setdefault(_layer(box.name), []).append(box)
    return by_layer


def _layer(name: str) -> str:
    """A layer's path: up to its first number, or without the last part."""
    numbered = re.match(r".*?(?<![^.])\d+(?![^.])", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name


def picture(layers: dict[str, list[Box]]) -> str:
    """An SVG: one row of boxes for each layer, as wide as the square roots of their bytes."""
    widest = max((_width(row) for row in layers.values()), default=1.0)
    scale = (_RIGHT - _GAP * max(map(len, layers.values()), default=0)) / widest
    parts = []
    for i, (layer, row) in enumerate(layers.items()):
        y, x = i * (_HEIGHT + _GAP), float(_LEFT)
        label = layer if len(layer) <= 32 else f"…{layer[-31:]}"
        parts.append(f'<text class="layer" x="{_LEFT - 8}" y="{y + 16}">{escape(label)}</text>')
        for box in row:
            width = max(2.0, scale * box.size**0.5)
            parts.append(_drawn(box, x, y, width))
            x += width + _GAP
    height = len(layers) * (_HEIGHT + _GAP)
    return (
        f'<svg viewBox="0 0 {_LEFT + _RIGHT} {height}" role="img" aria-label="the layers">'
        f"{_HATCH}\n" + "\n".join(parts) + "</svg>"
    )


def _width(row: list[Box]) -> float:
    return sum(box.size**0.5 for box in row)


def _drawn(box: Box, x: float, y: float, width: float) -> str:
    def rect(kind: str, left: float, wide: float) -> str:
        place = f'x="{left:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{_HEIGHT}"'
        return f'<rect class="{kind}" {place}/>'

    unread = max(0.0, width * box.unread)
    inner = rect(box.kind, x, width)
    if unread:
        inner += rect("unread", x + width - unread, unread)
    part = box.name.rpartition(".")[2] if box.kind == "refused" else box.kind
    if 7 * len(part) + 8 < width - unread:
        inner += f'<text x="{x + 5:.1f}" y="{y + 16:.1f}">{escape(part)}</text>'
    return f"<g><title>{escape(box.text)}</title>{inner}</g>"


def legend() -> str:
    """What the colours of the picture mean, as HTML."""
    names = [*((kind, kind) for kind in _KINDS), ("unread", "not read in a decode step")]
    items = "".join(
        f'<span><svg viewBox="0 0 14 14" width="14" height="14">'
        f'<rect class="{kind}" width="14" height="14"/></svg> {name}</span>'
        for kind, name in names
    )
    return f'<p class="legend">{items}<span>width: square root of the bytes</span></p>'


_HATCH = (
    '<defs><pattern id="popc-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" class="gap"/>'
    '<rect width="2" height="6" class="stripe"/></pattern></defs>'
)
