"""The saved result in a fresh process: plain transformers and PEFT give the trained model's logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny
from eightgig.config import TrainingConfig
from eightgig.core.errors import CheckpointError
from eightgig.data.batch import IGNORE_INDEX, MicroBatch
from eightgig.export import reload, verify
from eightgig.export.adapter import save_adapter, save_full_model
from eightgig.export.reference import MAX_POSITIONS, compared_positions, read_reference, write_reference
from eightgig.export.verify import ReloadPlan, reload_plan, verify_in_fresh_process
from eightgig.models.load import LoadedModel
from tiny_training import CPU, load_tiny, text_loss, tiny_config, tiny_inputs, trainable


def _train(folder: Path, config: TrainingConfig) -> LoadedModel:
    """A few steps with a large learning rate, so that the result differs clearly from the base model."""
    loaded = load_tiny(folder, config, adapters=True)
    optimizer = torch.optim.AdamW(trainable(loaded.model), lr=2e-2)
    image_px = config.data.image_size or 32
    for seed in range(4):
        text_loss(loaded, tiny_inputs(loaded, seed=seed, image_px=image_px)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loaded


def _batches(loaded: LoadedModel, *, image_px: int = 32) -> list[MicroBatch]:
    batches = []
    for seed in (7, 8):
        inputs = tiny_inputs(loaded, num_images=2, seed=seed, image_px=image_px)
        inputs["pixel_values"] = inputs["pixel_values"].float()
        labels = inputs["input_ids"].clone()
        labels[:, :-6] = IGNORE_INDEX
        batches.append(MicroBatch(inputs, labels, 12, labels.numel(), 2, (f"{seed}a", f"{seed}b")))
    return batches


def _saved(tmp_path: Path, config: TrainingConfig, *, num_layers: int = 2) -> tuple[ReloadPlan, Path]:
    """The plan and the reference of a short run with `config`, saved below `tmp_path`."""
    folder = tiny.build_tiny_llava(tmp_path / "base", num_layers=num_layers)
    loaded = _train(folder, config)
    saved, reference = tmp_path / "saved", tmp_path / "reference.safetensors"
    if config.training.lora is None:
        save_full_model(loaded.model, loaded.processor, saved)
    else:
        save_adapter(loaded.model, saved)
    write_reference(loaded, _batches(loaded, image_px=config.data.image_size or 32), reference)
    return reload_plan(config, loaded.spec, CPU, loaded.precision, saved), reference


@pytest.mark.parametrize(
    ("sections", "precision", "how"),
    [
        ({}, "bf16", "plain transformers and peft"),
        ({"data": {"image_size": 48}}, "fp32", "positions interpolated"),
        ({"training": {"method": "full", "lora": None}}, "bf16", "plain transformers: from_pretrained"),
        ({"model": {"random_weights_seed": 3}}, "fp32", "rebuilt with random weights 3"),
        ({"training": {"method": "full", "lora": None}}, "fp32", "plain transformers: from_pretrained"),
        (
            {"training": {"method": "full", "lora": None}, "data": {"image_size": 48}},
            "fp32",
            "plain transformers: from_pretrained",
        ),
    ],
    ids=["qlora", "other image size", "full asked in bf16", "random weights", "full", "full at another image size"],
)
def test_a_reload_gives_the_trained_models_logits(tmp_path: Path, sections: dict, precision: str, how: str) -> None:
    plan, reference = _saved(tmp_path, tiny_config(sections, precision=precision))
    result = reload.compare(plan, reference)
    assert result.ok
    assert result.relative_difference <= 1e-5
    assert how in result.how
    if plan.base is not None:
        assert result.adapter_effect is not None
        assert result.adapter_effect > 5 * result.tolerance


@pytest.mark.parametrize("random_weights_seed", [None, 3])
def test_weights_that_lay_in_ram_lie_there_again(tmp_path: Path, random_weights_seed: int | None) -> None:
    """The saved adapter is that of a run without; the reloading process needs as little of the GPU as the run."""
    plans = {}
    for name, hardware in (("plain", {}), ("in RAM", {"streamed_layers": 3, "embedding_on_host": True})):
        model = {"random_weights_seed": random_weights_seed}
        config = tiny_config({"model": model, "hardware": {"device": "cpu", **hardware}}, precision="fp32")
        plans[name] = _saved(tmp_path / name, config, num_layers=4)
        result = reload.compare(*plans[name])
        assert result.ok
        assert result.relative_difference <= 1e-5
        assert result.adapter_effect > 5 * result.tolerance
        assert ("3 of its layers streamed by EightGig, its embeddings looked up in RAM" in result.how) is bool(hardware)
    plain, ours = (load_file(tmp_path / name / "saved" / "adapter_model.safetensors") for name in plans)
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_the_fresh_process_does_the_same(tmp_path: Path) -> None:
    plan, reference = _saved(tmp_path, tiny_config())
    result = verify_in_fresh_process(plan, reference)
    assert result.ok
    assert result == reload.compare(plan, reference)
    assert str(tmp_path / "base") in result.how


def test_a_changed_adapter_fails_the_comparison(tmp_path: Path) -> None:
    plan, reference = _saved(tmp_path, tiny_config())
    path = tmp_path / "saved" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "layers.1.mlp.down_proj.lora_B" in name)
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, path)
    result = reload.compare(plan, reference)
    assert not result.ok
    assert result.relative_difference > result.tolerance


def test_logits_that_are_not_numbers_fail_the_comparison(tmp_path: Path) -> None:
    plan, reference = _saved(tmp_path, tiny_config())
    path = tmp_path / "saved" / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, float("nan")) for name, value in load_file(path).items()}, path)
    assert not reload.compare(plan, reference).ok


def test_a_failing_process_shows_its_last_lines(tmp_path: Path) -> None:
    plan, reference = _saved(tmp_path, tiny_config())
    path = tmp_path / "saved" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ended with status 1:[\s\S]*SafetensorError: .*incomplete"):
        verify_in_fresh_process(plan, reference)


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ReloadPlan("x", None, None, "saved", "float32", "cpu", None, (), (), None, 1e-4)
    program = tmp_path / "sleeper"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setattr(verify.sys, "executable", str(program))
    with pytest.raises(CheckpointError, match=r"did not end within 0\.2 s"):
        verify_in_fresh_process(plan, tmp_path / "reference", timeout_s=0.2)


def test_the_plan_carries_cap_and_revision_where_they_mean_something(tmp_path: Path) -> None:
    loaded = load_tiny(tiny.build_tiny_llava(tmp_path), tiny_config())
    config = tiny_config({"hardware": {"device": "auto", "cap_gib": 7.25}, "model": {"revision": "v1"}})
    on_gpu = reload_plan(config, loaded.spec, torch.device("cuda", 0), loaded.precision, tmp_path / "saved")
    on_cpu = reload_plan(config, loaded.spec, CPU, loaded.precision, tmp_path / "saved")
    assert (on_gpu.cap_gib, on_cpu.cap_gib) == (7.25, None)
    assert on_gpu.revision is None  # a folder has no revisions
    facts = dataclasses.replace(loaded.spec.facts, folder=None, hub_id="a/b")
    spec = dataclasses.replace(loaded.spec, facts=facts)
    assert reload_plan(config, spec, CPU, loaded.precision, tmp_path / "saved").revision == "v1"
    assert json.loads(json.dumps(dataclasses.asdict(on_gpu)))["quantization"]["bnb_4bit_quant_type"] == "nf4"


def test_the_adapter_loads_in_plain_libraries_and_answers(tmp_path: Path) -> None:
    """The user's own way: nothing of EightGig."""
    loaded = _train(tiny.build_tiny_llava(tmp_path / "base"), tiny_config({"training": {"method": "lora"}}))
    save_adapter(loaded.model, tmp_path / "saved")
    base_name = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_name == str(tmp_path / "base")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base_name), tmp_path / "saved")
    inputs = tiny_inputs(loaded)
    loaded.model.eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.eval().generate(**inputs, **options), loaded.model.generate(**inputs, **options))


