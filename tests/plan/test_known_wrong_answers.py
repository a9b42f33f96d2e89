"""What others count wrong: images without a limit, image tokens beside text, a 13B model on 8 GB."""

from __future__ import annotations

from eightgig.app.planning import plan_run
from eightgig.config import ConfigPresets
from eightgig.plan.workload import largest_workload, workload_sizes
from eightgig.registry import resolve
from eightgig.registry.gpus import all_gpus


def sizes_of(model: str, **overrides: object) -> dict[str, int]:
    config = ConfigPresets.ultra_low_memory(overrides={"model.name": model, **overrides})
    return workload_sizes(largest_workload(config, resolve(model)))


def test_an_image_without_a_limit_has_16384_tokens() -> None:
    """12,845,056 pixels, the published max_pixels of Qwen2-VL, at 28 × 28 a token."""
    assert 16_384 * 28 * 28 == 12_845_056
    sizes = sizes_of("qwen2-vl-2b", **{"data.image_size": None})
    assert (sizes["num_image_tokens"], sizes["num_text_tokens"]) == (16_384, 512)
    assert sizes["num_tokens"] == 16_384 + 512


def test_a_llava_image_comes_on_top_of_the_text() -> None:
    """(336 / 14)² = 576 tokens beside 512 of text."""
    assert sizes_of("llava-1.5-7b") == {
        "num_samples": 1,
        "num_images": 1,
        "num_tokens": 1_088,
        "num_text_tokens": 512,
        "num_image_tokens": 576,
    }


def test_images_of_every_sample_of_a_micro_batch_count() -> None:
    sizes = sizes_of("llava-1.5-7b", **{"training.batch_size": 3, "data.max_length": 64})
    assert (sizes["num_images"], sizes["num_image_tokens"], sizes["num_text_tokens"]) == (3, 3 * 576, 3 * 64)


def test_llava_13b_does_not_fit_8_gb_even_with_the_smallest_settings() -> None:
    smallest = {"data.max_length": 32, "training.lora.rank": 1, "training.loss_chunk_tokens": 1}
    config = ConfigPresets.ultra_low_memory(overrides={"model.name": "llava-1.5-13b", **smallest})
    roomiest = max((card for card in all_gpus() if card.vram_gb == 8), key=lambda card: card.vram_bytes)
    planned = plan_run(config, gpu=roomiest.name)
    assert planned.fits is False
    assert planned.workload["num_text_tokens"] == 32
