"""What Qwen's vision models share: images of any size on a grid of merged patches, ChatML, and their processor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eightgig.core.errors import ConfigError, Problem
from eightgig.registry.facts import ModelFacts
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.processors import image_text_processor
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7

# In the order of their ids, in the vocabularies of Qwen2 (from 151643 on) and Qwen3.5 (from 248044 on).
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML as the published templates write it, for texts and images; `system` is what goes before a first user's turn.
_CHATML = (
    "{{%- for message in messages -%}}"
    "{{%- if loop.first and message.role != 'system' -%}}{{{{- {system!r} -}}}}{{%- endif -%}}"
    "{{{{- '<|im_start|>' + message.role + '\\n' -}}}}"
    "{{%- if loop.last and message.role == 'assistant' -%}}{{{{- {answer_start!r} -}}}}{{%- endif -%}}"
    "{{%- for part in message.content -%}}"
    "{{%- if part.type == 'image' -%}}{{{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}}}"
    "{{%- else -%}}{{{{- part.text -}}}}{{%- endif -%}}"
    "{{%- endfor -%}}"
    "{{{{- '<|im_end|>\\n' -}}}}"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' + {answer_start!r} -}}}}{{%- endif -%}}"
)
APACHE_2_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def chatml_template(*, system: str = "", answer_start: str = "") -> str:
    """A chat template; `system` goes before a conversation without a system's turn, `answer_start` before an answer.

    Of a finished conversation only the last answer has it, as in Qwen3.5's own template.
    """
    return _CHATML.format(system=system, answer_start=answer_start)


@dataclass(frozen=True)
class PatchGrid:
    """How an image becomes tokens.

    Attributes:
        factor_px: side of the square that becomes one token: patch size × merge size.
        min_pixels: smaller images are enlarged to this.
        max_pixels: larger ones are scaled down to this.
    """

    factor_px: int
    min_pixels: int
    max_pixels: int

    def num_tokens(self, width_px: int, height_px: int) -> int:
        """Tokens of an image. Rule: `smart_resize` of transformers' Qwen2-VL image processor."""
        height, width = self._round(height_px), self._round(width_px)
        if height * width > self.max_pixels:
            shrink = math.sqrt(height_px * width_px / self.max_pixels)
            height, width = self._down(height_px / shrink), self._down(width_px / shrink)
        elif height * width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height_px * width_px))
            height, width = self._up(height_px * grow), self._up(width_px * grow)
        return (height // self.factor_px) * (width // self.factor_px)

    def _round(self, side_px: int) -> int:
        return round(side_px / self.factor_px) * self.factor_px

    def _down(self, side_px: float) -> int:
        return max(self.factor_px, math.floor(side_px / self.factor_px) * self.factor_px)

    def _up(self, side_px: float) -> int:
        return math.ceil(side_px / self.factor_px) * self.factor_px


class QwenVisionFamily(ModelFamily):
    """Images keep their shape; `data.image_size` caps the area, at the square of that side.

    A family of this kind names its processor class and the published image processor's settings.
    """

    processor_class: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    default_min_pixels: int
    default_max_pixels: int
    standin_template: str

    image_placeholder = "<|image_pad|>"
    end_of_turn = "<|im_end|>"
    keep_16bit: tuple[str, ...] = ("model.visual", "lm_head")
    accepts_image_features = True
    packing_obstacle = ""

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the largest square that the processor does not scale down."""
        return math.isqrt(self._pixel_limits(image_settings)[1])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer."""
        return int(architecture["text_config"]["num_hidden_layers"]) * NUM_LINEARS_A_LAYER

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor without its video part, which needs torchvision."""
        return image_text_processor(self.processor_class).from_pretrained(location, **arguments)

    def build_processor(self, facts: ModelFacts) -> Any:
        """The family's processor with a byte-level tokenizer that has the special tokens at the config's ids."""
        from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil
        from transformers.utils import is_torchvision_available

        vision = facts.architecture["vision_config"]
        min_pixels, max_pixels = self._pixel_limits(facts.image_settings)
        first_id = facts.architecture["vision_start_token_id"] - SPECIAL_TOKENS.index("<|vision_start|>")
        tokenizer = byte_level_tokenizer(
            {token: first_id + index for index, token in enumerate(SPECIAL_TOKENS)},
            vocab_size=facts.architecture["text_config"]["vocab_size"],
            roles={"eos_token": self.end_of_turn, "pad_token": "<|endoftext|>"},
        )
        image_processor = Qwen2VLImageProcessor if is_torchvision_available() else Qwen2VLImageProcessorPil
        return image_text_processor(self.processor_class)(
            image_processor=image_processor(
                size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
                patch_size=vision["patch_size"],
                merge_size=vision["spatial_merge_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                image_mean=list(self.image_mean),
                image_std=list(self.image_std),
            ),
            tokenizer=tokenizer,
            video_processor=None,
            chat_template=self.standin_template,
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError where not even one token would be left of an image."""
        factor_px = _factor_px(facts)
        if image_px < factor_px:
            raise ConfigError(
                [Problem("data.image_size", str(image_px), f"at least {factor_px} px, the side of one token")],
                source=f"{facts.name} with images of any size",
                next_step=f"use a larger value, or leave it out for the model's own cap, {facts.image_px} px",
            )

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """One token a square of merged patches, after scaling the image's area into the limits."""
        min_pixels, max_pixels = self._pixel_limits(facts.image_settings)
        if image_px is not None:
            max_pixels = image_px**2
        grid = PatchGrid(_factor_px(facts), min(min_pixels, max_pixels), max_pixels)
        return grid.num_tokens(width_px, height_px)

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Set the processor's largest area, and its smallest where that is larger; the model takes any size."""
        if image_px is None:
            return
        image_processor = processor.image_processor
        smallest = min(image_processor.size["shortest_edge"], image_px**2)
        image_processor.size = {"shortest_edge": smallest, "longest_edge": image_px**2}

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Which tokens are an image's (1), from which the model derives their positions in two dimensions."""
        return {"mm_token_type_ids": (input_ids == processor.image_token_id).long()}

    def packed_inputs(self, model: Any, inputs: Mapping[str, Any], segment_lengths: Sequence[int]) -> Mapping[str, Any]:
        """Positions in three dimensions, int64 [3, 1, tokens]: by the model's own rule, each sample by itself."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def in_rows(values: Any) -> Any:
            return pad_sequence(list(values.split(list(segment_lengths))), batch_first=True)

        positions, _ = base_model(model).model.get_rope_index(
            in_rows(inputs["input_ids"][0]),
            mm_token_type_ids=in_rows(inputs["mm_token_type_ids"][0]),
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=in_rows(torch.ones_like(inputs["input_ids"][0])),
        )
        of_samples = [positions[:, index, :length] for index, length in enumerate(segment_lengths)]
        return {**inputs, "position_ids": torch.cat(of_samples, dim=1).unsqueeze(1)}

    def tower_features(self, model: Any, output: Any) -> Any:
        """The merged patches, [tokens, hidden]."""
        return output.pooler_output

    def tower_output(self, model: Any, features: Any) -> Any:
        """An output that holds the merged patches alone."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=features)

    def _pixel_limits(self, image_settings: Mapping[str, Any]) -> tuple[int, int]:
        """Smallest and largest area; older folders write them as min_pixels and max_pixels."""
        size = image_settings.get("size") or {}
        smallest = size.get("shortest_edge") or image_settings.get("min_pixels") or self.default_min_pixels
        largest = size.get("longest_edge") or image_settings.get("max_pixels") or self.default_max_pixels
        return int(smallest), int(largest)


def _factor_px(facts: ModelFacts) -> int:
    vision = facts.architecture["vision_config"]
    return int(vision["patch_size"]) * int(vision["spatial_merge_size"])
