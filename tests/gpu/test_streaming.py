"""Streamed weights and embeddings in RAM on a real GPU: streams that overtake each other, memory, and whole runs."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava, write_llava_jsonl
from tests.tiny_training import gradients, text_loss, tiny_config, tiny_inputs, trainable
from torch import Tensor

from eightgig import registry
from eightgig.app.training import train
from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.memory import layer_inputs
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.layer_inputs import offload_layer_inputs
from eightgig.memory.packed_layers import block_bytes, layer_places
from eightgig.memory.row_groups import compute_in_groups
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.train.events import SilentListener

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
NUM_LAYERS = 8
NUM_STREAMED = 6
FP32_TOLERANCE = 1e-4  # kernels that add in any order; on the CPU, where none do, tests/memory asks for 1e-5
SLEEP_CYCLES = 5_000_000  # 3 ms or so: longer than all the tiny layers of a pass take


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of 2.6 M weights each, for random weights alone."""
    folder = build_tiny_llava(tmp_path_factory.mktemp("streaming") / "model", image_px=32, num_layers=NUM_LAYERS)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    config["text_config"] |= {"num_key_value_heads": 4, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _loaded(
    folder: Path, precision: str = "bf16", *, checkpoints: bool = True, seed: int | None = 1, **hardware: Any
) -> LoadedModel:
    settings = {"device": "cuda", "mixed_precision": precision, **hardware}
    config = tiny_config({"model": {"random_weights_seed": seed}, "hardware": settings})
    chosen = choose_precision(MixedPrecision(precision), CUDA)
    loaded = load_model(config, registry.resolve(str(folder)), CUDA, chosen)
    attach_adapters(loaded, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(loaded.model):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(CUDA) * 0.02)
    if checkpoints:
        checkpoint_layers(loaded.model, loaded.spec.family.decoder_layers(loaded.model), preserve_rng_state=False)
    loaded.model.train()
    return loaded


def _inputs(loaded: LoadedModel, seed: int = 0) -> dict[str, Tensor]:
    return {name: value.to(CUDA) for name, value in tiny_inputs(loaded, num_images=2, seed=seed).items()}


def _gradient(loaded: LoadedModel, *, num_passes: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    loaded.model.zero_grad()
    losses = []
    for seed in range(num_passes):
        loss = text_loss(loaded, _inputs(loaded, seed))
        loss.backward()
        losses.append(loss)
    return [loss.item() for loss in losses], gradients(loaded.model)


def _error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == reference.keys()
    assert len(ours) == 2 * 7 * NUM_LAYERS
    return {
        name: float((ours[name].double() - reference[name].double()).norm() / reference[name].double().norm())
        for name in ours
    }


def _slow_and_poisoned(loaded: LoadedModel, *, copies: bool, layers: bool) -> None:
    """Before each copy its whole buffer is made unusable; and copies are late, or the layers that they overtake."""
    streamed = loaded.streamed
    start = streamed.start

    def late(layer: int, slot: int) -> None:
        streamed._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streamed._side):
            streamed._slots[slot].fill_(255)
            if copies:
                torch.cuda._sleep(SLEEP_CYCLES)
        start(layer, slot)

    streamed.start = late
    if layers:
        for layer in loaded.spec.family.decoder_layers(loaded.model):
            layer.mlp.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP_CYCLES))
            layer.mlp.register_full_backward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP_CYCLES))


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(("copies", "layers"), [(False, False), (True, False), (False, True)])
def test_fp32_losses_and_gradients_are_those_of_resident_weights(
    folder: Path, copies: bool, layers: bool, checkpoints: bool
) -> None:
    expected_losses, expected = _gradient(_loaded(folder, "fp32"))
    ours = _loaded(folder, "fp32", checkpoints=checkpoints, streamed_layers=NUM_STREAMED)
    _slow_and_poisoned(ours, copies=copies, layers=layers)
    losses, gradient = _gradient(ours)
    assert losses == pytest.approx(expected_losses, rel=FP32_TOLERANCE)
    assert max(_error(gradient, expected).values()) < FP32_TOLERANCE


