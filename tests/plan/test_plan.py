"""What a plan says, and what it must never say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import build_tiny_llava

from eightgig.app.planning import plan_run
from eightgig.config import ConfigPresets, MixedPrecision
from eightgig.core.errors import ConfigError
from eightgig.core.units import GIB
from eightgig.plan.plan import planned_precision
from eightgig.registry.gpus import get_gpu


def test_llava_13b_does_not_fit_8_gb_and_counts_its_image_tokens() -> None:
    config = ConfigPresets.ultra_low_memory(overrides={"model.name": "llava-1.5-13b"})
    planned = plan_run(config, gpu="RTX 4060")
    assert planned.fits is False
    assert planned.workload["num_tokens"] == 512 + 576
    assert sum(planned.breakdown.values()) == planned.peak.device_bytes
    assert all(size >= 0 for size in planned.breakdown.values())
    assert planned.peak.device_bytes > 9 * GIB  # 8.27 GiB were allocated for 668 tokens (full_size.json)


def test_a_tiny_model_fits_and_its_plan_is_json(tmp_path: Path) -> None:
    folder = build_tiny_llava(tmp_path / "model", image_px=32)
    config = ConfigPresets.ultra_low_memory(overrides={"model.name": str(folder), "data.image_size": 32})
    planned = plan_run(config, vram_gib=2, reserve_gib=0.5)
    assert planned.fits is True
    assert planned.budget_bytes == int(1.5 * GIB)
    found = json.loads(json.dumps(planned.to_json()))
    assert found["gpu"] == "2 GiB card"
    assert set(found["phases"]) == {"load", "validate", "train", "save"}
    assert found["peak"]["device_bytes"] == max(found["phases"].values())
    assert plan_run(config, vram_gib=0.5).fits is False


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    config = ConfigPresets.ultra_low_memory(overrides={"model.name": "llava-1.5-7b"})
    with pytest.raises(ConfigError, match="RTX 4060"):
        plan_run(config, gpu="RTX 4061")


def test_a_card_without_bf16_is_planned_in_fp16() -> None:
    config = ConfigPresets.ultra_low_memory(overrides={"hardware.mixed_precision": "bf16"})
    assert planned_precision(config, get_gpu("RTX 2070")).mixed_precision is MixedPrecision.FP16
    assert planned_precision(config, get_gpu("RTX 3060 12GB")).mixed_precision is MixedPrecision.BF16
