"""Activation checkpointing: the same gradients, less kept, and nothing changed outside of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from eightgig.core.errors import ConfigError
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.models.load import LoadedModel
from eightgig.step.build import checkpoint_as_configured
from tiny_training import gradients, load_tiny, text_loss, tiny_config, tiny_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


def _loaded(folder: Path, *, dropout: float = 0.0, precision: str = "fp32") -> LoadedModel:
    lora = {"rank": 8, "alpha": 16, "dropout": dropout}
    loaded = load_tiny(folder, tiny_config({"training": {"lora": lora}}, precision=precision), adapters=True)
    loaded.model.train()
    return loaded


def _checkpointed(folder: Path, *, preserve_rng_state: bool = False, **options) -> LoadedModel:
    loaded = _loaded(folder, **options)
    layers = loaded.spec.family.decoder_layers(loaded.model)
    checkpoint_layers(loaded.model, layers, preserve_rng_state=preserve_rng_state)
    return loaded


def _gradient(loaded: LoadedModel) -> dict[str, Tensor]:
    torch.manual_seed(5)
    text_loss(loaded, tiny_inputs(loaded, num_images=2)).backward()
    return gradients(loaded.model)


def _assert_equal(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert ours.keys() == reference.keys()
    assert len(ours) == 28
    assert all(torch.equal(ours[name], reference[name]) for name in ours)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_the_same(folder: Path, precision: str) -> None:
    _assert_equal(
        _gradient(_checkpointed(folder, precision=precision)), _gradient(_loaded(folder, precision=precision))
    )


def test_dropout_is_the_same_in_both_passes_with_the_rng_state_preserved(folder: Path) -> None:
    reference = _gradient(_loaded(folder, dropout=0.5))
    _assert_equal(_gradient(_checkpointed(folder, dropout=0.5, preserve_rng_state=True)), reference)
    without = _gradient(_checkpointed(folder, dropout=0.5, preserve_rng_state=False))
    assert any(not torch.equal(without[name], reference[name]) for name in reference)


def _count_calls(loaded: LoadedModel) -> list[str]:
    calls: list[str] = []
    for index, layer in enumerate(loaded.spec.family.decoder_layers(loaded.model)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(f"layer {index}"))
    return calls


def test_each_layer_is_computed_again_in_the_backward_pass_last_first(folder: Path) -> None:
    loaded = _checkpointed(folder)
    calls = _count_calls(loaded)
    loss = text_loss(loaded, tiny_inputs(loaded))
    assert calls == ["layer 0", "layer 1"]
    loss.backward()
    assert calls == ["layer 0", "layer 1", "layer 1", "layer 0"]


def test_fewer_bytes_are_kept_for_the_backward_pass(folder: Path) -> None:
    def kept_by_forward(loaded: LoadedModel) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            text_loss(loaded, tiny_inputs(loaded, num_images=8))
        return sum(kept.values())

    assert kept_by_forward(_checkpointed(folder)) < 0.5 * kept_by_forward(_loaded(folder))


def test_evaluation_and_generation_run_the_layers_once_and_give_the_same(folder: Path) -> None:
    loaded, plain = _checkpointed(folder), _loaded(folder)
    loaded.model.eval()
    plain.model.eval()
    inputs = tiny_inputs(loaded)
    calls = _count_calls(loaded)
    assert torch.equal(loaded.model(**inputs).logits, plain.model(**inputs).logits)
    assert calls == ["layer 0", "layer 1"]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.model.generate(**inputs, **options), plain.model.generate(**inputs, **options))


def test_training_mode_without_gradients_keeps_the_plain_forward(folder: Path) -> None:
    loaded = _checkpointed(folder)
    calls = _count_calls(loaded)
    with torch.no_grad():
        text_loss(loaded, tiny_inputs(loaded))
    assert calls == ["layer 0", "layer 1"]


def test_a_cache_in_training_is_refused_since_it_would_be_filled_twice(folder: Path) -> None:
    loaded = _checkpointed(folder)
    with pytest.raises(ValueError, match="train with use_cache=False"):
        loaded.model(**tiny_inputs(loaded), use_cache=True)


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, first: Tensor, *, second: Tensor, flag: bool = False) -> tuple[Tensor, bool]:
        return self.linear(first) * second, flag


def test_keyword_arguments_and_several_outputs_pass_through() -> None:
    model = nn.Sequential(_TwoInputs())
    layer = model[0]
    first, second = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    expected, _ = layer(first, second=second)
    reference = torch.autograd.grad(expected.square().sum(), [second, layer.linear.weight])
    checkpoint_layers(model, [layer], preserve_rng_state=False)
    output, flag = layer(first, second=second, flag=True)
    assert flag is True
    ours = torch.autograd.grad(output.square().sum(), [second, layer.linear.weight])
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_wrapping_twice_or_a_stranger_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    checkpoint_layers(model, list(model), preserve_rng_state=False)
    with pytest.raises(ValueError, match=r"layer 0 \(Linear\) is wrapped already"):
        checkpoint_layers(model, list(model), preserve_rng_state=False)
    with pytest.raises(ValueError, match=r"layer 0 \(Linear\) is not part of the model"):
        checkpoint_layers(model, [nn.Linear(2, 2)], preserve_rng_state=False)


@pytest.mark.parametrize(("wanted", "expected"), [(None, {0, 1, 2}), (1, {0}), (2, {0, 1}), (3, {0, 1, 2})])
def test_the_first_layers_are_checkpointed(tmp_path: Path, wanted: int | None, expected: set[int]) -> None:
    loaded = _of_three_layers(tmp_path, wanted)
    calls = _count_calls(loaded)
    text_loss(loaded, tiny_inputs(loaded)).backward()
    assert {int(call.removeprefix("layer ")) for call in calls if calls.count(call) == 2} == expected
    assert set(calls) == {"layer 0", "layer 1", "layer 2"}


def test_more_layers_than_there_are_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hardware\.checkpointed_layers = 4: at most the 3 decoder layers"):
        _of_three_layers(tmp_path, 4)


def _of_three_layers(folder: Path, checkpointed: int | None) -> LoadedModel:
    tiny.build_tiny_llava(folder / "model", num_layers=3)
    config = tiny_config({"hardware": {"checkpointed_layers": checkpointed}})
    loaded = load_tiny(folder / "model", config, adapters=True)
    checkpoint_as_configured(config, loaded.spec, loaded.model)
    loaded.model.train()
    return loaded
