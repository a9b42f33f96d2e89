"""Layer inputs on the host: the same gradients, whenever the copies happen, and what lies where."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from eightgig.memory import layer_inputs
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.host_copies import PIECE_BYTES, HostCopy, HostPieces, Transfers
from eightgig.memory.layer_inputs import MIN_OFFLOADED_BYTES, LayerInputs, offload_layer_inputs
from eightgig.models.load import LoadedModel
from eightgig.step.build import checkpoint_as_configured, offload_as_configured
from lever_numerics import Outcome, assert_as_exact_in_bf16, assert_close, outcome_of, randomise_lora_b
from tiny_training import load_tiny, text_loss, tiny_config, tiny_inputs

POISON = 0xFF  # bytes that make NaN of every floating-point type


class PoisonedPieces(HostPieces):
    """Host memory that holds NaN from the moment at which it may be written again."""

    def give_back(self, pieces: list[Tensor]) -> None:
        for piece in pieces:
            piece.fill_(POISON)
        super().give_back(pieces)


class LateTransfers(Transfers):
    """Copies that happen at the last moment that the waits allow; until then there is NaN where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.host = PoisonedPieces(pins=False)
        self._sent: dict[int, Tensor] = {}
        self._fetched: dict[int, Tensor] = {}

    def send(self, tensor: Tensor) -> HostCopy:
        copy = super().send(torch.full_like(tensor, float("nan")))
        self._sent[id(copy)] = tensor
        return copy

    def wait_until_sent(self, copy: HostCopy) -> None:
        _write(copy, self._sent.pop(id(copy)))

    def fetch(self, copy: HostCopy) -> Tensor:
        assert id(copy) not in self._sent, "it is fetched before it has been sent"
        tensor = torch.full(copy.shape, float("nan"), dtype=copy.dtype)
        self._fetched[id(copy)] = tensor
        return tensor

    def wait_until_fetched(self, copy: HostCopy) -> None:
        tensor = self._fetched.pop(id(copy), None)
        if tensor is not None:
            held = torch.cat(copy.pieces)[: copy.num_bytes]
            tensor.data.copy_(held.view(copy.dtype).view(copy.shape))


class HastyTransfers(LateTransfers):
    """Late copies without a wait for their end: what a naive version would make of them."""

    def end(self, copy: HostCopy) -> None:
        copy.is_ended = True
        self.host.give_back(copy.pieces)


def _write(copy: HostCopy, tensor: Tensor) -> None:
    data = tensor.contiguous().view(-1).view(torch.uint8)
    for piece, part in zip(copy.pieces, data.split(PIECE_BYTES), strict=True):
        piece[: part.numel()].copy_(part)


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny inputs are offloaded too."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"), num_layers=5)


def _loaded(
    folder: Path, transfers: Transfers | None = None, *, precision: str = "fp32", dropout: float = 0.0
) -> LoadedModel:
    """The model with random adapters; with `transfers` its layer inputs go there."""
    hardware = {"offload_layer_inputs": True} if transfers is not None else {"gradient_checkpointing": False}
    lora = {"rank": 8, "alpha": 16, "dropout": dropout}
    config = tiny_config({"training": {"lora": lora}, "hardware": hardware}, precision=precision)
    loaded = load_tiny(folder, config, adapters=True)
    randomise_lora_b(loaded.model, seed=1)
    checkpoint_as_configured(config, loaded.spec, loaded.model)
    offload_as_configured(config, loaded.spec, loaded.model, transfers)
    loaded.model.train()
    return loaded


def _outcome(loaded: LoadedModel, *, num_images: int, num_passes: int = 1) -> Outcome:
    """Of `num_passes` micro-batches, each of other data."""
    loaded.model.zero_grad()
    total = torch.zeros(())
    for index in range(num_passes):
        torch.manual_seed(index)
        loss = text_loss(loaded, tiny_inputs(loaded, num_images=num_images + index, seed=index))
        loss.backward()
        total = total + loss.detach()
    return outcome_of(total, loaded.model)


@pytest.mark.parametrize("transfers", [Transfers, LateTransfers])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_steps_of_several_sizes_give_the_same_gradients(
    folder: Path, transfers: type[Transfers], dropout: float
) -> None:
    plain, ours = _loaded(folder, dropout=dropout), _loaded(folder, transfers(), dropout=dropout)
    for num_images in (3, 1, 4):
        passes = {"num_images": num_images, "num_passes": 2}
        assert_close(_outcome(ours, **passes), _outcome(plain, **passes))


def test_without_the_waits_the_gradients_are_wrong(folder: Path) -> None:
    hasty = _outcome(_loaded(folder, HastyTransfers()), num_images=2)
    assert any(bool(value.isnan().any()) for value in hasty.gradients.values())


def test_bf16_is_as_exact_as_without(folder: Path) -> None:
    exact, plain = (_outcome(_loaded(folder, precision=name), num_images=2) for name in ("fp32", "bf16"))
    ours = _outcome(_loaded(folder, LateTransfers(), precision="bf16"), num_images=2)
    assert_as_exact_in_bf16(ours, plain, exact)


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, states: Tensor, scale: Tensor, *, shift: Tensor) -> Tensor:
        return states + torch.tanh(self.linear(states)) * scale + shift


class _Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width) for _ in range(depth))

    def forward(self, states: Tensor) -> Tensor:
        scale, shift = torch.full(states.shape[-1:], 0.5), torch.ones(states.shape[-1])
        for layer in self.layers:
            states = layer(states, scale, shift=shift)
        return states.square().mean()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.booleans())
