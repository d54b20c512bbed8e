"""Settings of every unit test: repeatable, on one thread."""

from __future__ import annotations

import torch
from hypothesis import settings

# Repeatable runs; no database, which would write into the repository.
settings.register_profile("unit", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("unit")
torch.set_num_threads(1)
