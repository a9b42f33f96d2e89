"""Rows in groups: the numbers of whole batches, one group's memory, weights brought once; what can't be divided."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from eightgig.core.errors import UnsupportedModel
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.row_groups import compute_in_groups
from eightgig.memory.streaming import StreamedWeights
from eightgig.models.load import LoadedModel
from lever_numerics import Outcome, assert_close, outcome_of, randomise_lora_b
from tiny_training import load_tiny, text_loss, tiny_config, tiny_inputs

NUM_LAYERS = 5
WIDTH, KINDS = 6, 3  # more than there are tokens


class _Layer(nn.Module):
    """Takes each kind of argument that decoder layers have, and hands something to later layers."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        hidden: Tensor,
        states: Tensor,
        *,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor],
        images: Tensor,
        table: Tensor,
        shared: Any,
        flag: bool,
    ) -> tuple[Tensor, None]:
        assert flag is True
        scores = hidden @ hidden.transpose(1, 2)
        scores = scores if mask is None else scores + mask[:, 0]
        inner = self.mix(torch.tanh(scores @ hidden)) * states + table.sum()
        inner = inner * positions[0].sum(0) + positions[1].sum(0)
        inner = inner + images.view(len(hidden), -1, WIDTH).mean(1, keepdim=True)
        if self.index == 0:
            shared["first"] = (inner.sin(), inner.cos())
        else:
            inner = inner + shared["first"][0] * shared["first"][1]
        return hidden + inner, None


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(index) for index in range(3))

    def forward(self, hidden: Tensor, *args: Tensor, **kwargs: Any) -> Tensor:
        shared: UserDict[str, Any] = UserDict()
        for layer in self.layers:
            hidden, nothing = layer(hidden, *args, shared=shared, **kwargs)
            assert nothing is None
        return hidden


DIMENSIONS = {"positions": -3, "images": 0, "table": None}


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 7),
    group_rows=st.integers(1, 8),
    num_tokens=st.integers(1, 5),
    mask_rows=st.sampled_from([None, 1, "all"]),
    num_images=st.integers(1, 3),
    checkpoints=st.booleans(),
)
def test_the_numbers_of_whole_batches(
    num_rows: int, group_rows: int, num_tokens: int, mask_rows: Any, num_images: int, checkpoints: bool
) -> None:
    torch.manual_seed(num_rows + 10 * num_tokens)
    model = _Stack().double()
    shape = (num_rows, num_tokens, WIDTH)
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    states = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    size = num_rows if mask_rows == "all" else mask_rows
    arguments = {
        "mask": None if size is None else torch.randn(size, 1, num_tokens, num_tokens, dtype=torch.float64),
        "positions": tuple(torch.randn(KINDS, *shape, dtype=torch.float64) for _ in range(2)),
        "images": torch.randn(num_rows * num_images, 2, WIDTH, dtype=torch.float64, requires_grad=True),
        "table": torch.randn(2, 5, dtype=torch.float64, requires_grad=True),
        "flag": True,
    }
    wanted = [hidden, states, arguments["images"], arguments["table"], *model.parameters()]
    output = model(hidden, states, **arguments)
    expected = [output, *torch.autograd.grad(output.square().sum(), wanted)]
    if checkpoints:
        checkpoint_layers(model, list(model.layers), preserve_rng_state=False)
    compute_in_groups(model.layers, group_rows, row_dimensions=DIMENSIONS)
    rows: list[int] = []
    for layer in model.layers:
        layer.mix.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    output = model(hidden, states, **arguments)
    assert max(rows) == min(group_rows, num_rows)
    for ours, right in zip([output, *torch.autograd.grad(output.square().sum(), wanted)], expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


class _Named(nn.Module):
    def forward(self, hidden: Tensor, extra: Any = None) -> Any:
        return hidden if extra is None else (hidden, extra)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (torch.zeros(5, 2), r"argument extra is \[5, 2\], for 3 rows"),
        (torch.zeros(6, 2), r"argument extra is \[6, 2\], for 3 rows"),
        (torch.zeros(3, 3, 4), r"argument extra is \[3, 3, 4\], for 3 rows"),
        (7, "it returns a int, which has no rows"),
    ],
)
def test_what_can_not_be_divided_is_refused(extra: Any, reason: str) -> None:
    layer = _Named()
    compute_in_groups([layer], 2, row_dimensions={})
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        layer(torch.zeros(3, 4, WIDTH), extra=extra)
    assert "micro_batches_per_pass" in str(refusal.value)
    with pytest.raises(UnsupportedModel, match="no positional argument"):
        layer(hidden=torch.zeros(3, 4, WIDTH))


