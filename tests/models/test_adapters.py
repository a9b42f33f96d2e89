"""Adapters: where they sit, how they start, and the check that the first backward reached them and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear

import tiny
from eightgig.core.errors import ConfigError, EnvironmentProblem, UnsupportedModel
from eightgig.models.adapters import attach_adapters, check_gradients, target_paths
from tiny_training import gradients, load_tiny, text_loss, tiny_config, tiny_inputs, trainable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


def _targets(pattern: str) -> dict:
    return {"training": {"lora": {"rank": 8, "alpha": 16, "target_modules": pattern}}}


@pytest.mark.parametrize(("method", "layer_type"), [("qlora", LoraLinear4bit), ("lora", LoraLinear)])
def test_adapters_sit_on_all_language_linears_and_nothing_else_learns(
    folder: Path, method: str, layer_type: type
) -> None:
    config = tiny_config({"training": {"method": method, "lora": {"rank": 8, "alpha": 16}}}, precision="bf16")
    loaded = load_tiny(folder, config, adapters=True)
    assert sum(type(module) is layer_type for module in loaded.model.modules()) == 14
    learning = {name: value for name, value in loaded.model.named_parameters() if value.requires_grad}
    assert len(learning) == 28
    assert all(".language_model.layers." in name and ".lora_" in name for name in learning)
    assert {value.dtype for value in learning.values()} == {torch.float32}
    # rank × (in + out): q, k, v, o are 64 × 64, gate and up 64 → 128, down 128 → 64, in two layers
    assert sum(value.numel() for value in learning.values()) == 2 * 8 * (4 * 128 + 3 * 192)
    assert loaded.receipt.num_trainable == 2 * 8 * (4 * 128 + 3 * 192)


def test_new_adapters_change_nothing(folder: Path) -> None:
    config = tiny_config()
    loaded = load_tiny(folder, config)
    inputs = tiny_inputs(loaded)
    with torch.no_grad():
        before = loaded.model(**inputs).logits
        attach_adapters(loaded, config)
        assert torch.equal(loaded.model(**inputs).logits, before)


def test_first_values_depend_on_the_seed_alone(folder: Path) -> None:
    def first_values(seed: int, torch_seed: int) -> torch.Tensor:
        torch.manual_seed(torch_seed)
        expected_next = torch.Generator().manual_seed(torch_seed)
        loaded = load_tiny(folder, tiny_config().model_copy(update={"seed": seed}))
        attach_adapters(loaded, tiny_config().model_copy(update={"seed": seed}))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected_next))
        return torch.cat([value.detach().flatten() for value in trainable(loaded.model)])

    assert torch.equal(first_values(1, 0), first_values(1, 99))
    assert not torch.equal(first_values(1, 0), first_values(2, 0))


def test_without_lora_nothing_is_attached(folder: Path) -> None:
    config = tiny_config({"training": {"method": "full", "lora": None}})
    loaded = load_tiny(folder, config)
    model = loaded.model
    attach_adapters(loaded, config)
    assert loaded.model is model


def test_the_users_own_pattern_chooses_the_layers(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config(_targets(r".*layers\.1\.self_attn\.(q|v)_proj")))
    config = tiny_config(_targets(r".*language_model.*layers\.1\.self_attn\.(q|v)_proj"))
    attach_adapters(loaded, config)
    names = {name.split(".lora_")[0] for name, value in loaded.model.named_parameters() if value.requires_grad}
    prefix = "base_model.model.model.language_model.layers.1.self_attn"
    assert names == {f"{prefix}.q_proj", f"{prefix}.v_proj"}


def test_a_pattern_that_matches_nothing_shows_layers_near_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_modules = q_proj: matches no module") as caught:
        load_tiny(folder, tiny_config(_targets("q_proj")), adapters=True)
    assert "model.language_model.layers.1.self_attn.q_proj" in str(caught.value)
    assert "leading `.*`" in str(caught.value)


def test_a_pattern_that_matches_other_modules_shows_the_linears_inside(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no linear layers: model\.language_model\.layers\.0\.mlp \(LlamaMLP\)"
    ) as caught:
        load_tiny(folder, tiny_config(_targets(r".*layers\.0\.mlp")), adapters=True)
    assert "model.language_model.layers.0.mlp.gate_proj" in str(caught.value)


def test_what_is_no_regular_expression_is_a_config_error(folder: Path) -> None:
    model = load_tiny(folder, tiny_config()).model
    with pytest.raises(ConfigError, match=r"target_modules = \(q_proj: not a regular expression"):
        target_paths(model, "(q_proj")


def test_another_number_of_layers_than_the_registry_says_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny(folder, tiny_config())
    monkeypatch.setattr(
        type(loaded.spec.family), "lora_pattern", r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
    )
    with pytest.raises(UnsupportedModel, match=r"has 8 linear layers where adapters belong[\s\S]*14"):
        attach_adapters(loaded, tiny_config())


def test_a_sound_first_backward_passes_the_check(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config(), adapters=True)
    text_loss(loaded, tiny_inputs(loaded)).backward()
    check_gradients(loaded.model)
    assert len(gradients(loaded.model)) == 28


def _after_backward(folder: Path):
    loaded = load_tiny(folder, tiny_config(), adapters=True)
    text_loss(loaded, tiny_inputs(loaded)).backward()
    return loaded.model


def test_a_missing_gradient_is_named(folder: Path) -> None:
    model = _after_backward(folder)
    model.get_submodule("base_model.model.model.language_model.layers.1.mlp.up_proj").lora_B.default.weight.grad = None
    with pytest.raises(EnvironmentProblem, match=r"layers\.1\.mlp\.up_proj\.lora_B\.default\.weight got no gradient"):
        check_gradients(model)


def test_a_gradient_that_is_not_finite_is_named(folder: Path) -> None:
    model = _after_backward(folder)
    model.get_submodule("base_model.model.model.language_model.layers.0.mlp.up_proj").lora_A.default.weight.grad[
        0, 0
    ] = float("nan")
    with pytest.raises(EnvironmentProblem, match=r"gradient of .*layers\.0\.mlp\.up_proj\.lora_A.* holds NaN"):
        check_gradients(model)


def test_a_frozen_parameter_with_a_gradient_is_named(folder: Path) -> None:
    model = _after_backward(folder)
    head = model.get_base_model().lm_head.weight
    head.grad = torch.zeros_like(head)
    with pytest.raises(EnvironmentProblem, match=r"the frozen parameter base_model\.model\.lm_head\.weight has"):
        check_gradients(model)


def test_adapters_that_the_loss_does_not_reach_are_named(folder: Path) -> None:
    model = _after_backward(folder)
    for name, parameter in model.named_parameters():
        if "v_proj.lora_B" in name:
            parameter.grad.zero_()
    with pytest.raises(EnvironmentProblem, match=r"adapters on v_proj is zero"):
        check_gradients(model)
