"""Lets the tests of this folder import the modules beside them; the recorded weights, loaded as they were published."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import qwen_vl_golden
from qwen_vl_published import write_published_folder
from transformers import AutoModelForImageTextToText

from eightgig.models.qwen_vl.registration import register


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layout: config.json, three `.bin` shards and their index, with the recorded weights."""
    folder = tmp_path_factory.mktemp("published")
    return write_published_folder(folder, qwen_vl_golden.CONFIG, qwen_vl_golden.published_weights())


@pytest.fixture(scope="module")
def model(published: Path) -> Any:
    """The model in `published`, in fp32 and eval mode."""
    register()
    return AutoModelForImageTextToText.from_pretrained(published, dtype=torch.float32)
