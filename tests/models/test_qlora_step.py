"""QLoRA by hand on the tiny LLaVA: it learns, its gradients are right, and evaluation in between changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import tiny
from eightgig.models.load import LoadedModel
from tiny_training import gradients, load_tiny, text_loss, tiny_config, tiny_inputs, trainable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


def _perturbed(folder: Path, config, *, scale: float = 0.02) -> LoadedModel:
    """Loaded with adapters whose B matrices are not zero, so that every gradient says something."""
    loaded = load_tiny(folder, config, adapters=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(loaded.model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    loaded.model.train()
    return loaded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_lower_the_loss(folder: Path, precision: str) -> None:
    loaded = load_tiny(folder, tiny_config(precision=precision), adapters=True)
    loaded.model.train()
    inputs = tiny_inputs(loaded, num_images=2)
    optimizer = torch.optim.AdamW(trainable(loaded.model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = text_loss(loaded, inputs)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_gradients_equal_those_of_the_dequantised_model(folder: Path) -> None:
    """Reference: LoRA on ordinary linears that hold the dequantised weights, in fp32."""
    quantised = _perturbed(folder, tiny_config())
    plain = _perturbed(folder, tiny_config({"training": {"method": "lora", "lora": {"rank": 8, "alpha": 16}}}))
    with torch.no_grad():
        for path, module in quantised.model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.model.get_submodule(path).weight.copy_(weight)
    inputs = tiny_inputs(quantised, num_images=2)
    text_loss(quantised, inputs).backward()
    text_loss(plain, inputs).backward()
    ours, reference = gradients(quantised.model), gradients(plain.model)
    assert ours.keys() == reference.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_in_between_leaves_the_gradient_as_it_was(folder: Path, precision: str) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks weights in evaluation and gradients go wrong afterwards."""
    loaded = _perturbed(folder, tiny_config(precision=precision))
    inputs = tiny_inputs(loaded)

    def gradient() -> dict[str, Tensor]:
        loaded.model.zero_grad()
        text_loss(loaded, inputs).backward()
        return gradients(loaded.model)

    before = gradient()
    loaded.model.eval()
    with torch.no_grad():
        loaded.model(**inputs)
        loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    loaded.model.train()
    after = gradient()
    assert before.keys() == after.keys()
    assert len(before) == 28
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="the trap exists on CPUs with AVX512-BF16 alone")
def test_the_trap_is_real_where_the_cpu_has_it(folder: Path) -> None:
    """What the flag protects from; when this fails, bitsandbytes was mended and the flag can go."""
    loaded = _perturbed(folder, tiny_config(precision="bf16"))
    for module in loaded.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    inputs = tiny_inputs(loaded)
    text_loss(loaded, inputs).backward()
    before = gradients(loaded.model)
    loaded.model.zero_grad()
    loaded.model.eval()
    with torch.no_grad():
        loaded.model(**inputs)
    loaded.model.train()
    text_loss(loaded, inputs).backward()
    after = gradients(loaded.model)
    assert any(not torch.allclose(before[name], after[name], rtol=0.1) for name in before)


def test_hooks_give_the_logits_of_the_models_own_forward(folder: Path) -> None:
    loaded = _perturbed(folder, tiny_config())
    inputs = tiny_inputs(loaded, num_images=2)
    family = loaded.spec.family
    with torch.no_grad():
        ours = family.logits(loaded.model, family.hidden_states(loaded.model, inputs))
        assert torch.equal(ours, loaded.model(**inputs).logits)
        assert torch.equal(ours, family.logits(loaded.model.get_base_model(), _hidden(loaded, inputs)))


def _hidden(loaded: LoadedModel, inputs: dict[str, Tensor]) -> Tensor:
    base: nn.Module | Callable[..., Tensor] = loaded.model.get_base_model()
    return loaded.spec.family.hidden_states(base, inputs)
