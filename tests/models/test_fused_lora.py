"""Adapters that share an input computed together: PEFT's numbers, beside every lever; PEFT's own code wherever else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import tiny
from eightgig.config import MixedPrecision
from eightgig.memory import layer_inputs
from eightgig.memory.streaming import StreamedWeights
from eightgig.models import fused_lora
from eightgig.models.fused_lora import fuse_lora
from eightgig.models.load import LoadedModel
from eightgig.models.precision import Precision
from eightgig.models.trainable import trainable_parameters, weights_to_save
from eightgig.registry.family import ModelFamily
from eightgig.step.build import (
    checkpoint_as_configured,
    fuse_lora_as_configured,
    offload_as_configured,
    tile_as_configured,
    why_not_fused,
)
from lever_numerics import BF16_ERROR_FACTOR, Outcome, assert_close, outcome_of, randomise_lora_b
from tiny_training import load_tiny, text_loss, tiny_config, tiny_inputs

NUM_LAYERS, NUM_DRAWS = 4, 6
GROUPS_OF_A_LAYER = [1, 1, 2, 3]  # o; down; gate, up; q, k, v


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"), num_layers=NUM_LAYERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the fused function computes."""
    found: list[int] = []
    compute = fused_lora.lora_linears

    def counted(hidden: Tensor, linears: Sequence[Any]) -> tuple[Tensor, ...]:
        found.append(len(linears))
        return compute(hidden, linears)

    monkeypatch.setattr(fused_lora, "lora_linears", counted)
    return found


def _prepared(
    folder: Path, *, fused: bool, precision: str = "fp32", training: dict[str, Any] | None = None, **hardware: Any
) -> LoadedModel:
    """In training, with adapters whose B is not zero, as a run puts it together."""
    hardware = {"gradient_checkpointing": False, "fused_lora": fused, "mixed_precision": precision, **hardware}
    config = tiny_config({"training": training or {}, "hardware": {"device": "cpu", **hardware}})
    loaded = load_tiny(folder, config, adapters=True)
    randomise_lora_b(loaded.model, seed=2)
    fuse_lora_as_configured(config, loaded.spec, loaded.model)
    tile_as_configured(config, loaded.spec, loaded.model)
    checkpoint_as_configured(config, loaded.spec, loaded.model)
    offload_as_configured(config, loaded.spec, loaded.model)
    loaded.model.train()
    return loaded


def _outcome(loaded: LoadedModel, *, num_passes: int = 1) -> Outcome:
    """Of several passes the sum of losses and gradients."""
    losses = []
    for index in range(num_passes):
        loss = text_loss(loaded, tiny_inputs(loaded, num_images=2, seed=index))
        loss.backward()
        losses.append(loss)
    return outcome_of(torch.stack(losses).sum(), loaded.model)


LORA = {"method": "lora", "lora": {"rank": 8, "alpha": 16}}
SINGLE = {"quantization": {"bnb_4bit_use_double_quant": False}}


