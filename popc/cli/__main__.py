"""``python -m popc.cli``, as the command ``popc``."""

from __future__ import annotations

from popc.cli import app

app()
