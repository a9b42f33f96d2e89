"""The configuration snippet that the project promises to run as written."""

from __future__ import annotations

from pathlib import Path

SNIPPET = """
from eightgig.config import (ConfigPresets, TrainingConfig, TrainingHyperparameters, TrainingMethod, LoRAConfig,
                             QuantizationConfig, DataConfig, HardwareConfig, MixedPrecision)
config = ConfigPresets.ultra_low_memory(data_path="./output/splits/train.jsonl", val_path="./output/splits/val.jsonl")
TrainingConfig(
    training=TrainingHyperparameters(method=TrainingMethod.QLORA, batch_size=1, gradient_accumulation_steps=32,
        lora=LoRAConfig(rank=8, alpha=16),
        quantization=QuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")),
    data=DataConfig(max_length=512, image_size=336),
    hardware=HardwareConfig(gradient_checkpointing=True, mixed_precision=MixedPrecision.BF16))
"""  # noqa: E501 - kept to the letter


def test_the_snippet_runs_as_written_and_the_preset_is_what_it_spells_out() -> None:
    names: dict[str, object] = {}
    exec(SNIPPET.replace("\nTrainingConfig(", "\nspelled_out = TrainingConfig("), names)
    preset, spelled_out = names["config"], names["spelled_out"]

    assert preset.data.data_path == Path("output/splits/train.jsonl")
    assert preset.data.val_path == Path("output/splits/val.jsonl")
    for section, settings in (
        ("training", ("method", "batch_size", "gradient_accumulation_steps", "lora")),
        ("data", ("max_length", "image_size")),
        ("hardware", ("gradient_checkpointing", "mixed_precision")),
    ):
        for setting in settings:
            assert getattr(getattr(preset, section), setting) == getattr(getattr(spelled_out, section), setting)
    quantization = preset.training.quantization
    assert quantization.load_in_4bit
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant
    # `auto` is the mixed precision's type: bfloat16, as spelled out, wherever the card has it
    assert quantization.bnb_4bit_compute_dtype == "auto"
    assert spelled_out.training.quantization.bnb_4bit_compute_dtype == "bfloat16"


def test_the_snippet_without_changes_prints_and_raises_nothing(capsys) -> None:
    exec(SNIPPET, {})
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
