"""What every test starts from: one thread, no hub, quiet libraries, repeatable property tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `--import-mode=importlib` puts no folder on the path: this lets each room's tests import `tiny`, or `tests.tiny`.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

# Before any test module imports transformers, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

# More threads make the tiny models of the tests slower, and sums may then differ in their last bits.
torch.set_num_threads(1)

settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")
