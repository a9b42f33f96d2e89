"""InternVL3.5 in the form built into transformers: a grid of tiles that suits an image's shape, and a thumbnail."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.core.errors import ConfigError, Problem
from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.processors import image_text_processor
from eightgig.registry.standin import byte_level_tokenizer

# Text models whose layers hold q, k, v, o, gate, up and down, under the names of `InternVLFamily.lora_pattern`.
SEVEN_LINEARS_A_LAYER = ("llama", "qwen2", "qwen3")
NUM_LINEARS_A_LAYER = 7
TILE_PX = 448
MOST_TILES = 12
APACHE_2_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"

# ImageNet's statistics. Source: transformers' `convert_internvl_weights_to_hf.py`, which wrote InternVL3 in this form.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# InternViT-300M at 448 px.
TOWER: Mapping[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "attention_bias": True,
    "image_size": [TILE_PX, TILE_PX],
    "patch_size": [14, 14],
    "norm_type": "layer_norm",
    "use_qk_norm": False,
}

# ChatML without a system's turn of its own, for texts and images. Source: the same; an early version of it writes
# `<image>`. That InternVL3.5 has kept the template is from memory.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def _facts(size: str, shape: tuple[int, int, int, int], *, num_parameters: int) -> ModelFacts:
    """A published model; `shape`: hidden size, layers, query heads, intermediate size (8 key-value heads of 128)."""
    hub_name = f"InternVL3_5-{size}-HF"
    hub_id = f"OpenGVLab/{hub_name}"
    name = f"internvl3.5-{size.lower()}"
    hidden_size, num_layers, num_heads, intermediate_size = shape
    return ModelFacts(
        name=name,
        aliases=(hub_name.lower(), hub_id.lower(), f"internvl3_5-{size.lower()}"),
        hub_id=hub_id,
        folder=None,
        licence="Apache-2.0",
        licence_url=APACHE_2_LICENCE,
        source=f"config.json of {hub_id} (untied head after the published sizes; from memory: rope_theta, positions); "
        "parameters counted on the stock class of transformers 5.23",
        architecture={
            "model_type": "internvl",
            "text_config": {
                "model_type": "qwen3",
                "hidden_size": hidden_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": intermediate_size,
                "max_position_embeddings": 40960,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "vocab_size": 151936,
                "tie_word_embeddings": False,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
            },
            "vision_config": TOWER,
            "image_token_id": 151671,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
        },
        num_parameters=num_parameters,
        num_language_linears=num_layers * NUM_LINEARS_A_LAYER,
        image_px=_side_of_tiles_px(MOST_TILES, TILE_PX),
        image_settings={"size": {"height": TILE_PX, "width": TILE_PX}, "min_patches": 1, "max_patches": MOST_TILES},
    )


def _side_of_tiles_px(num_tiles: int, tile_px: int) -> int:
    """Side of the square with the area of so many tiles, rounded up."""
    return math.ceil(math.sqrt(num_tiles) * tile_px)


class InternVLFamily(ModelFamily):
    """An image is stretched onto the grid of tiles nearest to its shape; if it has several, one of the whole follows.

    `data.image_size` caps the tiles at the area of a square of that side, but for one tile at least.
    """

    name = "internvl"
    model_types = ("internvl",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_tower",),
        projectors=("model.multi_modal_projector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    image_placeholder = "<IMG_CONTEXT>"
    end_of_turn = "<|im_end|>"
    packing_obstacle = ""
    reserved_texts = ("<img>", "</img>", "<video>")
    accepts_image_features = True
    dtype_caution = (
        "Published in bf16; llama.cpp #17534 has a report of NaN with the tower of InternVL3.5 in fp16, "
        "which was not measured here."
    )
    models = (
        _facts("1B", (1024, 28, 16, 3072), num_parameters=1_060_897_792),
        _facts("2B", (2048, 28, 16, 6144), num_parameters=2_348_347_392),
        _facts("4B", (2560, 36, 32, 9728), num_parameters=4_732_489_216),
        _facts("8B", (4096, 36, 32, 12288), num_parameters=8_528_318_464),
    )

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the square with the area of the most tiles."""
        return _side_of_tiles_px(_most_tiles(image_settings), _tile_px(architecture, image_settings))

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """Seven a layer for the text models known to have them."""
        text = architecture["text_config"]
        return text["num_hidden_layers"] * NUM_LINEARS_A_LAYER if text["model_type"] in SEVEN_LINEARS_A_LAYER else 0

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor without its video part, which needs torchvision."""
        return image_text_processor("InternVLProcessor").from_pretrained(location, **arguments)

    def build_processor(self, facts: ModelFacts) -> Any:
        """An `InternVLProcessor` with a byte-level tokenizer that has the special tokens at the published ids."""
        from transformers import GotOcr2ImageProcessor, GotOcr2ImageProcessorPil
        from transformers.utils import is_torchvision_available

        image_processor = GotOcr2ImageProcessor if is_torchvision_available() else GotOcr2ImageProcessorPil
        settings = facts.image_settings
        return image_text_processor("InternVLProcessor")(
            image_processor=image_processor(
                size=dict(settings["size"]),
                min_patches=settings["min_patches"],
                max_patches=settings["max_patches"],
                image_mean=list(IMAGE_MEAN),
                image_std=list(IMAGE_STD),
            ),
            tokenizer=_standin_tokenizer(facts),
            video_processor=None,
            image_seq_length=_tokens_a_tile(facts),
            chat_template=CHAT_TEMPLATE,
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError for no pixel at all, and for more tiles than the published processor lets through."""
        most = _most_tiles(facts.image_settings)
        if image_px < 1 or _tiles_in(image_px, _facts_tile_px(facts)) > most:
            raise ConfigError(
                [Problem("data.image_size", str(image_px), f"from 1 to {facts.image_px} px, the side of {most} tiles")],
                source=f"{facts.name} with at most {most} tiles of {_facts_tile_px(facts)} px",
                next_step=f"use a value in that range, or leave it out for all {most} tiles",
            )

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str:
        """How many tiles the setting lets through."""
        most = _tiles_in(image_px, _facts_tile_px(facts))
        tiles = f"up to {most} tiles, and one of the whole image," if most > 1 else "one tile"
        return f"data.image_size = {image_px} lets {tiles} of {_facts_tile_px(facts)} px through for each image"

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """Tokens of all tiles, between a mark on each side."""
        tile_px = _facts_tile_px(facts)
        most = _most_tiles(facts.image_settings) if image_px is None else _tiles_in(image_px, tile_px)
        fewest = int(facts.image_settings.get("min_patches") or 1)
        num_tiles = _num_grid_tiles(width_px, height_px, tile_px=tile_px, grids=_grids(fewest, most))
        return (num_tiles if num_tiles == 1 else num_tiles + 1) * _tokens_a_tile(facts) + 2

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Cap the processor's tiles; the model takes any number of them."""
        if image_px is None:
            return
        image_processor = processor.image_processor
        image_processor.max_patches = _tiles_in(image_px, image_processor.size["height"])

    def tower_features(self, model: Any, output: Any) -> Any:
        """The hidden states of the layer that the model selects: [tiles, 1 + patches, width]."""
        layer = base_model(model).config.vision_feature_layer
        return output.last_hidden_state if layer == -1 else output.hidden_states[layer]

    def tower_output(self, model: Any, features: Any) -> Any:
        """An output that holds those hidden states where the model looks for them."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        layer = base_model(model).config.vision_feature_layer
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states={layer: features})

    def process_images(self, processor: Any, images: Sequence[Any]) -> Mapping[str, Any]:
        """pixel_values [tiles, 3, side, side], and the number of tiles of each image as plain numbers.

        The published settings leave images whole; the processor's own call always asks for tiles.
        """
        features = processor.image_processor(images=list(images), crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": features["pixel_values"], "num_patches": features["num_patches"].tolist()}


def _standin_tokenizer(facts: ModelFacts) -> Any:
    """Qwen3's ids, then those of `<img>`, `</img>` and `<IMG_CONTEXT>`, as published; that of `<video>` is made up."""
    image_id = facts.architecture["image_token_id"]
    special_tokens = {
        "<|endoftext|>": image_id - 28,
        "<|im_start|>": image_id - 27,
        "<|im_end|>": image_id - 26,
        "<img>": image_id - 2,
        "</img>": image_id - 1,
        "<IMG_CONTEXT>": image_id,
        "<video>": image_id + 1,
    }
    return byte_level_tokenizer(
        special_tokens,
        vocab_size=facts.architecture["text_config"]["vocab_size"],
        roles={
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def _tile_px(architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
    size = image_settings.get("size") or {}
    return int(size.get("height") or _first(architecture["vision_config"]["image_size"]))


def _facts_tile_px(facts: ModelFacts) -> int:
    return _tile_px(facts.architecture, facts.image_settings)


def _first(size: int | Sequence[int]) -> int:
    return int(size if isinstance(size, int) else size[0])


def _tokens_a_tile(facts: ModelFacts) -> int:
    patches_a_side = _facts_tile_px(facts) // _first(facts.architecture["vision_config"]["patch_size"])
    return int((patches_a_side * facts.architecture["downsample_ratio"]) ** 2)


def _most_tiles(image_settings: Mapping[str, Any]) -> int:
    return int(image_settings.get("max_patches") or MOST_TILES)


def _tiles_in(image_px: int, tile_px: int) -> int:
    return int(max(image_px**2 // tile_px**2, 1))


@functools.cache
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of every grid of `fewest` to `most` tiles, fewer tiles first, then fewer columns."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if fewest <= columns * rows <= most]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1])) or ((1, 1),)


def _num_grid_tiles(width_px: int, height_px: int, *, tile_px: int, grids: Sequence[tuple[int, int]]) -> int:
    """Tiles of the grid whose shape is nearest to the image's. Rule: transformers' GOT-OCR2 image processor.

    Of several that are equally near, the largest that the image's area fills by more than half; else the first.
    """

    def distance(grid: tuple[int, int]) -> float:
        return abs(width_px / height_px - grid[0] / grid[1])

    nearest = min(map(distance, grids))
    sizes = [columns * rows for columns, rows in grids if distance((columns, rows)) == nearest]
    filled = [size for size in sizes if 2 * width_px * height_px > size * tile_px**2]
    return (filled or sizes[:1])[-1]


FAMILIES = (InternVLFamily(),)
