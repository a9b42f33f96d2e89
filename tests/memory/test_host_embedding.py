"""The table of embeddings on the host: what every model computes stays as it was, and what can't be done is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from eightgig.core.errors import ConfigError
from eightgig.memory.host_embedding import look_up_on_host
from eightgig.models.host_weights import keep_on_host
from eightgig.models.load import LoadedModel
from eightgig.registry.family import base_model
from tiny_training import gradients, load_tiny, text_loss, tiny_config, tiny_inputs, trainable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


def _loaded(folder: Path, *, on_host: bool, precision: str = "fp32") -> LoadedModel:
    config = tiny_config({"hardware": {"device": "cpu", "embedding_on_host": on_host, "mixed_precision": precision}})
    loaded = load_tiny(folder, config, adapters=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(loaded.model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return loaded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_the_same_to_the_bit(folder: Path, precision: str) -> None:
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for on_host in (True, False):
        loaded = _loaded(folder, on_host=on_host, precision=precision)
        loaded.model.train()
        loss = text_loss(loaded, tiny_inputs(loaded, num_images=3))
        loss.backward()
        results.append((loss, gradients(loaded.model)))
    (loss, ours), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    assert ours.keys() == expected.keys()
    assert len(ours) == 28
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_answers_are_the_same(folder: Path) -> None:
    answers = []
    for on_host in (True, False):
        loaded = _loaded(folder, on_host=on_host)
        loaded.model.eval()
        answers.append(loaded.model.generate(**tiny_inputs(loaded), max_new_tokens=5, do_sample=False))
    assert torch.equal(*answers)


class _Scaled(nn.Embedding):
    """As Gemma's: a factor in a buffer, which must lie where the rows do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("factor", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor.to(self.weight.dtype)


@given(rows=st.integers(1, 50), width=st.integers(1, 9), shape=st.lists(st.integers(0, 4), max_size=3))
def test_rows_of_any_shape_are_those_of_the_table(rows: int, width: int, shape: list[int]) -> None:
    table = _Scaled(rows, width).requires_grad_(False)
    ids = torch.randint(rows, shape)
    expected = 3.0 * table.weight[ids]
    look_up_on_host(table)
    assert torch.equal(table(ids), expected)
    assert {tensor.device for tensor in (table.weight, table.factor)} == {CPU}


def test_a_trained_table_is_refused() -> None:
    with pytest.raises(ValueError, match="must be frozen"):
        look_up_on_host(nn.Embedding(3, 4))


def test_the_receipt_says_what_lies_in_ram(folder: Path) -> None:
    rows = {row.group: row for row in _loaded(folder, on_host=True).receipt.rows}
    assert {group for group, row in rows.items() if row.on_host} == {"embeddings"}
    plain = {row.group: row for row in _loaded(folder, on_host=False).receipt.rows}
    assert not any(row.on_host for row in plain.values())
    assert {group: row.bytes_now for group, row in rows.items()} == {
        group: row.bytes_now for group, row in plain.items()
    }


def test_a_table_that_is_the_heads_weight_too_is_refused(folder: Path) -> None:
    loaded = _loaded(folder, on_host=False)
    base = base_model(loaded.model)
    base.lm_head.weight = base.get_input_embeddings().weight
    config = tiny_config({"hardware": {"embedding_on_host": True}})
    with pytest.raises(ConfigError, match=r"embedding_on_host = true: false for .*its head computes with the same"):
        keep_on_host(config.hardware, loaded.spec, loaded.model, CPU)
