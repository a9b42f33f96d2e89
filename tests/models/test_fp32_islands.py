"""fp32 inside an fp16 model: what would overflow does not, the borders are fp16, 4-bit weights stay as they are."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import tiny
from eightgig.config import MixedPrecision
from eightgig.models.fp32_islands import run_in_fp32
from eightgig.models.load import load_model
from eightgig.models.precision import Precision
from eightgig.registry import resolve
from eightgig.registry.llava import LlavaFamily
from tiny_training import CPU, tiny_config, tiny_inputs

FP16 = Precision(torch.float16, MixedPrecision.FP16, None)


class _Squared(nn.Module):
    """Leaves the range of fp16 on the way and comes back into it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4, bias=False)
        self.register_buffer("offset", torch.ones(1))

    def forward(self, hidden: torch.Tensor, *, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        squared = self.scale(hidden + more["x"]) ** 2 + self.offset
        return squared.sqrt(), more["ids"]


def test_values_beyond_fp16_survive_inside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_Squared()).half()
    hidden = torch.full((2, 4), 500.0, dtype=torch.float16)
    more = {"x": torch.full((2, 4), 500.0, dtype=torch.float16), "ids": torch.arange(3)}
    assert not model[0](hidden, more=dict(more))[0].isfinite().all()
    reference = (model[0].scale.weight.float() @ torch.full((4,), 1000.0)).abs()
    run_in_fp32(model, ["0"])
    out, ids = model[0](hidden, more=dict(more))
    assert out.dtype is torch.float16
    assert ids.dtype is torch.int64
    torch.testing.assert_close(out[0].float(), reference, rtol=2e-3, atol=1.0)
    assert model[0].scale.weight.dtype is model[0].offset.dtype is torch.float32


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlavaFamily, "fp32_in_fp16", ("model.language_model",))


@pytest.mark.usefixtures("family")
def test_a_family_with_an_fp32_language_model_keeps_4bit_weights_and_embeddings(tmp_path: Path) -> None:
    folder = tiny.build_tiny_llava(tmp_path)
    loaded = load_model(tiny_config(), resolve(str(folder)), CPU, FP16)
    language_model = loaded.model.model.language_model
    seen = []
    language_model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    inputs = tiny_inputs(loaded)
    assert inputs["pixel_values"].dtype is torch.float16
    with torch.no_grad():
        hidden = loaded.spec.family.hidden_states(loaded.model, inputs)
        generated = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert set(seen) == {torch.float32}
    assert hidden.dtype is torch.float16
    assert hidden.isfinite().all()
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3
    assert language_model.norm.weight.dtype is torch.float32
    assert language_model.embed_tokens.weight.dtype is torch.float16
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in language_model.modules()) == 14
    assert loaded.receipt.mismatches == ()


@pytest.mark.usefixtures("family")
def test_in_other_precisions_nothing_is_widened(tmp_path: Path) -> None:
    folder = tiny.build_tiny_llava(tmp_path)
    loaded = load_model(tiny_config(), resolve(str(folder)), CPU, Precision(torch.bfloat16, MixedPrecision.BF16, None))
    assert loaded.model.model.language_model.norm.weight.dtype is torch.bfloat16
    assert "forward" not in vars(loaded.model.model.language_model)


def test_4bit_layers_multiply_in_fp32_only_where_they_match_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.build_tiny_llava(tmp_path)
    patterns = ("model.language_model", r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj")
    monkeypatch.setattr(LlavaFamily, "fp32_in_fp16", patterns)
    layer = load_model(tiny_config(), resolve(str(folder)), CPU, FP16).model.model.language_model.layers[1]
    inputs = torch.full((1, 4, 64), 300.0)
    for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
        state = linear.weight.quant_state
        state.offset, state.state2.absmax = state.offset * 1000, state.state2.absmax * 1000
    with torch.no_grad():
        beyond, overflown = layer.mlp.up_proj(inputs), layer.self_attn.q_proj(inputs)
    assert beyond.dtype is overflown.dtype is torch.float32
    assert beyond.isfinite().all()
    assert float(beyond.abs().max()) > torch.finfo(torch.float16).max
    assert not overflown.isfinite().all()
