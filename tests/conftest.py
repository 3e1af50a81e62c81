"""One thread for each test process: the models are tiny, and the processes share the machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
