"""The checks that every family must pass, on a tiny model of it: training, labels, image tokens, generation, receipt.

Each takes a `Case`; `test_families.py` runs them all for every family in tests/tiny_families.
"""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny
from eightgig import registry
from eightgig.config import Batching, MixedPrecision, TrainingConfig
from eightgig.core.errors import ConfigError, UnsupportedModel
from eightgig.data.batch import IGNORE_INDEX, EncodedSample, MicroBatch
from eightgig.data.collate import collate, pack
from eightgig.data.encode import Encoder
from eightgig.data.loader import StepLoader
from eightgig.data.order import StepOrder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.data.sources import load_samples
from eightgig.export import reload
from eightgig.export.adapter import save_adapter
from eightgig.export.reference import write_reference
from eightgig.export.verify import reload_plan
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.host_copies import Transfers
from eightgig.models import load
from eightgig.models.adapters import attach_adapters, check_gradients
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.packed_rows import pack_as_configured
from eightgig.models.precision import Precision
from eightgig.models.random_weights import build_random
from eightgig.models.trainable import trainable_parameters
from eightgig.registry import ModelSpec
from eightgig.registry.family import base_model
from eightgig.step.build import checkpoint_as_configured, offload_as_configured, tile_as_configured
from eightgig.step.step import Compute, TrainingStep, batch_loss_sum
from lever_numerics import Outcome, assert_close, outcome_of, randomise_lora_b
from tiny_family import FIRST_SIZE, SECOND_SIZE, WIDE_SIZE, TinyFamily
from tiny_training import CPU, load_tiny, tiny_config

NUM_STEPS = 3
NUM_NEW_TOKENS = 4
NUM_RANDOM_SIZES = 200
BATCH_SIZE = 2

CONFIG = tiny_config(
    {"training": {"lora": {"rank": 4, "alpha": 8}, "batch_size": BATCH_SIZE, "gradient_accumulation_steps": 2}}
)


@dataclass(frozen=True)
class Case:
    """One family's tiny model on disk, and the data that it is trained with."""

    tiny: TinyFamily
    folder: Path
    samples: tuple[Sample, ...]
    workplace: Path

    @property
    def spec(self) -> ModelSpec:
        """What the registry makes of the folder."""
        return registry.resolve(str(self.folder))


@dataclass(frozen=True)
class Trained:
    """A model after NUM_STEPS steps of QLoRA, with what was seen on the way."""

    loaded: LoadedModel
    encoder: Encoder
    batches: tuple[MicroBatch, ...]
    losses: tuple[float, ...]


def write_samples(folder: Path) -> tuple[Sample, ...]:
    """Four conversations read through the data road: two images, none, one very wide, one of a common shape."""
    sizes = {"a": FIRST_SIZE, "b": SECOND_SIZE, "wide": WIDE_SIZE, "c": (40, 30)}
    for index, (name, size) in enumerate(sizes.items()):
        tiny.write_image(folder / f"{name}.png", size, seed=index)
    rows = (
        (["a.png", "b.png"], "<image><image>\nWhich is red?", "The second one."),
        ([], "What is two and two?", "Four."),
        (["wide.png"], "<image>\nHow wide is it?", "Very wide, and not high."),
        (["c.png"], "<image>\nWhat is it?", "A bar."),
    )
    records = [
        {"id": str(index), "image": images, "conversations": _turns(question, answer)}
        for index, (images, question, answer) in enumerate(rows)
    ]
    for record in records:
        if not record["image"]:
            del record["image"]
    path = tiny.write_jsonl(folder / "train.jsonl", records)
    samples = load_samples(path, folder, Quarantine(folder / "quarantine.jsonl"))
    assert not samples.bad
    return samples.samples


def check_labels(case: Case) -> None:
    """Ids and labels of a conversation with two images and two answers are those that were written by hand."""
    encoder = Encoder(case.spec.family.load_processor(str(case.folder)), case.spec.family, max_length=4096)
    encoder = pickle.loads(pickle.dumps(encoder))  # as a data worker gets it
    first, second = (
        tiny.write_image(case.workplace / f"{size[0]}.png", size, seed=size[0]) for size in (FIRST_SIZE, SECOND_SIZE)
    )
    messages = (
        Message("user", (ImagePart(path=first), ImagePart(path=second), TextPart("What is it?"))),
        Message("assistant", (TextPart("A red bar."),)),
        Message("user", (TextPart("Sure?"),)),
        Message("assistant", (TextPart("Yes."),)),
    )
    encoded = encoder.encode(Sample("x", messages, SourceRef(Path("x"), 1)))
    ids, labels = [], []
    for text, is_supervised in case.tiny.conversation:
        piece = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if is_supervised else [IGNORE_INDEX] * len(piece)
    assert encoder.tokenizer.decode(encoded.input_ids) == encoder.tokenizer.decode(ids)
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == labels


