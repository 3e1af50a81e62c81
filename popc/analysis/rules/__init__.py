"""Rules: what each op does to the labels of channels; see :mod:`popc.analysis.rules.table`."""

from __future__ import annotations

import popc.analysis.rules.table  # noqa: F401  # it fills the table of traits