def test_a_full_model_is_saved_with_its_processor(tmp_path: Path) -> None:
    config = tiny_config({"training": {"method": "full", "lora": None}, "data": {"image_size": 48}})
    _saved(tmp_path, config)
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert dict(processor.image_processor.crop_size) == {"height": 48, "width": 48}


def test_the_reference_holds_inputs_and_the_logits_of_target_positions(tmp_path: Path) -> None:
    loaded = load_tiny(tiny.build_tiny_llava(tmp_path), tiny_config())
    batches = _batches(loaded)
    write_reference(loaded, batches, tmp_path / "reference.safetensors")
    read = list(read_reference(tmp_path / "reference.safetensors"))
    assert len(read) == 2
    for batch, stored in zip(batches, read, strict=True):
        assert all(torch.equal(stored.inputs[name], value) for name, value in batch.model_inputs.items())
        with torch.no_grad():
            logits = loaded.model(**batch.model_inputs).logits
        assert torch.equal(stored.logits, logits[:, -7:-1].flatten(0, 1))


def test_compared_positions_predict_targets_or_end_the_rows() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, 7, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = MicroBatch({"attention_mask": mask}, labels, 3, 8, 0, ("a", "b"))
    assert compared_positions(batch).tolist() == [[0, 1], [0, 3], [1, 0]]
    without = dataclasses.replace(batch, labels=torch.full_like(labels, IGNORE_INDEX))
    assert compared_positions(without).tolist() == [[0, 4], [1, 2]]
    long = dataclasses.replace(batch, labels=torch.ones(3, 100, dtype=torch.long))
    assert len(compared_positions(long)) == MAX_POSITIONS
