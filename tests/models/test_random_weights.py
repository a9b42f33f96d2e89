"""Random weights built on the device equal the same weights loaded from disk, bit for bit."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from transformers import AutoModelForImageTextToText

import tiny
from eightgig import registry
from eightgig.models import random_weights
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.models.quantization import quantization_config
from eightgig.models.random_weights import build_random, random_tensor
from eightgig.registry import ModelSpec
from tiny_training import CPU, load_tiny, tiny_config, tiny_inputs

SEED = 11


def _twin(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> Path:
    """The same random weights, put into an ordinary 16-bit model and saved."""
    model = AutoModelForImageTextToText.from_config(spec.family.build_config(spec.facts), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, parameter.shape, seed=SEED, device=CPU, dtype=dtype))
    model.save_pretrained(folder)
    tiny.build_tiny_processor().save_pretrained(folder)
    return folder


def _spec(folder: Path, *, tied: bool) -> ModelSpec:
    spec = registry.resolve(str(tiny.build_tiny_llava(folder)))
    text = {**spec.facts.architecture["text_config"], "tie_word_embeddings": tied}
    architecture = {**spec.facts.architecture, "text_config": text, "tie_word_embeddings": tied}
    return dataclasses.replace(spec, facts=dataclasses.replace(spec.facts, architecture=architecture))


def _load(spec: ModelSpec, precision: str, training: dict | None = None) -> LoadedModel:
    config = tiny_config({"model": {"random_weights_seed": SEED}, "training": training or {}}, precision=precision)
    return load_model(config, spec, CPU, choose_precision(config.hardware.mixed_precision, CPU))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_random_build_equals_its_twin_from_disk(tmp_path: Path, precision: str, tied: bool) -> None:
    spec = _spec(tmp_path / "facts", tied=tied)
    built = _load(spec, precision)
    twin = load_tiny(_twin(tmp_path / "twin", spec, built.precision.compute_dtype), tiny_config(precision=precision))
    theirs = dict(twin.model.named_parameters())
    assert [name for name, _ in built.model.named_parameters()] == list(theirs)
    for name, parameter in built.model.named_parameters():
        assert type(parameter) is type(theirs[name]), name
        assert torch.equal(parameter.data, theirs[name].data), name
        if isinstance(parameter, bnb.nn.Params4bit):
            _assert_same_state(parameter.quant_state, theirs[name].quant_state)
    buffers = dict(twin.model.named_buffers())
    assert [name for name, _ in built.model.named_buffers()] == list(buffers)
    for name, buffer in built.model.named_buffers():
        assert buffer.dtype is buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name
    inputs = tiny_inputs(built)
    with torch.no_grad():
        assert torch.equal(built.model(**inputs).logits, twin.model(**inputs).logits)
    assert (built.model.lm_head.weight is built.model.get_input_embeddings().weight) is tied
    assert built.receipt.rows == twin.receipt.rows


def _assert_same_state(ours: bnb.functional.QuantState, theirs: bnb.functional.QuantState) -> None:
    assert (ours.shape, ours.dtype, ours.blocksize, ours.quant_type) == (
        theirs.shape,
        theirs.dtype,
        theirs.blocksize,
        theirs.quant_type,
    )
    assert torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(ours.offset, theirs.offset)
    assert torch.equal(ours.state2.absmax, theirs.state2.absmax)


def test_without_4bit_the_weights_are_the_16bit_ones(tmp_path: Path) -> None:
    spec = _spec(tmp_path / "facts", tied=False)
    loaded = _load(spec, "bf16", {"method": "lora"})
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, random_tensor(name, parameter.shape, seed=SEED, device=CPU, dtype=torch.bfloat16))


def test_peft_takes_a_random_build_for_a_4bit_model(tmp_path: Path) -> None:
    loaded = _load(_spec(tmp_path / "facts", tied=False), "bf16")
    attach_adapters(loaded, tiny_config(precision="bf16"))
    assert sum(isinstance(module, LoraLinear4bit) for module in loaded.model.modules()) == 14
    assert loaded.model.get_base_model().config.quantization_config.load_in_4bit


def test_weights_depend_on_seed_and_name_alone() -> None:
    def draw(name: str, seed: int) -> torch.Tensor:
        return random_tensor(name, (64, 32), seed=seed, device=CPU, dtype=torch.float32)

    torch.manual_seed(0)
    first = draw("a.weight", 1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(draw("a.weight", 1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw("b.weight", 1), first)
    assert not torch.equal(draw("a.weight", 2), first)
    assert 0.018 < float(first.std()) < 0.022


@pytest.mark.parametrize(("name", "shape", "value"), [("x.norm.weight", (8,), 1.0), ("x.proj.bias", (8,), 0.0)])
def test_norms_start_at_one_and_biases_at_zero(name: str, shape: tuple[int, ...], value: float) -> None:
    assert torch.equal(random_tensor(name, shape, seed=1, device=CPU, dtype=torch.float32), torch.full(shape, value))


def test_a_registry_model_gets_a_stand_in_processor_and_no_folder_is_read(tmp_path: Path) -> None:
    spec = _spec(tmp_path / "facts", tied=False)
    vision, text = dict(spec.facts.architecture["vision_config"]), dict(spec.facts.architecture["text_config"])
    facts = dataclasses.replace(
        registry.get("llava-1.5-7b").facts,
        architecture={
            **registry.get("llava-1.5-7b").facts.architecture,
            "vision_config": {**vision, "patch_size": 14, "image_size": 336},
            "text_config": {**text, "vocab_size": 32064},
        },
        num_language_linears=14,
    )
    loaded = _load(ModelSpec(spec.family, facts), "fp32")
    inputs = tiny_inputs(loaded, image_px=336)
    assert loaded.spec.family.hidden_states(loaded.model, inputs).shape[:2] == inputs["input_ids"].shape
    assert loaded.model.name_or_path == "llava-hf/llava-1.5-7b-hf"


def test_no_4bit_weight_outlives_its_quantisation_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec(tmp_path / "facts", tied=False)
    config = tiny_config()
    drawn: dict[str, weakref.ref[torch.UntypedStorage]] = {}
    alive: list[set[str]] = []

    def recording(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        alive.append({earlier for earlier, storage in drawn.items() if storage() is not None})
        values = random_tensor(name, *args, **kwargs)
        drawn[name] = weakref.ref(values.untyped_storage())
        return values

    monkeypatch.setattr(random_weights, "random_tensor", recording)
    quantization = quantization_config(config, spec, CPU, choose_precision(config.hardware.mixed_precision, CPU))
    model = build_random(spec, seed=1, device=CPU, dtype=torch.float32, quantization_config=quantization)
    quantised = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(quantised) == 14
    assert quantised <= set(drawn)
    assert all(not names & quantised for names in alive)
    assert "lm_head.weight" in drawn
    assert drawn["lm_head.weight"]() is not None  # the recording itself works: what stays 16-bit is alive
