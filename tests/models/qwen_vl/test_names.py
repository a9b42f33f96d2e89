"""Names and sizes at full size, on the meta device, against the published index (853 tensors, 19,313,870,336 bytes)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eightgig.models.qwen_vl.configuration import QwenVLConfig
from eightgig.models.qwen_vl.load_map import published_names
from eightgig.models.qwen_vl.modeling import QwenVLForConditionalGeneration

INDEX_BYTES = 19_313_870_336  # `metadata.total_size` of the published index, 16-bit
NUM_LAYERS, NUM_BLOCKS = 32, 48
FINETUNE_TARGETS = ["c_attn", "attn.c_proj", "w1", "w2"]  # of the published finetune.py


@pytest.fixture(scope="module")
def full_size() -> Any:
    with torch.device("meta"):
        return QwenVLForConditionalGeneration(QwenVLConfig())


def _index() -> dict[str, tuple[int, ...]]:
    """The published index's names with their shapes, from the facts about the checkpoint alone."""
    hidden, width, mlp, vision_mlp, vocab = 4096, 1664, 11008, 8192, 151936
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    for layer in range(NUM_LAYERS):
        of_layer = {
            "ln_1.weight": (hidden,),
            "ln_2.weight": (hidden,),
            "attn.c_attn.weight": (3 * hidden, hidden),
            "attn.c_attn.bias": (3 * hidden,),
            "attn.c_proj.weight": (hidden, hidden),
            "mlp.w1.weight": (mlp, hidden),
            "mlp.w2.weight": (mlp, hidden),
            "mlp.c_proj.weight": (hidden, mlp),
        }
        shapes.update({f"transformer.h.{layer}.{name}": shape for name, shape in of_layer.items()})
    visual: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, 14, 14),
        "positional_embedding": (256, width),
        "proj": (hidden, hidden),
        "attn_pool.query": (256, hidden),
        "attn_pool.pos_embed": (256, hidden),
        "attn_pool.kv_proj.weight": (hidden, width),
        "attn_pool.attn.in_proj_weight": (3 * hidden, hidden),
        "attn_pool.attn.in_proj_bias": (3 * hidden,),
        "attn_pool.attn.out_proj.weight": (hidden, hidden),
        "attn_pool.attn.out_proj.bias": (hidden,),
    }
    norms = {"ln_pre": width, "attn_pool.ln_q": hidden, "attn_pool.ln_kv": hidden, "ln_post": hidden}
    visual.update({f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")})
    for block in range(NUM_BLOCKS):
        linears = {
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (vision_mlp, width),
            "mlp.c_proj": (width, vision_mlp),
        }
        prefix = f"transformer.resblocks.{block}"
        visual.update({f"{prefix}.{name}.weight": shape for name, shape in linears.items()})
        visual.update({f"{prefix}.{name}.bias": shape[:1] for name, shape in linears.items()})
        visual.update({f"{prefix}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")})
    return {**shapes, **{f"transformer.visual.{name}": shape for name, shape in visual.items()}}


def test_the_parameters_are_the_published_ones(full_size: Any) -> None:
    index = _index()
    assert len(index) == 853
    assert sum(torch.Size(shape).numel() for shape in index.values()) == 9_656_935_168 == INDEX_BYTES // 2
    own = {name: tuple(value.shape) for name, value in full_size.named_parameters()}
    assert published_names(own) == sorted(index)
    assert sum(value.numel() for value in full_size.parameters()) == 9_656_935_168
    assert {name: shape for name, shape in own.items() if name in index} == {n: index[n] for n in own if n in index}
    assert len(set(index) - set(own)) == 2
    assert not list(full_size.buffers())


@pytest.mark.parametrize(
    ("targets", "num_parameters"), [(FINETUNE_TARGETS, 112_197_632), ([*FINETUNE_TARGETS, "mlp.c_proj"], 143_130_624)]
)
def test_the_published_recipe_adapts_the_published_layers(targets: list[str], num_parameters: int) -> None:
    """The recipe names layers by their ends; `mlp.c_proj` alone also names layers of the tower, hence the pattern."""
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(QwenVLConfig())
    pattern = rf"transformer\.h\.\d+\..*({'|'.join(map(re.escape, targets))})"
    adapted = get_peft_model(model, LoraConfig(r=64, target_modules=pattern), low_cpu_mem_usage=True)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == num_parameters
    assert {re.sub(r"\.h\.\d+", ".h.N", name.split(".lora_")[0]) for name in trained} == {
        f"base_model.model.transformer.h.N.{'' if '.' in target else 'attn.' if target == 'c_attn' else 'mlp.'}{target}"
        for target in targets
    }


def test_everything_that_multiplies_is_a_plain_linear_layer(full_size: Any) -> None:
    linears = [path for path, module in full_size.named_modules() if type(module) is nn.Linear]
    assert len(linears) == 5 * NUM_LAYERS + 4 * NUM_BLOCKS + 5 + 1
    assert not any(isinstance(module, nn.MultiheadAttention) for module in full_size.modules())