@pytest.mark.parametrize(
    ("training", "hardware"),
    [
        ({}, {}),
        (SINGLE, {}),
        (LORA, {}),
        ({"lora": {"rank": 1, "alpha": 3}}, {"gradient_checkpointing": True}),
        (LORA, {"gradient_checkpointing": True}),
        ({}, {"checkpointed_layers": 2, "gradient_checkpointing": True, "offload_layer_inputs": True}),
        ({}, {"mlp_tile_tokens": 13}),
        ({}, {"mlp_tile_tokens": 13, "tiled_projections": True, "gradient_checkpointing": True}),
    ],
)
def test_losses_and_gradients_are_those_of_peft(
    folder: Path, training: dict[str, Any], hardware: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    plain = _prepared(folder, fused=False, training=training)
    ours = _prepared(folder, fused=True, training=training, **hardware)
    assert_close(_outcome(ours, num_passes=2), _outcome(plain, num_passes=2))


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("streamed", [3, NUM_LAYERS])
def test_weights_that_come_from_ram(
    folder: Path, streamed: int, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that is written over with 255 before each copy: a weight that is read too late or early gives NaN."""
    ours = _prepared(folder, fused=True, streamed_layers=streamed, gradient_checkpointing=checkpoints)
    carrier = ours.streamed
    assert isinstance(carrier, StreamedWeights)
    start = carrier.start

    def poisoned(layer: int, slot: int) -> None:
        carrier._slots[slot].fill_(255)
        start(layer, slot)

    monkeypatch.setattr(carrier, "start", poisoned)
    assert_close(_outcome(ours, num_passes=3), _outcome(_prepared(folder, fused=False), num_passes=3))


def test_bf16_errs_no_more_than_peft(folder: Path) -> None:
    """Over several draws of adapters and pictures: of one alone, a tensor's error is chance within some 30 %."""
    ours, plain, exact = (
        _prepared(folder, fused=fused, precision=precision, gradient_checkpointing=True)
        for fused, precision in ((True, "bf16"), (False, "bf16"), (False, "fp32"))
    )
    totals: dict[str, list[float]] = {}
    for seed in range(NUM_DRAWS):
        found = []
        for loaded in (ours, plain, exact):
            randomise_lora_b(loaded.model, seed)
            loaded.model.zero_grad()
            found.append(_logits_and_gradients(loaded, seed))
        for name, right in found[2].items():
            errors = [float(((each[name] - right).norm() / right.norm()) ** 2) for each in found[:2]]
            totals[name] = [total + error for total, error in zip(totals.get(name, [0.0, 0.0]), errors, strict=True)]
    assert len(totals) == 1 + 2 * 7 * NUM_LAYERS
    for name, (error, own) in totals.items():
        assert (error / own) ** 0.5 <= BF16_ERROR_FACTOR, name


def _logits_and_gradients(loaded: LoadedModel, seed: int) -> dict[str, Tensor]:
    inputs = tiny_inputs(loaded, num_images=2, seed=seed)
    logits = loaded.spec.family.logits(loaded.model, loaded.spec.family.hidden_states(loaded.model, inputs)).double()
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()).backward()
    return {"logits": logits.detach(), **outcome_of(logits, loaded.model).gradients}


def test_each_group_is_computed_at_once(folder: Path, calls: list[int]) -> None:
    _outcome(_prepared(folder, fused=True))
    assert Counter(calls) == Counter(GROUPS_OF_A_LAYER * NUM_LAYERS)
    calls.clear()
    _outcome(_prepared(folder, fused=True, gradient_checkpointing=True))
    assert len(calls) == 2 * 4 * NUM_LAYERS
    calls.clear()
    _outcome(_prepared(folder, fused=True, mlp_tile_tokens=10_000, tiled_projections=True))
    assert Counter(calls) == Counter([1, 1, 1, 1, 1, 2] * NUM_LAYERS)


@pytest.mark.parametrize(
    "training", [{"lora": {"rank": 8, "alpha": 16, "dropout": 0.3}}, {"method": "full", "lora": None}]
)
def test_what_is_not_plain_training_is_not_fused(folder: Path, training: dict[str, Any], calls: list[int]) -> None:
    outcomes = []
    for fused in (True, False):
        loaded = _prepared(folder, fused=fused, training=training)
        torch.manual_seed(5)
        outcomes.append(_outcome(loaded))
    assert calls == []
    assert all(torch.equal(value, outcomes[1].gradients[name]) for name, value in outcomes[0].gradients.items())


def test_dropout_is_no_matter_in_evaluation(folder: Path, calls: list[int]) -> None:
    loaded = _prepared(folder, fused=True, training={"lora": {"rank": 8, "alpha": 16, "dropout": 0.3}})
    loaded.model.eval()
    _outcome(loaded)
    assert calls


def _logits(loaded: LoadedModel) -> Tensor:
    logits: Tensor = loaded.model(**tiny_inputs(loaded)).logits
    return logits.detach()


def test_without_gradients_disabled_or_merged_it_is_peft(folder: Path, calls: list[int]) -> None:
    ours, plain = (_prepared(folder, fused=fused) for fused in (True, False))
    with torch.no_grad():
        assert torch.equal(_logits(ours), _logits(plain))
        answers = [each.model.generate(**tiny_inputs(each), max_new_tokens=4) for each in (ours, plain)]
    assert torch.equal(*answers)
    with ours.model.disable_adapter(), plain.model.disable_adapter():
        assert torch.equal(_logits(ours), _logits(plain))
    for each in (ours, plain):
        each.model.merge_adapter()
    assert torch.equal(_logits(ours), _logits(plain))
    assert calls == []
    with torch.no_grad():
        for each in (ours, plain):
            each.model.unmerge_adapter()
    torch.testing.assert_close(_logits(ours), _logits(plain), rtol=1e-4, atol=1e-5)
    assert calls


def test_several_adapters_are_pefts(folder: Path, calls: list[int]) -> None:
    loaded = [_prepared(folder, fused=fused) for fused in (True, False)]
    for each in loaded:
        config = each.model.peft_config["default"]
        torch.manual_seed(8)
        second = LoraConfig(r=3, lora_alpha=5, target_modules=config.target_modules, init_lora_weights=False)
        each.model.add_adapter("second", second)
        each.model.base_model.set_adapter(["default", "second"])
    assert torch.equal(*map(_logits, loaded))
    assert calls == []
    for each in loaded:
        each.model.set_adapter("second")
    torch.testing.assert_close(*map(_logits, loaded), rtol=1e-5, atol=1e-5)
    assert calls


def test_what_is_saved_and_what_learns_is_the_same(folder: Path) -> None:
    ours, plain = (_prepared(folder, fused=fused) for fused in (True, False))
    saved, expected = weights_to_save(ours.model), weights_to_save(plain.model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    assert list(trainable_parameters(ours.model)) == list(trainable_parameters(plain.model))


def test_a_model_that_calls_them_otherwise_gets_each_by_itself(
    folder: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a family's facts were wrong: the output's projection among those that share the attention's input."""
    wrong = (("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.up_proj"))
    monkeypatch.setattr(ModelFamily, "shared_inputs", wrong)
    ours = _prepared(folder, fused=True)
    assert_close(_outcome(ours, num_passes=2), _outcome(_prepared(folder, fused=False), num_passes=2))
    assert Counter(calls) == Counter([2, 1, 1, 1, 2, 1] * NUM_LAYERS + [1, 1, 1, 1, 2, 1] * NUM_LAYERS)


def test_a_pass_that_failed_leaves_nothing_behind(folder: Path, calls: list[int]) -> None:
    loaded = _prepared(folder, fused=True)
    for layer in loaded.spec.family.decoder_layers(loaded.model):
        width = layer.self_attn.q_proj.in_features
        layer.self_attn.q_proj(torch.randn(1, 3, width))  # and no call of the others
    with torch.no_grad():
        _logits(loaded)
    calls.clear()
    assert_close(_outcome(loaded), _outcome(_prepared(folder, fused=False)))
    assert Counter(calls) == Counter(GROUPS_OF_A_LAYER * NUM_LAYERS)


def test_nothing_waits_when_a_pass_has_ended(folder: Path) -> None:
    loaded = _prepared(folder, fused=True, gradient_checkpointing=True)
    _outcome(loaded)
    layers = [
        module for module in loaded.model.modules() if isinstance(module, LoraLayer) and "forward" in vars(module)
    ]
    assert len(layers) == 7 * NUM_LAYERS
    for layer in layers:
        group = next(cell.cell_contents for cell in layer.forward.__closure__ if hasattr(cell.cell_contents, "wrapped"))
        assert group._hidden is None
        assert not group._waiting


def test_layers_that_are_not_known_stay_as_they_are(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config(), adapters=True)
    layer = loaded.spec.family.decoder_layers(loaded.model)[0]
    query = layer.self_attn.q_proj
    base_forward = query.base_layer.forward
    query.base_layer.forward = lambda x: base_forward(x)  # somebody else's wrapper
    fuse_lora(layer, loaded.spec.family.linears_of_one_input(layer))
    assert "forward" not in vars(query)
    assert "forward" in vars(layer.self_attn.k_proj)


def _kept_bytes(loaded: LoadedModel) -> int:
    """What autograd keeps of a forward pass, beside the weights."""
    own = {id(parameter) for parameter in loaded.model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            held.append(tensor)  # or its address would be another's
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        text_loss(loaded, tiny_inputs(loaded, num_images=2))
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_less_is_kept_for_the_backward_pass(folder: Path, precision: str) -> None:
    ours, plain = (_prepared(folder, fused=fused, precision=precision) for fused in (True, False))
    kept_bytes = [_kept_bytes(each) for each in (ours, plain)]
    assert kept_bytes[0] <= kept_bytes[1]
    if precision == "bf16":
        assert kept_bytes[0] < 0.7 * kept_bytes[1]


@pytest.mark.parametrize(
    ("training", "precision", "reason"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float16, "fp16"),
        ({"lora": {"dropout": 0.1}}, torch.bfloat16, r"dropout is 0\.1"),
        ({"method": "full", "lora": None}, torch.bfloat16, "no adapters"),
    ],
)
def test_a_setting_without_effect_is_told(training: dict[str, Any], precision: torch.dtype, reason: str | None) -> None:
    told = why_not_fused(tiny_config({"training": training, "hardware": {"fused_lora": True}}), _precision(precision))
    assert (told is None) if reason is None else (reason.replace("\\", "") in str(told))
    assert why_not_fused(tiny_config({"training": training}), _precision(precision)) is None


def _precision(dtype: torch.dtype) -> Precision:
    return Precision(dtype, MixedPrecision.BF16, None)
