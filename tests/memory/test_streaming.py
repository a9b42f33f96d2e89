"""Streamed weights: the gradients of resident ones, which the naive way does not give; and each way a run uses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import modeling_utils

import tiny
from eightgig import registry
from eightgig.core.errors import ConfigError
from eightgig.memory import arrivals
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.packed_layers import PackedLayer, block_bytes, layer_places, quantised_linears
from eightgig.memory.streaming import StreamedWeights
from eightgig.memory.weight_ring import streamed_positions
from eightgig.models import host_weights
from eightgig.models.load import LoadedModel
from tiny_training import CPU, gradients, load_tiny, text_loss, tiny_config, tiny_inputs, trainable

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"), num_layers=NUM_LAYERS)


def _loaded(folder: Path, streamed: int, *, checkpoints: bool = True, **options: Any) -> LoadedModel:
    """In training mode, with adapters whose B is not zero, so that every weight matters for every gradient."""
    sections = options.pop("sections", {})
    hardware = {"device": "cpu", "streamed_layers": streamed, "mixed_precision": options.get("precision", "fp32")}
    loaded = load_tiny(folder, tiny_config({**sections, "hardware": hardware}), adapters=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(loaded.model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if checkpoints:
        checkpoint_layers(loaded.model, loaded.spec.family.decoder_layers(loaded.model), preserve_rng_state=False)
    loaded.model.train()
    return loaded


def _poison(streamed: StreamedWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each copy its whole buffer is made unusable: scales of 255, weights of the largest value."""
    start = streamed.start

    def poisoned(layer: int, slot: int) -> None:
        streamed._slots[slot].fill_(255)
        start(layer, slot)

    monkeypatch.setattr(streamed, "start", poisoned)


