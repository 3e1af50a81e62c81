"""Statistics of sequences, for as many as a call has."""

from __future__ import annotations

from torch import Tensor


def for_rows(known: Tensor | None, rows: int) -> Tensor | None:
    """What was measured of sequences ``[S, ...]``, for as many ``rows`` as a call has now.

    The cache of one sequence can be repeated for several, as with a prefix that they share. None if
    nothing is known, or if the sequences differ and are of another number.
    """
    if known is None or len(known) == rows:
        return known
    if len(known) > 1 and rows_differ(known):
        return None
    return known[:1].expand(rows, *known.shape[1:])


def rows_differ(known: Tensor) -> bool:
    """Whether the sequences of ``known [S, ...]`` have statistics of their own."""
    return bool((known != known[:1]).any())
