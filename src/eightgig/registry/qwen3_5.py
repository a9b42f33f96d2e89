"""Qwen3.5: Qwen3-VL's images without DeepStack, and a decoder of three gated DeltaNet layers to one of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.qwen3_vl import HALF, MAX_PIXELS, MIN_PIXELS, TOWER_LARGE, TOWER_SMALL
from eightgig.registry.qwen_vision import APACHE_2_LICENCE, QwenVisionFamily, chatml_template

TOWER_TINY: Mapping[str, Any] = {
    **TOWER_SMALL,
    "depth": 12,
    "hidden_size": 768,
    "num_heads": 12,
    "intermediate_size": 3072,
}

# A DeltaNet layer's qkv, z and out, an attention layer's q, k, v and o; both have gate, up and down. The two gates
# in_proj_a and in_proj_b, of a row a head, stay 16-bit and get no adapter: rank 16 would be no lower than theirs.
NUM_LINEARS = {"linear_attention": 6, "full_attention": 7}

NO_THOUGHT = "<think>\n\n</think>\n\n"


def layer_types(num_layers: int) -> list[str]:
    """The kind of each decoder layer: every fourth one attends."""
    return ["full_attention" if (index + 1) % 4 == 0 else "linear_attention" for index in range(num_layers)]


def _facts(
    size: str,
    shape: tuple[int, int, int, int, int],
    tower: Mapping[str, Any],
    *,
    num_value_heads: int,
    tied: bool,
    num_parameters: int,
) -> ModelFacts:
    """A published model; `shape`: hidden size, layers, query heads, key-value heads, intermediate size."""
    hub_name = f"Qwen3.5-{size}"
    hub_id = f"Qwen/{hub_name}"
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size = shape
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 256,
        "intermediate_size": intermediate_size,
        "layer_types": layer_types(num_layers),
        "linear_num_key_heads": 16,
        "linear_num_value_heads": num_value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        "vocab_size": 248320,
        "eos_token_id": 248044,
    }
    return ModelFacts(
        name=f"qwen3.5-{size.lower()}",
        aliases=(hub_id.lower(),),
        hub_id=hub_id,
        folder=None,
        licence="Apache-2.0",
        licence_url=APACHE_2_LICENCE,
        source=f"config.json of {hub_id} and slime's scripts/models/qwen3.5-*.sh; parameters counted on the stock "
        "class of transformers 5.23" + ("; value heads and tower not confirmed" if size == "2B" else ""),
        architecture={
            "model_type": "qwen3_5",
            "text_config": text,
            "vision_config": {"model_type": "qwen3_5_vision", "out_hidden_size": hidden_size, **tower},
            "tie_word_embeddings": tied,
            "image_token_id": 248056,
            "video_token_id": 248057,
            "vision_start_token_id": 248053,
            "vision_end_token_id": 248054,
        },
        num_parameters=num_parameters,
        num_language_linears=_count(layer_types(num_layers)),
        image_px=4096,
    )


def _count(types: Sequence[str]) -> int:
    return sum(NUM_LINEARS[kind] for kind in types)


class Qwen35Family(QwenVisionFamily):
    """Trained to answer at once: the template is told not to ask for thoughts."""

    name = "qwen3.5"
    model_types = ("qwen3_5",)
    processor_class = "Qwen3VLProcessor"
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.visual",),
        projectors=("model.visual.merger",),
        lm_head="lm_head",
    )
    lora_pattern = (
        r"model\.language_model\.layers\.\d+\."
        r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(gate|up|down)_proj)"
    )
    shared_inputs = (*QwenVisionFamily.shared_inputs, ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"))
    keep_16bit = ("model.visual", r"model\.language_model\.layers\.\d+\.linear_attn\.in_proj_[ab]", "lm_head")
    image_mean = HALF
    image_std = HALF
    default_min_pixels = MIN_PIXELS
    default_max_pixels = MAX_PIXELS
    standin_template = chatml_template(answer_start=NO_THOUGHT)
    template_arguments: Mapping[str, Any] = {"enable_thinking": False}
    fp32_in_fp16 = ("model.language_model",)
    packing_obstacle = "the state of its DeltaNet layers runs on from one sample of a row into the next"
    dtype_caution = (
        "Gradients along the residual stream leave the range of fp16 (unslothai/unsloth-zoo #866, #978): in fp16 mode "
        "the language model runs in fp32 around its 4-bit layers. Without the package flash-linear-attention the "
        "DeltaNet layers run in plain PyTorch, which is slow on a GPU."
    )
    models = (
        _facts("0.8B", (1024, 24, 8, 2, 3584), TOWER_TINY, num_value_heads=16, tied=True, num_parameters=852_985_920),
        _facts("2B", (2048, 24, 8, 2, 6144), TOWER_SMALL, num_value_heads=16, tied=True, num_parameters=2_213_241_664),
        _facts("4B", (2560, 32, 16, 4, 9216), TOWER_SMALL, num_value_heads=32, tied=True, num_parameters=4_539_265_536),
        _facts(
            "9B", (4096, 32, 16, 4, 12288), TOWER_LARGE, num_value_heads=32, tied=False, num_parameters=9_409_813_744
        ),
    )

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """By the kind of each layer."""
        text = architecture["text_config"]
        return _count(text.get("layer_types") or layer_types(text["num_hidden_layers"]))


FAMILIES = (Qwen35Family(),)
