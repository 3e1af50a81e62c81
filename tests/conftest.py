"""One thread for each test process: the models are tiny, and the processes share the machine."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tracing makes many small objects that live for long: a tenth of the time went to looking at them.
gc.set_threshold(200_000, 20, 100)