def test_evaluation_takes_whole_batches() -> None:
    layer = _Named()
    compute_in_groups([layer], 2, row_dimensions={})
    layer.eval()
    assert layer(torch.zeros(3, 4, WIDTH), extra=7)[1] == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"), num_layers=NUM_LAYERS)


def _loaded(folder: Path, *, streamed: int = 0, dropout: float = 0.0, checkpoints: bool = True) -> LoadedModel:
    sections = {
        "training": {"lora": {"rank": 8, "alpha": 16, "dropout": dropout}},
        "hardware": {"device": "cpu", "mixed_precision": "fp32", "streamed_layers": streamed},
    }
    loaded = load_tiny(folder, tiny_config(sections), adapters=True)
    randomise_lora_b(loaded.model, seed=3)
    if checkpoints:
        layers = loaded.spec.family.decoder_layers(loaded.model)
        checkpoint_layers(loaded.model, layers, preserve_rng_state=dropout > 0)
    loaded.model.train()
    return loaded


def _grouped(loaded: LoadedModel, group_rows: int = 1) -> LoadedModel:
    compute_in_groups(loaded.spec.family.decoder_layers(loaded.model), group_rows, row_dimensions={})
    return loaded


def _outcome(loaded: LoadedModel, *, one_by_one: bool = False) -> Outcome:
    """Of four rows in one pass; or of four passes with a row each."""
    torch.manual_seed(11)
    inputs = tiny_inputs(loaded, num_images=4)
    passes = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(4)] if one_by_one else [inputs]
    losses = [text_loss(loaded, each) / len(passes) for each in passes]
    for loss in losses:
        loss.backward()
    return outcome_of(torch.stack(losses).sum(), loaded.model)


def _poison(streamed: StreamedWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each copy its whole buffer is made unusable."""
    start = streamed.start

    def poisoned(layer: int, slot: int) -> None:
        streamed._slots[slot].fill_(255)
        start(layer, slot)

    monkeypatch.setattr(streamed, "start", poisoned)


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("group_rows", [1, 3])
def test_streamed_weights_are_brought_once_for_all_rows(
    folder: Path, group_rows: int, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _grouped(_loaded(folder, streamed=NUM_LAYERS, checkpoints=checkpoints), group_rows)
    streamed = ours.streamed
    assert streamed is not None
    _poison(streamed, monkeypatch)
    _outcome(ours)
    ours.model.zero_grad()
    before = streamed.moved_bytes
    assert_close(_outcome(ours), _outcome(_loaded(folder), one_by_one=True))
    assert streamed.moved_bytes - before == 2 * (NUM_LAYERS - 2) * streamed.host_bytes // NUM_LAYERS


def test_a_layer_is_done_with_all_rows_before_another_begins(folder: Path) -> None:
    loaded = _grouped(_loaded(folder))
    calls: list[int] = []
    for index, layer in enumerate(loaded.spec.family.decoder_layers(loaded.model)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    _outcome(loaded)
    forward = [index for index in range(NUM_LAYERS) for _ in range(4)]
    assert calls == forward + forward[::-1]


def test_dropout_draws_the_same_when_a_group_is_computed_again(folder: Path) -> None:
    plain = _outcome(_grouped(_loaded(folder, dropout=0.5, checkpoints=False)))
    ours = _outcome(_grouped(_loaded(folder, dropout=0.5)))
    assert all(torch.equal(ours.gradients[name], value) for name, value in plain.gradients.items())
    assert torch.equal(ours.loss, plain.loss)
