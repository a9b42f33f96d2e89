"""Qwen-VL and Qwen-VL-Chat: a ViT-bigG tower with a resampler, a language model of the first Qwen.

Their published code does not run on transformers 5; `eightgig.models.qwen_vl` is an implementation of its own, which
reads the published files.
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eightgig.core.errors import CheckpointError, ConfigError, Problem, UnsupportedModel
from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.standin import byte_level_tokenizer

# By name: rooms below `models` know nothing of it.
PACKAGE = "eightgig.models.qwen_vl"

UNREADABLE_ARCHIVE = "PytorchStreamReader"  # torch raises a plain RuntimeError for a damaged file

NUM_LINEARS_A_LAYER = 5
LICENCE = "Tongyi Qianwen License Agreement"
LICENCE_URL = "https://github.com/QwenLM/Qwen-VL/blob/master/LICENSE"

# Source: config.json of Qwen/Qwen-VL-Chat, commit 28f35d9.
QWEN_VL: Mapping[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "seq_length": 2048,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def _facts(name: str, hub_name: str) -> ModelFacts:
    hub_id = f"Qwen/{hub_name}"
    return ModelFacts(
        name=name,
        aliases=(hub_id.lower(),),
        hub_id=hub_id,
        folder=None,
        licence=LICENCE,
        licence_url=LICENCE_URL,
        source="config.json and pytorch_model.bin.index.json of Qwen/Qwen-VL-Chat: half its 19,313,870,336 bytes",
        architecture=QWEN_VL,
        num_parameters=9_656_935_168,
        num_language_linears=32 * NUM_LINEARS_A_LAYER,
        image_px=448,
    )


class QwenVLFamily(ModelFamily):
    """Every image is squashed to one square, and becomes as many tokens as the resampler has queries.

    The tower is 4-bit too: in 16 bits its 1.8 billion parameters alone would leave no room on a card of 8 GB.
    """

    name = "qwen-vl"
    model_types = ("qwen",)
    modules = ModulePaths(
        language_model="transformer", towers=("transformer.visual",), projectors=(), lm_head="lm_head"
    )
    lora_pattern = r"transformer\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(w1|w2|c_proj))"
    shared_inputs = (("mlp.w1", "mlp.w2"),)
    keep_16bit = ("lm_head",)
    image_placeholder = "<imgpad>"
    end_of_turn = "<|im_end|>"
    packing_obstacle = "its own attention knows no samples within a row"
    accepts_image_features = True
    layer_row_dimensions = MappingProxyType({"positions": None})
    has_own_classes = True
    # The published folders have no other processor files.
    processor_files = MappingProxyType({"tokenizer": ("qwen.tiktoken", "tokenizer.json")})
    models = (_facts("qwen-vl-chat", "Qwen-VL-Chat"), _facts("qwen-vl", "Qwen-VL"))

    def facts_from_config(
        self, config: Mapping[str, Any], *, name: str, folder: Path | None, hub_id: str | None
    ) -> ModelFacts:
        """Facts read off a config.json. Raises UnsupportedModel for the text models that share its `model_type`."""
        if "visual" not in config:
            raise UnsupportedModel(
                f"{name} is a language model of the first Qwen, without a vision tower",
                expected="a vision-language model: config.json of Qwen-VL has a `visual` section",
                next_step="use qwen-vl-chat, or a newer model such as qwen2.5-vl-3b",
            )
        _register()
        return super().facts_from_config(config, name=name, folder=folder, hub_id=hub_id)

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the square that images are squashed to."""
        return int(architecture["visual"]["image_size"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """c_attn, c_proj, w1, w2 and c_proj in every layer."""
        return int(architecture["num_hidden_layers"]) * NUM_LINEARS_A_LAYER

    def build_config(self, facts: ModelFacts) -> Any:
        """The family's own config, its classes registered with transformers."""
        _register()
        return super().build_config(facts)

    def build_processor(self, facts: ModelFacts) -> Any:
        """The family's processor with a byte-level tokenizer that has the special tokens at the config's ids."""
        tokens: Sequence[str] = _module("tokenization").ADDED_TOKENS
        config = self.build_config(facts)
        first_id = config.visual.image_start_id - tokens.index("<img>")
        tokenizer = byte_level_tokenizer(
            {token: first_id + index for index, token in enumerate(tokens)},
            vocab_size=config.vocab_size,
            roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        )
        return _module("processing").QwenVLProcessor.for_config(config, tokenizer)

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The processor at `location`: as published (`qwen.tiktoken`), or as it was saved."""
        _register()
        return super().load_processor(location, **arguments)

    def load_model(self, location: str, **arguments: Any) -> tuple[Any, Mapping[str, Any]]:
        """The model at `location`: the published `.bin` shards, or what was saved.

        transformers maps the shards into memory, reads nothing but tensors from them (`weights_only`), and splits and
        quantises each tensor as it comes, so that they are never in memory together.

        Raises:
            CheckpointError: a shard is damaged, or holds more than tensors.
        """
        _register()
        # Else transformers, finding .bin files at the hub, has a bot there open a pull request that converts them.
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        try:
            return super().load_model(location, **arguments)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and UNREADABLE_ARCHIVE not in str(error):
                raise
            raise CheckpointError(
                f"a weights file of {location} can't be read: {type(error).__name__}: {str(error)[:200]}",
                expected="whole .bin files that hold tensors and nothing else",
                next_step="copy or download the model again; a file was probably cut off",
            ) from error

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError unless the image divides into whole patches."""
        patch_px = int(facts.architecture["visual"]["patch_size"])
        if image_px >= patch_px and image_px % patch_px == 0:
            return
        lower = max(image_px // patch_px, 1) * patch_px
        raise ConfigError(
            [Problem("data.image_size", str(image_px), f"a multiple of the patch size, {patch_px} px")],
            source=f"{facts.name} with its grid of patches",
            next_step=f"use {lower} or {lower + patch_px}, or leave it out for the model's own {facts.image_px} px",
        )

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """The sequence stays as long: only the tower works less."""
        if image_px == facts.image_px:
            return None
        num_tokens = self.num_image_tokens(facts, image_px, width_px=image_px, height_px=image_px)
        return f"an image is {num_tokens} tokens at any data.image_size: {image_px} px saves work in the tower alone"

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """The resampler's queries, whatever the size; `<img>` and `</img>` around them are the template's."""
        return int(facts.architecture["visual"].get("n_queries", 256))

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Set the processor's size; the tower interpolates its positions to any grid by itself."""
        if image_px is None:
            return
        if model is not None:
            base_model(model).config.visual.image_size = image_px
        processor.image_processor.size = {"height": image_px, "width": image_px}

    def tower_features(self, model: Any, output: Any) -> Any:
        """The tower's output itself, [images, queries, hidden]."""
        return output

    def tower_output(self, model: Any, features: Any) -> Any:
        """The features themselves."""
        return features

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Last hidden states, [batch, sequence, hidden], of the backbone with its images."""
        return base_model(model).transformer(**inputs, use_cache=False).last_hidden_state


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _register() -> None:
    """Make transformers' Auto classes know the model's own classes; later calls do nothing."""
    _module("registration").register()


FAMILIES = (QwenVLFamily(),)