def _gradient(loaded: LoadedModel, *, num_passes: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    loaded.model.zero_grad()
    losses = []
    for index in range(num_passes):
        loss = text_loss(loaded, tiny_inputs(loaded, num_images=2, seed=index))
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(loaded.model)


def _error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest relative error of any gradient."""
    assert ours.keys() == reference.keys()
    assert len(ours) == 2 * 7 * NUM_LAYERS
    return max(
        float((ours[name].double() - reference[name].double()).norm() / reference[name].double().norm())
        for name in ours
    )


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("streamed", [3, 4, 6])
def test_losses_and_gradients_are_those_of_resident_weights(
    folder: Path, streamed: int, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _loaded(folder, streamed, checkpoints=checkpoints)
    assert ours.streamed is not None
    _poison(ours.streamed, monkeypatch)
    losses, gradient = _gradient(ours, num_passes=3)
    expected_losses, expected = _gradient(_loaded(folder, 0), num_passes=3)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert _error(gradient, expected) < 1e-5


def test_bf16_errs_no_more_than_without_streaming(folder: Path) -> None:
    exact = _gradient(_loaded(folder, 0))[1]
    plain = _gradient(_loaded(folder, 0, precision="bf16"))[1]
    ours = _gradient(_loaded(folder, 4, precision="bf16"))[1]
    for name, reference in exact.items():
        error, allowed = (float((each[name] - reference).norm()) for each in (ours, plain))
        assert error <= 1.2 * allowed, name


def _stream_naively(layers: Sequence[nn.Module]) -> None:
    """What one would write first: before its forward pass a layer's weights go into a buffer that all layers share."""
    hosts = [[place.tensor.clone() for place in layer_places(layer)] for layer in layers]
    buffer = torch.zeros(max(block_bytes(layer_places(layer)) for layer in layers), dtype=torch.uint8)

    def bring(layer: nn.Module, host: list[Tensor]) -> None:
        for place, tensor in zip(layer_places(layer), host, strict=True):
            view = place.view(buffer)
            view.copy_(tensor)
            setattr(place.owner, place.name, view)

    for layer, host in zip(layers, hosts, strict=True):
        layer.register_forward_pre_hook(lambda module, _, host=host: bring(module, host))


@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_naive_way_gives_the_right_loss_and_wrong_gradients(folder: Path, checkpoints: bool) -> None:
    """The trap that the ring is built for. Were this to fail, bitsandbytes would keep its weights otherwise."""
    naive = _loaded(folder, 0, checkpoints=checkpoints)
    _stream_naively(naive.spec.family.decoder_layers(naive.model))
    losses, gradient = _gradient(naive)
    expected_losses, expected = _gradient(_loaded(folder, 0, checkpoints=checkpoints))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert _error(gradient, expected) > 0.1
    streamed = _gradient(_loaded(folder, NUM_LAYERS, checkpoints=checkpoints))
    assert streamed[0] == pytest.approx(expected_losses, rel=1e-5)
    assert _error(streamed[1], expected) < 1e-5


def test_steps_validation_and_answers_in_between_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def course(streamed: int) -> tuple[list[float], Tensor, Tensor]:
        loaded = _loaded(folder, streamed)
        if loaded.streamed is not None:
            _poison(loaded.streamed, monkeypatch)
        optimizer = torch.optim.AdamW(trainable(loaded.model), lr=1e-2)
        losses = []
        for step in range(4):
            losses += _gradient(loaded, num_passes=2)[0]
            optimizer.step()
            if step % 2:
                loaded.model.eval()
                with torch.no_grad():
                    losses.append(text_loss(loaded, tiny_inputs(loaded)).item())
                    answer = loaded.model.generate(**tiny_inputs(loaded), max_new_tokens=4, do_sample=False)
                    logits = loaded.model(**tiny_inputs(loaded)).logits
                loaded.model.train()
        return losses, answer, logits

    ours, reference = course(5), course(0)
    assert ours[0] == pytest.approx(reference[0], rel=1e-5)
    assert torch.equal(ours[1], reference[1])
    torch.testing.assert_close(ours[2], reference[2], rtol=1e-5, atol=1e-5)


def test_a_micro_batch_moves_all_but_two_layers_twice(folder: Path) -> None:
    loaded = _loaded(folder, 5)
    assert loaded.streamed is not None
    _gradient(loaded)
    before = loaded.streamed.moved_bytes
    _gradient(loaded, num_passes=3)
    layer_bytes = loaded.streamed.host_bytes // 5
    assert loaded.streamed.moved_bytes - before == 3 * 2 * (5 - 2) * layer_bytes
    assert loaded.streamed.ring_bytes == 2 * layer_bytes


def test_a_layers_block_holds_its_packed_weights_and_their_scales(folder: Path) -> None:
    loaded = _loaded(folder, 0)
    layer = loaded.spec.family.decoder_layers(loaded.model)[0]
    num_weights = 4 * 64 * 64 + 3 * 64 * 128
    num_bytes = sum(place.tensor.numel() * place.tensor.element_size() for place in layer_places(layer))
    assert num_bytes == num_weights // 2 + num_weights // 64
    assert len(quantised_linears(layer)) == 7
    assert num_bytes <= block_bytes(layer_places(layer)) < num_bytes + 14 * 512


@settings(max_examples=15)
@given(
    widths=st.lists(st.integers(1, 4).map(lambda blocks: 64 * blocks), min_size=3, max_size=6),
    rows=st.integers(1, 5),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    streamed=st.integers(3, 6),
)
def test_layers_of_any_size(widths: list[int], rows: int, nested: bool, quant_type: str, streamed: int) -> None:
    """Layers that differ in size share the buffers; the reference multiplies by the unpacked weights."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up = bnb.nn.Linear4bit(64, width, bias=False, compress_statistics=nested, quant_type=quant_type)
            self.down = bnb.nn.Linear4bit(width, 64, bias=True, compress_statistics=nested, quant_type=quant_type)
            self.scale = nn.Parameter(torch.randn(width))

        def forward(self, states: Tensor) -> Tensor:
            return states + self.down(torch.tanh(self.up(states) * self.scale))

    torch.manual_seed(sum(widths))
    model = nn.Sequential(*[Layer(width) for width in widths]).to(CPU)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    unpacked = [
        [bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in (layer.up, layer.down)]
        for layer in model
    ]
    states = torch.randn(rows, 64)
    expected = states
    for layer, (up, down) in zip(model, unpacked, strict=True):
        expected = expected + torch.tanh(expected @ up.T * layer.scale) @ down.T + layer.down.bias
    reference = torch.autograd.grad(expected.square().sum(), [layer.scale for layer in model])
    count = min(streamed, len(widths))
    StreamedWeights([model[i] for i in streamed_positions(len(widths), count)], CPU)
    for _ in range(2):
        output = model(states)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        ours = torch.autograd.grad(output.square().sum(), [layer.scale for layer in model])
        for gradient, right in zip(ours, reference, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("random_weights_seed", [None, 5])
def test_weights_leave_the_gpu_as_they_arrive(
    folder: Path, random_weights_seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU nothing has to move; what would be, and when, is the same."""
    arrived: list[Any] = []
    monkeypatch.setattr(arrivals, "_to_host", arrived.append)
    tops: list[Any] = []
    whole: list[nn.Module] = []

    def wanted(model: Any) -> dict[nn.Module, list[nn.Module]]:
        tops.append(model)
        layers, table = model.model.language_model.layers, model.get_input_embeddings()
        return {layers[1]: quantised_linears(layers[1]), layers[4]: quantised_linears(layers[4]), table: [table]}

    def when_whole(module: nn.Module) -> None:
        whole.append(module)
        parts = wanted(tops[0])[module]
        assert {id(part.weight) for part in parts} == {id(parameter) for parameter in arrived[-len(parts) :]}

    with arrivals.to_host_as_they_arrive(wanted, CPU, when_whole):
        loaded = load_tiny(folder, tiny_config({"model": {"random_weights_seed": random_weights_seed}}))
    nn.Embedding(3, 4)  # outside, nothing is noticed
    assert set(tops) == {loaded.model}
    layers = loaded.model.model.language_model.layers
    table = loaded.model.get_input_embeddings()
    assert [m for m in whole if m is not table] == [layers[1], layers[4]]
    assert len(whole) == 3
    expected = [m.weight for i in (1, 4) for m in quantised_linears(layers[i])]
    expected.append(table.weight)
    assert len(arrived) == 15
    assert {id(parameter) for parameter in arrived} == {id(parameter) for parameter in expected}


@pytest.mark.parametrize("random_weights_seed", [None, 5])
def test_what_a_config_keeps_in_ram_is_packed_layer_by_layer(
    folder: Path, random_weights_seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is packed, the next one's weights have not been read; those of a checkpoint and random ones."""
    arrived: list[Any] = []
    monkeypatch.setattr(arrivals, "_to_host", arrived.append)
    num_arrived: list[int] = []

    class Counted(PackedLayer):
        def __init__(self, layer: nn.Module, device: torch.device) -> None:
            super().__init__(layer, device)
            num_arrived.append(sum(parameter.ndim == 2 and hasattr(parameter, "quant_state") for parameter in arrived))

    monkeypatch.setattr(host_weights, "PackedLayer", Counted)
    hardware = {"device": "cpu", "mixed_precision": "fp32", "streamed_layers": 4, "embedding_on_host": True}
    sections = {"model": {"random_weights_seed": random_weights_seed}, "hardware": hardware}
    loaded = load_tiny(folder, tiny_config(sections))
    assert num_arrived == [7, 14, 21, 28]
    layers = [loaded.model.model.language_model.layers[i] for i in (1, 2, 4, 5)]
    assert loaded.streamed is not None
    assert [places[0].owner for places in (packed.places for packed in loaded.streamed._packed)] == [
        quantised_linears(layer)[0].weight for layer in layers
    ]
    expected = [linear.weight for layer in layers for linear in quantised_linears(layer)]
    expected.append(loaded.model.get_input_embeddings().weight)
    assert {id(parameter) for parameter in arrived} == {id(parameter) for parameter in expected}
    assert len(arrived) == len(expected)


def test_nothing_is_reserved_for_a_model_that_need_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls by this name what would reserve a whole model's memory, and finds nothing to do inside."""
    calls: list[Any] = []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *arguments: calls.append(arguments))
    spec = registry.resolve(str(folder))
    card = torch.device("cuda")  # only its name is asked for
    for streamed, num_calls in ((0, 1), (3, 1), (0, 2)):
        hardware = tiny_config({"hardware": {"streamed_layers": streamed}}).hardware
        with host_weights.leaving_the_gpu(hardware, spec, card):
            load_tiny(folder, tiny_config())
        assert len(calls) == num_calls


def test_the_receipt_says_what_lies_in_ram(folder: Path) -> None:
    ours = [row for row in _loaded(folder, 4).receipt.rows if row.is_4bit]
    (plain,) = [row for row in _loaded(folder, 0).receipt.rows if row.is_4bit]
    assert [(row.on_host, row.num_modules) for row in ours] == [(False, 2 * 7), (True, 4 * 7)]
    assert sum(row.num_parameters for row in ours) == plain.num_parameters
    assert sum(row.bytes_now for row in ours) == plain.bytes_now


def test_more_layers_than_the_model_has_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"streamed_layers = 7: at most 6, the decoder layers of"):
        _loaded(folder, 7)