@pytest.mark.parametrize("group_rows", [1, 3])
@pytest.mark.parametrize(("copies", "layers"), [(True, False), (False, True)])
def test_rows_in_groups_wait_for_weights_that_come_once(
    folder: Path, copies: bool, layers: bool, group_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows in one pass, their layer inputs on the host, beside four passes of one row."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    one_by_one = _loaded(folder, "fp32")
    inputs = {name: value.to(CUDA) for name, value in tiny_inputs(one_by_one, num_images=4).items()}
    for row in range(4):
        (text_loss(one_by_one, {name: value[row : row + 1] for name, value in inputs.items()}) / 4).backward()
    expected = gradients(one_by_one.model)
    ours = _loaded(folder, "fp32", streamed_layers=NUM_STREAMED)
    decoder_layers = ours.spec.family.decoder_layers(ours.model)
    offload_layer_inputs(decoder_layers)
    compute_in_groups(decoder_layers, group_rows, row_dimensions=ours.spec.family.layer_row_dimensions)
    _slow_and_poisoned(ours, copies=copies, layers=layers)
    for _ in range(2):
        ours.model.zero_grad()
        before = ours.streamed.moved_bytes
        text_loss(ours, inputs).backward()
        assert max(_error(gradients(ours.model), expected).values()) < FP32_TOLERANCE
    assert ours.streamed.moved_bytes - before == 2 * (NUM_STREAMED - 2) * ours.streamed.host_bytes // NUM_STREAMED


def test_bf16_errs_no_more_than_without_streaming(folder: Path) -> None:
    exact = _gradient(_loaded(folder, "fp32"))[1]
    plain = _error(_gradient(_loaded(folder))[1], exact)
    ours = _loaded(folder, streamed_layers=NUM_STREAMED)
    _slow_and_poisoned(ours, copies=True, layers=False)
    for name, error in _error(_gradient(ours)[1], exact).items():
        assert error <= 1.2 * plain[name], name


def test_layers_that_do_not_wait_for_their_weights_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the tests above can fail."""
    expected = _gradient(_loaded(folder, "fp32"))[1]
    ours = _loaded(folder, "fp32", streamed_layers=NUM_STREAMED)
    _slow_and_poisoned(ours, copies=True, layers=False)
    monkeypatch.setattr(ours.streamed, "finish", lambda slot: None)
    errors = _error(_gradient(ours)[1], expected)
    assert not all(error < 0.1 for error in errors.values())


def test_copies_that_do_not_wait_for_their_buffer_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _gradient(_loaded(folder, "fp32"))[1]
    ours = _loaded(folder, "fp32", streamed_layers=NUM_STREAMED)
    _slow_and_poisoned(ours, copies=False, layers=True)
    monkeypatch.setattr(ours.streamed._side, "wait_stream", lambda stream: None)
    errors = _error(_gradient(ours)[1], expected)
    assert not all(error < 0.1 for error in errors.values())


def test_several_steps_with_answers_in_between_go_the_same_way(folder: Path) -> None:
    def course(**hardware: Any) -> tuple[list[float], Tensor]:
        loaded = _loaded(folder, "fp32", **hardware)
        if loaded.streamed is not None:
            _slow_and_poisoned(loaded, copies=True, layers=False)
        optimizer = torch.optim.AdamW(trainable(loaded.model), lr=1e-3)
        losses = []
        for _ in range(5):
            losses += _gradient(loaded)[0]
            optimizer.step()
            loaded.model.eval()
            with torch.no_grad():
                losses.append(text_loss(loaded, _inputs(loaded)).item())
                answer = loaded.model.generate(**_inputs(loaded), max_new_tokens=4, do_sample=False)
            loaded.model.train()
        return losses, answer

    expected_losses, expected = course()
    losses, answer = course(streamed_layers=NUM_STREAMED, embedding_on_host=True)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert torch.equal(answer, expected)


def _is_pinned(host: Tensor) -> bool:
    """Whether CUDA knows the memory of `host` as page-locked.

    `Tensor.is_pinned` asks CUDA about the first byte of the storage (`self.storage().data()` in
    aten/src/ATen/native/Memory.cpp). That of `host` begins ahead of the pages that are registered, so a storage is put
    on `host` that begins where it does.
    """
    memory = (ctypes.c_uint8 * host.numel()).from_address(host.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).is_pinned()


def _hosts(loaded: LoadedModel) -> list[Tensor]:
    return [layer.block for layer in loaded.streamed._packed]


@pytest.fixture(scope="module")
def workspaces(folder: Path) -> None:
    """What libraries allocate in their first calls is there."""
    _gradient(_loaded(folder))


def _peaks(load: Callable[[], LoadedModel]) -> tuple[LoadedModel, dict[str, int]]:
    """What is allocated at most while loading, then at rest, and at most in a pass."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load()
    loading = torch.cuda.max_memory_allocated()
    _gradient(loaded)
    loaded.model.zero_grad()
    rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _gradient(loaded)
    measured = {"loading": loading, "rest": rest, "pass": torch.cuda.max_memory_allocated()}
    return loaded, {name: size - before for name, size in measured.items()}


@pytest.mark.usefixtures("workspaces")
def test_memory_falls_by_what_is_streamed_and_bytes_are_counted(folder: Path) -> None:
    resident, before = _peaks(lambda: _loaded(folder))
    layer_bytes = block_bytes(layer_places(resident.spec.family.decoder_layers(resident.model)[0]))
    del resident
    loaded, after = _peaks(lambda: _loaded(folder, streamed_layers=NUM_STREAMED))
    saved_bytes = (NUM_STREAMED - 2) * layer_bytes
    assert layer_bytes > 2.6e6 / 2
    for moment in ("rest", "pass"):  # a block of up to 1 MiB more than asked for is not split
        assert before[moment] - after[moment] == pytest.approx(saved_bytes, abs=2**20)
    assert before["loading"] - after["loading"] >= saved_bytes - layer_bytes
    streamed = loaded.streamed
    assert all(_is_pinned(host) for host in _hosts(loaded))
    start_bytes = streamed.moved_bytes
    _gradient(loaded, num_passes=3)
    assert streamed.moved_bytes - start_bytes == 3 * 2 * saved_bytes


@pytest.mark.usefixtures("workspaces")
def test_an_embedding_in_ram_leaves_the_gpu(folder: Path) -> None:
    resident, before = _peaks(lambda: _loaded(folder))
    table = resident.model.get_base_model().get_input_embeddings().weight
    table_bytes = table.numel() * table.element_size()
    del resident, table
    loaded, after = _peaks(lambda: _loaded(folder, embedding_on_host=True))
    assert before["rest"] - after["rest"] == pytest.approx(table_bytes, abs=2**12)
    assert loaded.model.get_base_model().get_input_embeddings().weight.device.type == "cpu"


def test_memory_that_can_not_be_pinned_is_told_and_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _gradient(_loaded(folder, "fp32"))[1]
    runtime = torch.cuda.cudart()

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(runtime, name)

        def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:
            assert int(runtime.cudaHostRegister(address, size, flags)) == 0
            refused = runtime.cudaHostRegister(address, size, flags)  # a second time is an error
            runtime.cudaHostUnregister(address)
            return refused

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    with caplog.at_level(logging.WARNING):
        ours = _loaded(folder, "fp32", streamed_layers=NUM_STREAMED)
    assert "can't be pinned" in caplog.text
    assert not any(_is_pinned(host) for host in _hosts(ours))
    assert max(_error(_gradient(ours)[1], expected).values()) < FP32_TOLERANCE


def test_pinned_memory_is_given_back_with_the_weights(folder: Path) -> None:
    loaded = _loaded(folder, streamed_layers=NUM_STREAMED)
    host = _hosts(loaded)[0]
    assert _is_pinned(host)
    del loaded
    gc.collect()
    assert not _is_pinned(host)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return build_tiny_llava(folder / "model", image_px=32, num_layers=6), write_llava_jsonl(folder / "data", 12)


@pytest.mark.parametrize("random_weights_seed", [None, 7])
def test_a_whole_run_from_loading_to_the_proof(
    paths: tuple[Path, Path], tmp_path: Path, random_weights_seed: int | None
) -> None:
    """Loading from a checkpoint and with random weights, validation, answers, plan and measured memory, the proof."""
    losses = {}
    for name, hardware in (("plain", {}), ("in RAM", {"streamed_layers": 5, "embedding_on_host": True})):
        config = TrainingConfig.model_validate(
            {
                "model": {"name": str(paths[0]), "random_weights_seed": random_weights_seed},
                "data": {"data_path": str(paths[1]), "num_workers": 0, "val_fraction": 0.2},
                "training": {"gradient_accumulation_steps": 4, "max_steps": 6, "learning_rate": 5e-3},
                "hardware": {"device": "cuda", "mixed_precision": "fp32", "checkpointed_layers": None, **hardware},
                "validation": {"num_generated": 1, "max_new_tokens": 4},
                "checkpoints": {"every_steps": 3},
            }
        )
        outcome = train(config, sources={}, run_folder=tmp_path / name, listener=SilentListener(), command="test")
        lines = (outcome.run_folder / "metrics.jsonl").read_text().splitlines()
        losses[name] = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]
        assert outcome.verification["ok"]
        memory = json.loads((outcome.run_folder / "memory.json").read_text())
        plan = json.loads((outcome.run_folder / "plan.json").read_text())
        assert memory["host_weights_bytes"] == plan["host_bytes"]
        assert (memory["streamed_bytes"] > 0) is bool(hardware)
        assert plan["peak"]["allocated_bytes"] == pytest.approx(memory["peak_allocated_bytes"], abs=2 * 2**20)
    assert losses["in RAM"] == pytest.approx(losses["plain"], rel=1e-4)
