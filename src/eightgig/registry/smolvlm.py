"""SmolVLM2, and Idefics3, which it and SmolVLM are made as: images cut into square tiles, and the whole in one more."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.core.errors import ConfigError, Problem
from eightgig.registry.facts import ImageLayout, ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily
from eightgig.registry.processors import image_text_processor
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7
TILES_A_SIDE = 4  # of a published processor: its longest edge is four tiles
MOST_TILES_A_SIDE = 6  # the vocabulary has marks for six rows and six columns
APACHE_2_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"

ROUND_IMAGE = "<fake_token_around_image>"
WHOLE_IMAGE = "<global-img>"
TILE_MARKS = tuple(
    f"<row_{row}_col_{column}>" for row in range(1, MOST_TILES_A_SIDE + 1) for column in range(1, MOST_TILES_A_SIDE + 1)
)

# Renders what the published template renders, which transformers quotes in `processing_smolvlm.DEFAULT_CHAT_TEMPLATE`.
CHAT_TEMPLATE = (
    "{{- '<|im_start|>' -}}"
    "{%- for message in messages -%}"
    "{{- message.role | capitalize + (':' if message.content[0].type == 'image' else ': ') -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<end_of_utterance>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)

SIGLIP_BASE_512: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 512,
    "patch_size": 16,
}
SIGLIP_SO400M_384: Mapping[str, Any] = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}
IMAGE_TOKEN_ID = 49190


def _text(shape: tuple[int, int, int, int, int], *, rope_theta: float) -> Mapping[str, Any]:
    """SmolLM2 of `shape`: hidden size, layers, query heads, key-value heads, intermediate size; heads of 64."""
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size = shape
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 64,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "vocab_size": 49280,
        "pad_token_id": 2,
    }


SMOLLM2_135M = _text((576, 30, 9, 3, 1536), rope_theta=1e5)
SMOLLM2_360M = _text((960, 32, 15, 5, 2560), rope_theta=1e5)
SMOLLM2_1_7B = _text((2048, 24, 32, 32, 8192), rope_theta=1.3e5)


def _facts(
    hub_name: str,
    model_type: str,
    text: Mapping[str, Any],
    tower: Mapping[str, Any],
    *,
    scale_factor: int,
    num_parameters: int,
    source: str,
) -> ModelFacts:
    hub_id = f"HuggingFaceTB/{hub_name}"
    tile_px = tower["image_size"]
    return ModelFacts(
        name=hub_name.lower().removesuffix("-instruct").removesuffix("-video"),
        aliases=tuple(dict.fromkeys((hub_name.lower(), hub_id.lower(), hub_name.lower().replace("-video", "")))),
        hub_id=hub_id,
        folder=None,
        licence="Apache-2.0",
        licence_url=APACHE_2_LICENCE,
        source=f"{source}; parameters counted on the stock class of transformers 5.23",
        architecture={
            "model_type": model_type,
            "text_config": text,
            "vision_config": {"model_type": f"{model_type}_vision", **tower},
            "scale_factor": scale_factor,
            "image_token_id": IMAGE_TOKEN_ID,
            "tie_word_embeddings": False,
        },
        num_parameters=num_parameters,
        num_language_linears=text["num_hidden_layers"] * NUM_LINEARS_A_LAYER,
        image_px=TILES_A_SIDE * tile_px,
        image_settings={
            "size": {"longest_edge": TILES_A_SIDE * tile_px},
            "max_image_size": {"longest_edge": tile_px},
        },
    )


class Idefics3Family(ModelFamily):
    """Images are scaled so that the longer side is whole tiles, the shorter one filled up to whole tiles by stretching.

    Each row of tiles is followed by a line break, each tile announced by its row and column, and the image as a whole
    comes last. `data.image_size` caps the longer side, rounded down to whole tiles; at one tile the image is not cut.

    Read in copies of the published files: SmolVLM2-500M's config, image settings and special tokens. From memory: the
    chat template of SmolVLM (1), that "\\n\\n" is one token, and that Idefics3-8B's vocabulary has no marks of rows
    and columns but spells them. `num_image_tokens` counts each mark as one token, which is too few there; what the
    model is given is right.
    """

    name = "idefics3"
    model_types: tuple[str, ...] = ("idefics3",)
    image_processor_class = "Idefics3ImageProcessor"
    processor_class = "Idefics3Processor"
    modules = ModulePaths(
        language_model="model.text_model",
        towers=("model.vision_model",),
        projectors=("model.connector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.text_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("model.vision_model", "model.connector", "lm_head")
    image_placeholder = "<image>"
    end_of_turn = "<end_of_utterance>"
    packing_obstacle = ""
    reserved_texts = (ROUND_IMAGE, WHOLE_IMAGE, *TILE_MARKS)
    # The model leaves out tiles whose pixels are all 0.0, which no tile of a picture has after normalising.
    image_layout = ImageLayout(padding={"pixel_values": 0, "pixel_attention_mask": 0}, rows_are_samples=True)
    # Measured by comparing position ids with those in fp32; patches of 16 px are not touched.
    dtype_caution = (
        "In 16 bits transformers 5.17 gives many of a tower's patches of 14 px the position of a neighbour "
        "(SmolVLM2-2.2B: 288 of 729 in bf16, 560 in fp16); 5.23 does not."
    )
    models = tuple(
        _facts(
            f"SmolVLM-{size}-Instruct",
            "idefics3",
            text,
            SIGLIP_BASE_512,
            scale_factor=4,
            num_parameters=num_parameters,
            source="the config of SmolVLM2 of that size, which transformers reads into the same modules (from memory)",
        )
        for size, text, num_parameters in (
            ("256M", SMOLLM2_135M, 256_484_928),
            ("500M", SMOLLM2_360M, 507_482_304),
        )
    )

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side that longer sides are scaled to."""
        longest_px = (image_settings.get("size") or {}).get("longest_edge")
        return int(longest_px or TILES_A_SIDE * architecture["vision_config"]["image_size"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer of a Llama."""
        text = architecture["text_config"]
        return int(text["num_hidden_layers"]) * NUM_LINEARS_A_LAYER if text["model_type"] == "llama" else 0

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor; Idefics3's code, which writes the same, since SmolVLM's wants num2words for video.

        Put together from its parts, since AutoImageProcessor of transformers 5.17 takes these for torchvision's.
        """
        from transformers import AutoTokenizer

        processor_class = self._processor_class()
        settings, _ = processor_class.get_processor_dict(location, **arguments)
        image_processor = self._image_processor_class().from_pretrained(location, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
        return processor_class.from_args_and_dict([image_processor, tokenizer], settings)

    def build_processor(self, facts: ModelFacts) -> Any:
        """The family's processor with a byte-level tokenizer that has the special tokens at SmolVLM2's ids."""
        tile_px = _tile_px(facts)
        tokenizer = byte_level_tokenizer(
            _special_tokens(facts),
            vocab_size=facts.architecture["text_config"]["vocab_size"],
            roles={"unk_token": "<|endoftext|>", "eos_token": self.end_of_turn, "pad_token": "<|im_end|>"},
            words={"\n\n": 3},
        )
        return self._processor_class()(
            self._image_processor_class()(
                size={"longest_edge": facts.image_px}, max_image_size={"longest_edge": tile_px}
            ),
            tokenizer,
            image_seq_len=_tokens_a_tile(facts),
            chat_template=CHAT_TEMPLATE,
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError for no pixel at all, and for more tiles a side than the vocabulary has marks for."""
        largest_px = (MOST_TILES_A_SIDE + 1) * _tile_px(facts) - 1
        if not 1 <= image_px <= largest_px:
            raise ConfigError(
                [Problem("data.image_size", str(image_px), f"from 1 to {largest_px} px, the longer side")],
                source=f"{facts.name} with at most {MOST_TILES_A_SIDE} tiles of {_tile_px(facts)} px a side",
                next_step=f"use a value in that range, or leave it out for the model's own {facts.image_px} px",
            )

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """Which whole tiles the setting comes to."""
        longest_px = _whole_tiles_px(facts, image_px)
        if longest_px == image_px:
            return None
        num_tiles = longest_px // _tile_px(facts)
        return (
            f"data.image_size = {image_px} comes to {num_tiles} tile{'s' * (num_tiles > 1)} of {_tile_px(facts)} px "
            "along an image's longer side"
        )

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """Tokens of all tiles and of the whole, with their marks. Rule: transformers' Idefics3 image processor."""
        num_rows, num_columns = _tile_grid(facts, image_px, width_px=width_px, height_px=height_px)
        num_tokens = _tokens_a_tile(facts)
        num_whole = num_tokens + 3  # <fake_token_around_image><global-img>...<fake_token_around_image>
        if num_rows * num_columns == 1:
            return num_whole
        # Each row ends in "\n"; the whole begins with one, and the last two are one token together.
        return num_rows * (num_columns * (num_tokens + 2) + 1) + num_whole

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Set the longer side; the tower takes tiles of one size whatever it is."""
        if image_px is None:
            return
        image_processor = processor.image_processor
        tile_px = image_processor.max_image_size["longest_edge"]
        image_processor.size = {"longest_edge": max(image_px // tile_px, 1) * tile_px}

    def process_images(self, processor: Any, images: Sequence[Any]) -> Mapping[str, Any]:
        """pixel_values [1, tiles, 3, side, side] and pixel_attention_mask [1, tiles, side, side], rows and columns."""
        features: Mapping[str, Any] = processor.image_processor(
            images=list(images), return_row_col_info=True, return_tensors="pt"
        )
        return features

    def _processor_class(self) -> Any:
        return image_text_processor(self.processor_class, code_of="Idefics3Processor")

    def _image_processor_class(self) -> Any:
        """From its own module: at its top level transformers 5.17 has neither class without torchvision."""
        from transformers.utils import is_torchvision_available

        package, suffix = ("", "") if is_torchvision_available() else ("pil_", "Pil")
        module = f"transformers.models.{self.model_types[0]}.image_processing_{package}{self.model_types[0]}"
        return getattr(importlib.import_module(module), self.image_processor_class + suffix)


class SmolVLM2Family(Idefics3Family):
    """SmolVLM2: Idefics3 that also takes videos, which are not trained here."""

    name = "smolvlm2"
    model_types = ("smolvlm",)
    image_processor_class = "SmolVLMImageProcessor"
    processor_class = "SmolVLMProcessor"
    models = (
        _facts(
            "SmolVLM2-256M-Video-Instruct",
            "smolvlm",
            SMOLLM2_135M,
            SIGLIP_BASE_512,
            scale_factor=4,
            num_parameters=256_484_928,
            source="config.json of HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        ),
        _facts(
            "SmolVLM2-500M-Video-Instruct",
            "smolvlm",
            SMOLLM2_360M,
            SIGLIP_BASE_512,
            scale_factor=4,
            num_parameters=507_482_304,
            source="config.json of HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        ),
        _facts(
            "SmolVLM2-2.2B-Instruct",
            "smolvlm",
            SMOLLM2_1_7B,
            SIGLIP_SO400M_384,
            scale_factor=3,
            num_parameters=2_246_784_880,
            source="config.json of HuggingFaceTB/SmolVLM2-2.2B-Instruct (rope_theta from memory)",
        ),
    )


def _special_tokens(facts: ModelFacts) -> Mapping[str, int]:
    """Marks stand right before the image token, the end of a turn last. Source: SmolVLM2-500M's added tokens."""
    image_id = facts.architecture["image_token_id"]
    before_image = (WHOLE_IMAGE, *TILE_MARKS, ROUND_IMAGE)
    return {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        **{token: image_id - len(before_image) + index for index, token in enumerate(before_image)},
        "<image>": image_id,
        "<end_of_utterance>": facts.architecture["text_config"]["vocab_size"] - 1,
    }


def _tile_px(facts: ModelFacts) -> int:
    settings = facts.image_settings.get("max_image_size") or {}
    return int(settings.get("longest_edge") or facts.architecture["vision_config"]["image_size"])


def _tokens_a_tile(facts: ModelFacts) -> int:
    patches_a_side = _tile_px(facts) // int(facts.architecture["vision_config"]["patch_size"])
    return int(patches_a_side**2 // int(facts.architecture["scale_factor"]) ** 2)


def _whole_tiles_px(facts: ModelFacts, image_px: int) -> int:
    return max(image_px // _tile_px(facts), 1) * _tile_px(facts)


def _tile_grid(facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> tuple[int, int]:
    """Rows and columns of tiles; one of each where the image stays whole."""
    if not facts.image_settings.get("do_image_splitting", True):
        return 1, 1
    tile_px = _tile_px(facts)
    longest_px = facts.image_px if image_px is None else _whole_tiles_px(facts, image_px)
    is_wide = width_px >= height_px
    ratio = width_px / height_px
    # The processor makes the shorter side an even number, then scales again, and each time cuts off the fraction.
    shorter_px = int(longest_px / ratio) if is_wide else int(longest_px * ratio)
    shorter_px = max(shorter_px + shorter_px % 2, 1)
    ratio = longest_px / shorter_px if is_wide else shorter_px / longest_px
    longer_px = math.ceil(longest_px / tile_px) * tile_px
    shorter_px = int(longer_px / ratio) if is_wide else int(longer_px * ratio)
    num_longer, num_shorter = longer_px // tile_px, math.ceil(shorter_px / tile_px)
    return (num_shorter, num_longer) if is_wide else (num_longer, num_shorter)


FAMILIES = (Idefics3Family(), SmolVLM2Family())