def test_layers_of_random_shapes(depth: int, rows: int, width: int, learns: bool, is_autocast: bool) -> None:
    torch.manual_seed(depth + 10 * rows + 100 * width)
    model = _Stack(width, depth).train()
    states = torch.randn(rows, width, requires_grad=learns)

    def outcome() -> Outcome:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            loss = model(states)
        loss.backward()
        return outcome_of(loss, model)

    plain = outcome()
    checkpoint_layers(model, list(model.layers), preserve_rng_state=False)
    offload_layer_inputs(list(model.layers), LateTransfers())
    for _ in range(2):
        ours = outcome()
        assert torch.equal(ours.loss, plain.loss)
        assert all(torch.equal(ours.gradients[name], plain.gradients[name]) for name in plain.gradients)


def _offloaded_stack(width: int, depth: int) -> tuple[_Stack, LateTransfers]:
    model, transfers = _Stack(width, depth).train(), LateTransfers()
    checkpoint_layers(model, list(model.layers), preserve_rng_state=False)
    offload_layer_inputs(list(model.layers), transfers)
    return model, transfers


def test_the_host_gives_the_same_memory_again_and_holds_all_inputs_but_the_last() -> None:
    model, transfers = _offloaded_stack(8, 4)
    for _ in range(3):
        model(torch.randn(2, 8, requires_grad=True)).backward()
        assert transfers.host.num_bytes == 3 * PIECE_BYTES


def test_a_pass_without_a_backward_gives_its_memory_back() -> None:
    model, transfers = _offloaded_stack(8, 4)
    for _ in range(3):
        loss = model(torch.randn(2, 8, requires_grad=True))
        assert len(transfers.host._free) == 0
        del loss
        gc.collect()
        assert len(transfers.host._free) == 3
    assert transfers.host.num_bytes == 3 * PIECE_BYTES


@pytest.mark.parametrize(("offloads", "expected"), [(True, 2), (False, 6)])
def test_an_input_leaves_the_device_before_the_next_layer_computes(offloads: bool, expected: int) -> None:
    """Of six inputs there are at most the one at work, and the first, which the caller holds."""
    model = _offloaded_stack(8, 6)[0] if offloads else _Stack(8, 6).train()
    if not offloads:
        checkpoint_layers(model, list(model.layers), preserve_rng_state=False)
    alive: set[int] = set()
    most = 0

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal most
        storage = inputs[0].untyped_storage()
        alive.add(storage._cdata)
        weakref.finalize(storage, alive.discard, storage._cdata)
        most = max(most, len(alive))

    for layer in model.layers:
        layer.linear.register_forward_pre_hook(count)
    loss = model(torch.randn(4, 8, requires_grad=True))
    assert most == expected
    loss.backward()


def test_small_inputs_and_evaluation_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, transfers = _offloaded_stack(8, 3)
    with torch.no_grad():
        model(torch.randn(2, 8))
    model.eval()
    model(torch.randn(2, 8, requires_grad=True)).backward()
    assert transfers.host.num_bytes == 0
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", MIN_OFFLOADED_BYTES)
    model.train()
    model(torch.randn(MIN_OFFLOADED_BYTES // 32 - 1, 8, requires_grad=True)).backward()
    assert transfers.host.num_bytes == 0
    model(torch.randn(MIN_OFFLOADED_BYTES // 32, 8, requires_grad=True)).backward()
    assert transfers.host.num_bytes == 2 * PIECE_BYTES


def test_a_second_backward_pass_through_one_graph_is_refused() -> None:
    model, _ = _offloaded_stack(8, 3)
    loss = model(torch.randn(2, 8, requires_grad=True))
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    with pytest.raises(RuntimeError, match="goes through its graph once"):
        torch.autograd.grad(loss, list(model.parameters()))


def test_memory_that_cannot_be_pinned_is_ordinary_and_this_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def empty_unless_pinned(*args: object, pin_memory: bool = False, **kwargs: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty_unless_pinned)
    host = HostPieces(pins=True)
    with caplog.at_level(logging.WARNING, logger="eightgig"):
        pieces = host.take(2 * PIECE_BYTES + 1)
    assert [piece.numel() for piece in pieces] == [PIECE_BYTES] * 3
    assert not host.is_pinned
    assert len(caplog.records) == 1
    assert "no more than 0 MiB of the host's memory could be pinned (CUDA error: out of memory)" in caplog.text


def test_with_rows_in_groups_the_input_of_the_group_before_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer; the first one's last group follows no group of the pass before, whose graph is gone."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    transfers = Transfers()
    names: dict[int, str] = {}
    begun: list[str] = []
    send, fetch = transfers.send, transfers.fetch

    def named(tensor: Tensor) -> HostCopy:
        copy = send(tensor)
        names[id(copy)] = f"layer {int(tensor[0]) // 2} group {int(tensor[0]) % 2}"
        return copy

    monkeypatch.setattr(transfers, "send", named)
    monkeypatch.setattr(transfers, "fetch", lambda copy: (begun.append(names[id(copy)]), fetch(copy))[1])
    inputs = LayerInputs(transfers)
    for _ in range(2):
        begun.clear()
        kept = [
            inputs.keep(torch.full((3,), float(2 * layer + group)), is_first=layer == 0, is_last=layer == 2)
            for layer in range(3)
            for group in range(2)
        ]
        seen = []
        while kept:
            tensor = inputs.hand_back(kept.pop())
            seen.append((int(tensor[0]), tuple(begun)))
        wanted = ["layer 1 group 1", "layer 1 group 0", "layer 0 group 1", "layer 0 group 0"]
        assert [place for place, _ in seen] == [5, 4, 3, 2, 1, 0]
        assert [list(came) for _, came in seen] == [[], wanted[:1], wanted[:2], wanted[:3], wanted, wanted]