def check_inputs(case: Case) -> None:
    """A prompt with two images comes to the inputs that the processor's own call makes of the rendered conversation.

    The processor gets the images as `apply_chat_template` hands them to it, one list a conversation: some treat several
    images of one conversation unlike a single one. A start token that both the template and the tokenizer write stands
    twice there, and once in ours.
    """
    if not case.tiny.processor_call:
        pytest.skip("the processor has no call of this kind")
    family = case.spec.family
    processor = family.load_processor(str(case.folder))
    encoder = Encoder(processor, family, max_length=4096)
    paths = [tiny.write_image(case.workplace / f"{size[0]}.png", size) for size in (FIRST_SIZE, SECOND_SIZE)]
    parts = (*(ImagePart(path=path) for path in paths), TextPart("What is it?"))
    ours = _collated([encoder.encode_prompt([Message("user", parts)])], encoder).model_inputs
    content = [*({"type": "image"} for _ in paths), {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
        **family.template_arguments,
    )
    own = processor(images=[[Image.open(path) for path in paths]], text=[text], return_tensors="pt")
    assert own.keys() == ours.keys()
    length = ours["input_ids"].shape[1]
    num_starts = own["input_ids"].shape[1] - length
    assert num_starts in (0, 1)
    for name, value in own.items():
        is_sequence = value.shape[:2] == own["input_ids"].shape
        torch.testing.assert_close(ours[name], value[:, num_starts:] if is_sequence else value, check_dtype=False)


def check_image_tokens(case: Case) -> None:
    """`num_image_tokens` is what the processor emits, for random sizes, at each setting of `data.image_size`."""
    chooser = random.Random(0)
    spec = case.spec
    for image_px in (None, *case.tiny.caps_px):
        if image_px is not None:
            spec.family.check_image_px(spec.facts, image_px)
        processor = spec.family.load_processor(str(case.folder))
        spec.family.apply_image_px(None, processor, image_px)
        for _ in range(NUM_RANDOM_SIZES // (1 + len(case.tiny.caps_px)) + 1):
            width, height = (chooser.randint(4, case.tiny.random_side_px) for _ in range(2))
            features = spec.family.process_images(processor, [Image.new("RGB", (width, height), "red")])
            (text,) = spec.family.expand_placeholders(processor, features, 1)
            emitted = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            predicted = spec.family.num_image_tokens(spec.facts, image_px, width_px=width, height_px=height)
            assert predicted == emitted, (image_px, width, height)


def train(case: Case, *, dtype: torch.dtype = torch.float32) -> Trained:
    """NUM_STEPS steps of QLoRA with activation checkpointing, as `eightgig train` puts them together."""
    loaded = _load(case, dtype)
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    step = _step(loaded, dtype)
    order = StepOrder(len(case.samples), BATCH_SIZE, 2, seed=1)
    losses, batches = [], ()
    for micro_batches in StepLoader(case.samples, encoder, order, steps=range(NUM_STEPS)):
        batches = tuple(micro_batches)
        losses.append(float(step(batches, sum(batch.num_target_tokens for batch in batches)).loss))
        norm = step.finish_gradients()
        check_gradients(loaded.model)
        if len(losses) == NUM_STEPS:
            _assert_gradient_everywhere(loaded.model)
        assert step.apply(norm)
    return Trained(loaded, encoder, batches, tuple(losses))


def check_training(case: Case, trained: Trained) -> None:
    """Losses are finite and fall, and the chunked loss is the model's own full-logits loss."""
    assert all(torch.isfinite(torch.tensor(trained.losses)))
    assert trained.losses[-1] < trained.losses[0]
    loaded = trained.loaded
    loaded.model.eval()
    compute = _compute(torch.float32)
    for batch in _every_kind_of_batch(case, trained):
        with torch.no_grad():
            ours = batch_loss_sum(loaded.model, loaded.spec.family, batch, compute) / batch.num_target_tokens
            inputs = loaded.spec.family.own_inputs(loaded.model, batch.model_inputs)
            own = loaded.model(**inputs, labels=batch.labels, use_cache=False).loss
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def check_image_matters(case: Case, trained: Trained) -> None:
    """Other pixels give other hidden states at the answer; else the image never reaches the language model."""
    inputs = dict(_prompt_batch(case, trained, 0).model_inputs)
    family, model = trained.loaded.spec.family, trained.loaded.model.eval()
    with torch.no_grad():
        before = family.hidden_states(model, inputs)[:, -1]
        pixels = inputs["pixel_values"]
        inputs["pixel_values"] = torch.where(pixels == 0, pixels, -pixels)  # all-zero tiles may mean padding
        after = family.hidden_states(model, inputs)[:, -1]
    assert float((after - before).norm() / before.norm()) > 1e-4


def check_generation(case: Case, trained: Trained) -> None:
    """Greedy tokens with a key-value cache are the arg max of forward passes without one, with and without adapter."""
    model = trained.loaded.model.eval()
    for index in range(len(case.samples)):
        batch = _prompt_batch(case, trained, index)
        with_adapter = _check_greedy(trained, model, batch)
        with model.disable_adapter():
            without_adapter = _check_greedy(trained, model, batch)
        assert not torch.equal(with_adapter, without_adapter)


def check_reload(case: Case, trained: Trained) -> None:
    """Plain transformers and peft give the trained model's logits from the saved adapter."""
    saved, reference = case.workplace / "adapter", case.workplace / "reference.safetensors"
    loaded = trained.loaded
    save_adapter(loaded.model, saved)
    batches = _every_kind_of_batch(case, trained)
    write_reference(loaded, batches, reference)
    result = reload.compare(reload_plan(CONFIG, loaded.spec, CPU, loaded.precision, saved), reference)
    assert result.relative_difference <= 1e-5
    assert result.adapter_effect is not None
    assert result.adapter_effect > 100 * max(result.relative_difference, 1e-5)


def check_receipt(case: Case, trained: Trained) -> None:
    """Exactly the intended modules are 4-bit, and every receipt group is where the family says its parts are."""
    model, spec = base_model(trained.loaded.model), trained.loaded.spec
    pattern = case.tiny.quantised or spec.family.lora_pattern
    names = {path.replace(".base_layer", ""): module for path, module in model.named_modules()}
    in_4bit = {path for path, module in names.items() if _is_4bit(module)}
    expected = {path for path, module in names.items() if re.fullmatch(pattern, path) and ".lora_" not in path}
    assert in_4bit == expected
    assert in_4bit
    expected_groups = {"language linears", "embeddings", "vision tower", "adapters"}
    expected_groups |= {"projector"} if spec.family.modules.projectors else set()
    assert expected_groups <= {row.group for row in trained.loaded.receipt.rows}


def check_wrong_skip_list(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any one entry missing from the list of modules to skip, the model is refused.

    Only the head of a model with tied embeddings stays 16-bit by itself.
    """
    family, model = case.spec.family, load_tiny(case.folder, CONFIG).model
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    right = load.quantization_config
    for missing, pattern in enumerate(family.keep_16bit):
        if is_tied and re.fullmatch(pattern, family.modules.lm_head):
            continue

        def wrong(*args: Any, missing: int = missing) -> Any:
            settings = right(*args)
            skipped = settings.llm_int8_skip_modules
            settings.llm_int8_skip_modules = [*skipped[:missing], *skipped[missing + 1 :], "no_such_module"]
            return settings

        monkeypatch.setattr(load, "quantization_config", wrong)
        with pytest.raises(UnsupportedModel, match="was not loaded as asked"):
            load_tiny(case.folder, CONFIG)


def check_full_method(case: Case) -> None:
    """Full fine-tuning trains everything but the towers, and a projector even inside one."""
    config = tiny_config({"training": {"method": "full", "lora": None}})
    loaded = load_tiny(case.folder, config)
    paths = loaded.spec.family.modules
    for name, parameter in loaded.model.named_parameters():
        in_tower = any(name.startswith(f"{path}.") for path in paths.towers)
        in_projector = any(name.startswith(f"{path}.") or name == path for path in paths.projectors)
        assert parameter.requires_grad is (in_projector or not in_tower), name


def check_fp16(case: Case) -> None:
    """Training with fp16 weights and no autocast, as on cards without bf16, gives no NaN."""
    trained = train(case, dtype=torch.float16)
    assert all(torch.isfinite(torch.tensor(trained.losses)))
    assert all(bool(value.isfinite().all()) for value in trainable_parameters(trained.loaded.model).values())


def check_layer_levers(case: Case) -> None:
    """MLPs in tiles and layer inputs on the host leave the loss and every gradient as they are."""
    plain, _ = _with_levers(case, {"gradient_checkpointing": False})
    levered, host_bytes = _with_levers(
        case, {"mlp_tile_tokens": 5, "tiled_projections": True, "offload_layer_inputs": True}
    )
    assert_close(levered, plain)
    assert host_bytes > 0


def check_packing(case: Case) -> None:
    """Loss and gradients of samples that share a row are those of samples in rows of their own; or it is refused.

    With and without checkpointing, for all samples and for some in another order; and the model still takes padded
    batches. Each pass draws the same random numbers, for towers that drop values.
    """
    config = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"batching": Batching.PACKED})})
    loaded = load_model(config, case.spec, CPU, _precision(torch.float32))
    if case.spec.family.packing_obstacle:
        with pytest.raises(ConfigError, match=re.escape(case.spec.family.packing_obstacle)):
            pack_as_configured(config, case.spec, loaded.model)
        return
    attach_adapters(loaded, config)
    randomise_lora_b(loaded.model, seed=7)
    encoder = Encoder(loaded.processor, case.spec.family, max_length=512)
    encoded = [encoder.encode(sample) for sample in case.samples]
    groups = (encoded, [encoded[2], encoded[1], encoded[0]], encoded[1:2])

    def outcome(batch: MicroBatch) -> Outcome:
        loaded.model.train()
        loaded.model.zero_grad()
        torch.manual_seed(11)
        loss = batch_loss_sum(loaded.model, case.spec.family, batch, _compute(torch.float32))
        loss.backward()
        return outcome_of(loss, loaded.model)

    plain = [outcome(_collated(group, encoder)) for group in groups]
    pack_as_configured(config, case.spec, loaded.model)
    for group, expected in zip(groups, plain, strict=True):
        row = pack(group, encoder.image_layout)
        assert row.num_computed_tokens == row.num_tokens == sum(len(each.input_ids) for each in group)
        assert row.num_target_tokens == _collated(group, encoder).num_target_tokens
        assert_close(outcome(row), expected)
    checkpoint_as_configured(config, case.spec, loaded.model)
    assert_close(outcome(pack(encoded, encoder.image_layout)), plain[0])
    assert_close(outcome(_collated(encoded, encoder)), plain[0])


def _with_levers(case: Case, hardware: dict[str, Any]) -> tuple[Outcome, int]:
    """What a pass gives, and the memory of the host that it took."""
    config = CONFIG.model_copy(update={"hardware": CONFIG.hardware.model_copy(update=hardware)})
    loaded = load_model(config, case.spec, CPU, _precision(torch.float32))
    attach_adapters(loaded, config)
    randomise_lora_b(loaded.model, seed=7)
    transfers = Transfers()
    tile_as_configured(config, case.spec, loaded.model)
    checkpoint_as_configured(config, case.spec, loaded.model)
    offload_as_configured(config, case.spec, loaded.model, transfers)
    encoder = Encoder(loaded.processor, case.spec.family, max_length=512)
    batch = _collated([encoder.encode(sample) for sample in case.samples], encoder)
    loaded.model.train()
    torch.manual_seed(0)  # InstructBLIP's Q-Former has dropout
    loss = batch_loss_sum(loaded.model, case.spec.family, batch, _compute(torch.float32))
    loss.backward()
    return outcome_of(loss, loaded.model), transfers.host.num_bytes


def check_random_weights(case: Case) -> None:
    """A model with random weights is built from the facts alone and gives finite losses with the stand-in processor."""
    spec = ModelSpec(case.tiny.family, case.tiny.facts)
    config = _with_random_weights(CONFIG)
    loaded = load_model(config, spec, CPU, _precision(torch.float32))
    encoder = Encoder(loaded.processor, spec.family, max_length=512)
    batch = _collated([encoder.encode(sample) for sample in case.samples], encoder)
    with torch.no_grad():
        loss = batch_loss_sum(loaded.model, spec.family, batch, _compute(torch.float32))
    assert bool(loss.isfinite())
    again = build_random(spec, seed=3, device=CPU, dtype=torch.float32, quantization_config=None)
    assert sum(value.numel() for value in again.parameters()) == loaded.receipt.num_parameters


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _with_random_weights(config: TrainingConfig) -> TrainingConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"random_weights_seed": 3})})


def _precision(dtype: torch.dtype) -> Precision:
    return Precision(dtype, MixedPrecision.FP16 if dtype is torch.float16 else MixedPrecision.FP32, None)


def _load(case: Case, dtype: torch.dtype) -> LoadedModel:
    loaded = load_model(CONFIG, case.spec, CPU, _precision(dtype))
    attach_adapters(loaded, CONFIG)
    layers = loaded.spec.family.decoder_layers(loaded.model)
    checkpoint_layers(loaded.model, layers, preserve_rng_state=False)
    return loaded


def _compute(dtype: torch.dtype) -> Compute:
    return Compute(device=CPU, input_dtype=dtype, autocast_dtype=None, loss_chunk_tokens=7)


def _step(loaded: LoadedModel, dtype: torch.dtype) -> TrainingStep:
    trainable = trainable_parameters(loaded.model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-2)
    return TrainingStep(
        model=loaded.model,
        family=loaded.spec.family,
        compute=_compute(dtype),
        trainable=trainable,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        max_grad_norm=1.0,
        scaler=torch.amp.GradScaler("cpu", init_scale=64.0) if dtype is torch.float16 else None,
    )


def _assert_gradient_everywhere(model: nn.Module) -> None:
    dead = [name for name, value in trainable_parameters(model).items() if value.grad is None or not value.grad.any()]
    assert not dead
    assert all("lora_" in name for name in trainable_parameters(model))


def _collated(samples: Sequence[EncodedSample], encoder: Encoder) -> MicroBatch:
    return collate(samples, encoder.pad_token_id, encoder.image_layout)


def _every_kind_of_batch(case: Case, trained: Trained) -> list[MicroBatch]:
    """Each sample alone (one of them without an image), two mixed, and all together."""
    encoded = [trained.encoder.encode(sample) for sample in case.samples]
    return [_collated(group, trained.encoder) for group in (*([one] for one in encoded), encoded[:2], encoded)]


def _prompt_batch(case: Case, trained: Trained, index: int) -> MicroBatch:
    prompt = trained.encoder.encode_prompt(case.samples[index].messages[:1])
    assert (prompt.labels == IGNORE_INDEX).all()
    return _collated([prompt], trained.encoder)


def _check_greedy(trained: Trained, model: Any, batch: MicroBatch) -> Tensor:
    """Logits of the first new token, after comparing `family.generate` with forward passes over the whole row."""
    family, encoder = trained.loaded.spec.family, trained.encoder
    ends = set(encoder.end_token_ids)
    with torch.no_grad():
        generated = family.generate(
            model,
            batch.model_inputs,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=encoder.end_token_ids,
            pad_token_id=encoder.pad_token_id,
        )[0]
        inputs = dict(batch.model_inputs)
        first_logits = None
        for token in generated.tolist():
            logits = family.logits(model, family.hidden_states(model, inputs)[:, -1])
            first_logits = logits if first_logits is None else first_logits
            assert int(logits.argmax()) == token
            inputs |= _longer(inputs, token, trained, num_prompt_tokens=batch.num_tokens)
            if token in ends:
                break
    assert first_logits is not None
    return first_logits


def _longer(inputs: dict[str, Tensor], token: int, trained: Trained, *, num_prompt_tokens: int) -> dict[str, Tensor]:
    """The inputs that follow from the sequence: with one more token of the answer."""
    input_ids = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
    is_answer = torch.arange(input_ids.shape[1]) >= num_prompt_tokens
    extra = trained.loaded.spec.family.token_inputs(trained.loaded.processor, input_ids[0], is_answer, inputs)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        **{name: value.unsqueeze(0) for name, value in extra.items()},
    }


def _is_4bit(module: nn.Module) -> bool:
    return isinstance(module, bnb.nn.Linear4bit) and isinstance(module.weight, bnb.nn.Params4bit)


__all__ = [name for name in globals() if name.startswith(("check_", "write_", "train", "Case", "Trained"))]
