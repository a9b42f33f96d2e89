"""LLaVA-OneVision: a tower for tiles of 384 px, an image cut into a grid of them, a Qwen2 language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eightgig.registry.facts import ImageLayout, ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.processors import image_text_processor
from eightgig.registry.standin import byte_level_tokenizer

# SigLIP so400m at 384 px without its last layer. Source: defaults of transformers' LlavaOnevisionConfig.
SIGLIP_384: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
MAX_TILES_A_SIDE = 6
NUM_LINEARS_A_LAYER = 7
APACHE_2_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"

# In the order of their ids, in the vocabulary of Qwen2 from 151643 on; the last two are LLaVA-OneVision's own.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

# Renders what the published template renders (source: transformers' conversion script and its processor's tests): a
# blank behind the role, images first, each text on a line of its own, nothing behind a turn. The header that asks for
# an answer has no blank, so it is not quite the header that answers have in training; that is how it was published.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + ' ' -}}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- '\\n' + part.text -}}{%- endgeneration -%}"
    "{%- else -%}{{- '\\n' + part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class TileGrids:
    """How one image becomes tiles and tokens.

    Attributes:
        grids_px: (height, width) of the grids of tiles that may be chosen, each a multiple of a tile's side.
        tile_px: side of a tile.
        num_tokens_a_side: tokens along a tile's side.
        max_tiles: features of more tiles than this are scaled down to as many (`anyres_max_9`: 9).
    """

    grids_px: tuple[tuple[int, int], ...]
    tile_px: int
    num_tokens_a_side: int
    max_tiles: int

    def best_px(self, width_px: int, height_px: int) -> tuple[int, int]:
        """(height, width) of the grid that keeps most of the image's pixels and, among those, wastes the least.

        Rule: `select_best_resolution` of transformers.
        """

        def kept_and_saved(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width_px, grid[0] / height_px)
            kept = min(int(width_px * scale) * int(height_px * scale), width_px * height_px)
            return kept, kept - grid[0] * grid[1]

        return max(self.grids_px, key=kept_and_saved)

    def num_tokens(self, width_px: int, height_px: int) -> int:
        """Tokens of an image that is alone in its conversation: the whole image on one tile, then the grid's rows.

        Rows and columns of padding are left out; each row ends in a token of its own. Rule: `LlavaOnevisionProcessor`.
        """
        grid_height_px, grid_width_px = self.best_px(width_px, height_px)
        side = self.num_tokens_a_side
        height, width = side * (grid_height_px // self.tile_px), side * (grid_width_px // self.tile_px)
        if width_px / height_px > width / height:
            used = int(round(height_px * (width / width_px), 7))
            height -= (height - used) // 2 * 2
        else:
            used = int(round(width_px * (height / height_px), 7))
            width -= (width - used) // 2 * 2
        shrink = math.sqrt(height * width / (self.max_tiles * side**2))
        if shrink > 1.1:
            height, width = int(height // shrink), int(width // shrink)
        return side**2 + height * (width + 1)

    def capped_size(self, width_px: int, height_px: int, cap_px: int) -> tuple[int, int]:
        """(width, height) to scale the image to, so that its grid has at most `cap_px`² pixels, or one tile.

        The image's own size where its grid is small enough. A scaled image fits whole into the best of the grids that
        are, so the grid that is then chosen among all is no larger.
        """
        allowed = [grid for grid in self.grids_px if grid[0] * grid[1] <= cap_px**2]
        smallest = min(self.grids_px, key=math.prod)
        best = TileGrids(tuple(allowed) or (smallest,), self.tile_px, 1, 1).best_px(width_px, height_px)
        if best == self.best_px(width_px, height_px):
            return width_px, height_px
        scale = min(best[1] / width_px, best[0] / height_px)
        return min(math.ceil(width_px * scale), best[1]), min(math.ceil(height_px * scale), best[0])


def _facts(
    size: str, text: tuple[int, int, int, int, int], *, vocab: int, tied: bool, num_parameters: int
) -> ModelFacts:
    """A model of `text` shape: hidden size, layers, query heads, key-value heads, intermediate size."""
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size = text
    hub_id = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    sides = [SIGLIP_384["image_size"] * (index + 1) for index in range(MAX_TILES_A_SIDE)]
    return ModelFacts(
        name=f"llava-onevision-{size}",
        aliases=(f"llava-onevision-qwen2-{size}-ov-hf", f"llava-onevision-qwen2-{size}", hub_id),
        hub_id=hub_id,
        folder=None,
        licence="Apache-2.0",
        licence_url=APACHE_2_LICENCE,
        source=(
            f"config.json of {hub_id}, its vocabulary size from memory; parameters counted on the stock class of "
            "transformers 5.23"
        ),
        architecture={
            "model_type": "llava_onevision",
            "vision_config": SIGLIP_384,
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": hidden_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "num_key_value_heads": num_kv_heads,
                "intermediate_size": intermediate_size,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "tie_word_embeddings": tied,
                "vocab_size": vocab,
            },
            "image_token_index": 151646,
            "video_token_index": 151647,
            "image_grid_pinpoints": [[height, width] for height in sides for width in sides],
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": tied,
        },
        num_parameters=num_parameters,
        num_language_linears=num_layers * NUM_LINEARS_A_LAYER,
        image_px=sides[-1],
    )


class LlavaOnevisionFamily(ModelFamily):
    """One image is cut into tiles; of several in one conversation each is one tile, padded to a square.

    `data.image_size` caps the area of the grid of tiles, at the square of that side; one tile always stays. The model
    takes what comes out without any change, so an adapter needs nothing to be reloaded.
    """

    name = "llava-onevision"
    model_types = ("llava_onevision",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_tower",),
        projectors=("model.multi_modal_projector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    image_placeholder = "<image>"
    end_of_turn = "<|im_end|>"
    packing_obstacle = ""
    image_layout = ImageLayout(padding={"pixel_values": 0.0})
    models = (
        _facts("0.5b", (896, 24, 14, 2, 4864), vocab=152000, tied=True, num_parameters=893_675_552),
        _facts("7b", (3584, 28, 28, 4, 18944), vocab=152128, tied=False, num_parameters=8_030_807_584),
    )

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the square with as many pixels as the largest grid."""
        return math.isqrt(max(math.prod(grid) for grid in architecture["image_grid_pinpoints"]))

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer of a Qwen2; of another text model it can't be told."""
        text = architecture["text_config"]
        return int(text["num_hidden_layers"]) * NUM_LINEARS_A_LAYER if text["model_type"] == "qwen2" else 0

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor without its video part, which needs torchvision."""
        return image_text_processor("LlavaOnevisionProcessor").from_pretrained(location, **arguments)

    def build_processor(self, facts: ModelFacts) -> Any:
        """A `LlavaOnevisionProcessor` with a byte-level tokenizer."""
        from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionImageProcessorPil
        from transformers.utils import is_torchvision_available

        architecture = facts.architecture
        vision = architecture["vision_config"]
        first_id = architecture["image_token_index"] - SPECIAL_TOKENS.index(self.image_placeholder)
        tokenizer = byte_level_tokenizer(
            {token: first_id + index for index, token in enumerate(SPECIAL_TOKENS)},
            vocab_size=architecture["text_config"]["vocab_size"],
            roles={"eos_token": self.end_of_turn, "pad_token": "<|endoftext|>"},
        )
        image_processor = (
            LlavaOnevisionImageProcessor if is_torchvision_available() else LlavaOnevisionImageProcessorPil
        )
        return image_text_processor("LlavaOnevisionProcessor")(
            image_processor=image_processor(
                size={"height": vision["image_size"], "width": vision["image_size"]},
                image_grid_pinpoints=[list(grid) for grid in architecture["image_grid_pinpoints"]],
                image_mean=[0.5, 0.5, 0.5],
                image_std=[0.5, 0.5, 0.5],
            ),
            tokenizer=tokenizer,
            video_processor=None,
            num_image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
            vision_feature_select_strategy=architecture["vision_feature_select_strategy"],
            vision_aspect_ratio=architecture["vision_aspect_ratio"],
            chat_template=CHAT_TEMPLATE,
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Any cap will do: one tile always stays."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """That tiles have one size, where the cap is below it."""
        tile_px = int(facts.architecture["vision_config"]["image_size"])
        if image_px >= tile_px:
            return None
        return f"{facts.name} takes tiles of {tile_px} px: an image keeps one of them"

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """Those of an image that is alone in its conversation; of several, each has one tile and one token more."""
        architecture = facts.architecture
        vision = architecture["vision_config"]
        grids = TileGrids(
            grids_px=tuple((height, width) for height, width in architecture["image_grid_pinpoints"]),
            tile_px=vision["image_size"],
            num_tokens_a_side=vision["image_size"] // vision["patch_size"],
            max_tiles=int(architecture["vision_aspect_ratio"].removeprefix("anyres_max_")),
        )
        if image_px is not None:
            width_px, height_px = grids.capped_size(width_px, height_px, image_px)
        return grids.num_tokens(width_px, height_px)

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Let `process_images` know the cap; what the processor saves is as published."""
        processor.max_image_px = image_px

    def process_images(self, processor: Any, images: Sequence[Any]) -> Mapping[str, Any]:
        """As one conversation's images: `batch_num_images` tells the model which image has tiles and which has not."""
        cap_px = getattr(processor, "max_image_px", None)
        if len(images) == 1 and cap_px is not None:
            images = [_scaled_down(images[0], processor.image_processor, cap_px)]
        features: Mapping[str, Any] = processor.image_processor(images=[list(images)], return_tensors="pt")
        return features

    def tower_features(self, model: Any, output: Any) -> Any:
        """The hidden states of the layer that the projector gets: [tiles, patches, width]."""
        return output.hidden_states[base_model(model).config.vision_feature_layer]


def _scaled_down(image: Any, image_processor: Any, cap_px: int) -> Any:
    from PIL import Image

    grids_px = tuple((height, width) for height, width in image_processor.image_grid_pinpoints)
    width_px, height_px = image.size
    size = TileGrids(grids_px, int(image_processor.size["height"]), 1, 1).capped_size(width_px, height_px, cap_px)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


FAMILIES = (LlavaOnevisionFamily(),)
