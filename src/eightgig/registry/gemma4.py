"""Gemma 4 E2B and E4B: embeddings for each layer, layers that share keys and values, a budget of tokens an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from eightgig.core.errors import ConfigError, Problem
from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.processors import image_text_processor
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7
NUM_LINEARS_A_SHARING_LAYER = 5  # it has no keys and values of its own
ABSENT_PARTS = ("feature_extractor", "video_processor")
NUM_MARKS = 2  # the start and the end of an image
DEFAULT_BUDGET = 280
# Most tokens that an image may cost. Source: Gemma4ImageProcessor of transformers 5.23, which takes no others.
BUDGETS = (70, 140, 280, 560, 1120)

# Ids of the published tokenizer. Source: tokenizer_config.json of google/gemma-4-E2B-it, from memory.
SPECIAL_TOKENS: Mapping[str, int] = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<|turn>": 105, "<turn|>": 106}
# Names of the other modalities' tokens, by the config's names of their ids.
MEDIA_TOKENS: Mapping[str, str] = {
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "image_token_id": "<|image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
    "audio_token_id": "<|audio|>",
    "video_token_id": "<|video|>",
}

# Writes what E2B's and E4B's published template writes for texts and images without tools and without thinking (that
# as quoted in public code, not read at its source).
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- part.text | trim -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<turn|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}"
)

# Source of the three: config.json of google/gemma-4-E2B-it, as quoted in public code; E4B's differs in the text model.
VISION: Mapping[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "use_clipped_linears": True,
    "standardize": False,
}
AUDIO: Mapping[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "output_proj_dims": 1536,
    "use_clipped_linears": True,
}
TOKEN_IDS: Mapping[str, int] = {
    "boi_token_id": 255999,
    "eoi_token_id": 258882,
    "image_token_id": 258880,
    "boa_token_id": 256000,
    "eoa_token_index": 258883,
    "audio_token_id": 258881,
    "video_token_id": 258884,
}


def _architecture(text: Mapping[str, Any]) -> Mapping[str, Any]:
    shared = {
        "model_type": "gemma4_text",
        "num_attention_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    }
    return {
        "model_type": "gemma4",
        "text_config": {**shared, **text},
        "vision_config": VISION,
        "audio_config": AUDIO,
        "tie_word_embeddings": True,
        **TOKEN_IDS,
    }


def _count_language_linears(text: Mapping[str, Any]) -> int:
    num_layers, num_sharing = int(text["num_hidden_layers"]), int(text["num_kv_shared_layers"])
    return (num_layers - num_sharing) * NUM_LINEARS_A_LAYER + num_sharing * NUM_LINEARS_A_SHARING_LAYER


def _facts(size: str, text: Mapping[str, Any], num_parameters: int) -> ModelFacts:
    hub_id = f"google/gemma-4-{size}-it"
    return ModelFacts(
        name=f"gemma-4-{size.lower()}",
        aliases=(f"gemma4-{size.lower()}", f"gemma-4-{size.lower()}-it", hub_id.lower()),
        hub_id=hub_id,
        folder=None,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        source=f"config.json of {hub_id}, as quoted in public code; parameters counted on the stock class of "
        "transformers 5.23",
        architecture=_architecture(text),
        num_parameters=num_parameters,
        num_language_linears=_count_language_linears(text),
        image_px=math.isqrt(DEFAULT_BUDGET * 48**2),
    )


GEMMA_4_E2B = _facts(
    "E2B",
    {
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "intermediate_size": 6144,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    },
    5_104_297_504,
)
GEMMA_4_E4B = _facts(
    "E4B",
    {
        "hidden_size": 2560,
        "num_hidden_layers": 42,
        "num_key_value_heads": 2,
        "intermediate_size": 10240,
        "num_kv_shared_layers": 18,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 7,
    },
    7_941_100_832,
)


class Gemma4Family(ModelFamily):
    """Every image is scaled, up or down, to fill a budget of tokens; `data.image_size` chooses the budget.

    The towers for images and for audio stay as they are; audio is never fed. What mixes each layer's own embedding into
    the residual stream stays 16-bit and gets no adapter: it is 2 % of the weights, and the path of the embeddings.
    """

    name = "gemma-4"
    model_types = ("gemma4",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_tower", "model.audio_tower"),
        projectors=("model.embed_vision", "model.embed_audio"),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = (
        "model.vision_tower",
        "model.audio_tower",
        "model.embed_vision",
        "model.embed_audio",
        r"model\.language_model\.per_layer_model_projection",
        r"model\.language_model\.layers\.\d+\.per_layer_input_gate",
        r"model\.language_model\.layers\.\d+\.per_layer_projection",
        "lm_head",
    )
    keep_16bit_in_tower = (r"model\.vision_tower\.patch_embedder",)
    image_placeholder = "<|image|>"
    end_of_turn = "<turn|>"
    packing_obstacle = "some layers attend within a window, by masks made of the whole row"
    models = (GEMMA_4_E2B, GEMMA_4_E4B)
    reserved_texts = tuple(MEDIA_TOKENS.values())
    layer_row_dimensions = MappingProxyType({"shared_kv_states": 0})
    attention = MappingProxyType(
        {part: "sdpa" for part in ("", "text_config", "vision_config")} | {"audio_config": "eager"}
    )
    fp32_in_fp16 = ("model.language_model", r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj")
    dtype_caution = (
        "The language model leaves the range of fp16, in its MLPs first (unsloth PR 5092): in fp16 mode all of it runs "
        "in fp32, and so do the MLPs' products with 4-bit weights."
    )

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the square that fills the budget."""
        return math.isqrt(_budget(image_settings) * _token_px(architecture) ** 2)

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer; no k and v where those of an earlier layer are used."""
        return _count_language_linears(architecture["text_config"])

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor without its video and audio parts."""
        return _processor_class().from_pretrained(location, **arguments)

    def build_processor(self, facts: ModelFacts) -> Any:
        """A `Gemma4Processor` without video and audio, with a byte-level tokenizer."""
        from transformers import Gemma4ImageProcessor, Gemma4ImageProcessorPil
        from transformers.utils import is_torchvision_available

        architecture = facts.architecture
        media = {token: architecture[name] for name, token in MEDIA_TOKENS.items()}
        tokenizer = byte_level_tokenizer(
            {**SPECIAL_TOKENS, **media},
            vocab_size=architecture["text_config"]["vocab_size"],
            roles={
                **{f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk")},
                "boi_token": "<|image>",
                "eoi_token": "<image|>",
                "image_token": self.image_placeholder,
                "boa_token": "<|audio>",
                "eoa_token": "<audio|>",
                "audio_token": "<|audio|>",
            },
        )
        image_processor = Gemma4ImageProcessor if is_torchvision_available() else Gemma4ImageProcessorPil
        return _processor_class()(
            image_processor=image_processor(
                patch_size=architecture["vision_config"]["patch_size"],
                pooling_kernel_size=architecture["vision_config"]["pooling_kernel_size"],
                max_soft_tokens=_budget(facts.image_settings),
            ),
            tokenizer=tokenizer,
            chat_template=CHAT_TEMPLATE,
            **dict.fromkeys(ABSENT_PARTS if has_own_processor() else ()),
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError where not even one token would be left of an image."""
        token_px = _token_px(facts.architecture)
        if image_px < token_px:
            raise ConfigError(
                [Problem("data.image_size", str(image_px), f"at least {token_px} px, the side of one token")],
                source=f"{facts.name} with images of any shape",
                next_step=f"use a larger value, or leave it out for the model's own {facts.image_px} px",
            )

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """The budget that is used, where it isn't the square of the side asked for."""
        budget, token_px = _budget_at(image_px, _token_px(facts.architecture)), _token_px(facts.architecture)
        side_px = math.isqrt(budget * token_px**2)
        if side_px == image_px:
            return None
        return (
            f"{facts.name} takes {', '.join(map(str, BUDGETS))} tokens an image at most: data.image_size = {image_px} "
            f"comes to {budget}, the area of {side_px} px"
        )

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """Squares of pooled patches that fit the budget in the image's own shape, and two marks.

        Rule: `get_aspect_ratio_preserving_size` of transformers' Gemma 4 image processor.
        """
        token_px = _token_px(facts.architecture)
        budget = _budget(facts.image_settings) if image_px is None else _budget_at(image_px, token_px)
        scale = math.sqrt(budget * token_px**2 / (width_px * height_px))
        num_rows = math.floor(scale * height_px / token_px)
        num_columns = math.floor(scale * width_px / token_px)
        if num_rows == 0:
            num_rows, num_columns = 1, min(width_px // height_px, budget)
        elif num_columns == 0:
            num_rows, num_columns = min(height_px // width_px, budget), 1
        return num_rows * num_columns + NUM_MARKS

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Set the processor's budget; the model takes any."""
        if image_px is None:
            return
        image_processor = processor.image_processor
        token_px = image_processor.patch_size * image_processor.pooling_kernel_size
        image_processor.max_soft_tokens = _budget_at(image_px, token_px)

    def process_images(self, processor: Any, images: Sequence[Any]) -> Mapping[str, Any]:
        """Patches and their places; the number of tokens as a list, since it is no input of the model."""
        features = dict(processor.image_processor(images=list(images), return_tensors="pt"))
        return {
            **features,
            "num_soft_tokens_per_image": [int(count) for count in features["num_soft_tokens_per_image"]],
        }

    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """Each image's own number of tokens between its marks, as `Gemma4Processor.replace_image_token` writes them."""
        counts = image_inputs["num_soft_tokens_per_image"]
        return [f"<|image>{self.image_placeholder * count}<image|>" for count in counts]

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Which tokens are an image's own (1)."""
        return {"mm_token_type_ids": (input_ids == processor.tokenizer.image_token_id).long()}

    def host_tables(self, model: Any) -> Sequence[Any]:
        """The table of each layer's own embeddings, by far the largest; the other one is the head's weight too."""
        return [base_model(model).get_submodule(self.modules.language_model).embed_tokens_per_layer]

    def logits(self, model: Any, hidden: Any) -> Any:
        """Logits, [..., vocab], squeezed into ± the cap by a tanh."""
        logits = super().logits(model, hidden)
        cap = base_model(model).config.get_text_config().final_logit_softcapping
        return logits if cap is None else (logits / cap).tanh() * cap


def has_own_processor() -> bool:
    """Whether transformers' class for Gemma 4 can be imported: 5.17 needs torchvision for that, 5.23 does not."""
    import transformers

    try:
        return transformers.Gemma4Processor is not None
    except ModuleNotFoundError:
        return False


def _processor_class() -> Any:
    """Gemma 4's processor without video and audio; where it can't be had, Gemma 3's, which holds the same parts."""
    if has_own_processor():
        return image_text_processor("Gemma4Processor")
    return image_text_processor("Gemma4Processor", code_of="Gemma3Processor")


def _token_px(architecture: Mapping[str, Any]) -> int:
    """The side of the square that becomes one token."""
    vision = architecture["vision_config"]
    return int(vision["patch_size"]) * int(vision["pooling_kernel_size"])


def _budget(image_settings: Mapping[str, Any]) -> int:
    return int(image_settings.get("max_soft_tokens") or DEFAULT_BUDGET)


def _budget_at(image_px: int, token_px: int) -> int:
    """The largest budget within the area of a square of `image_px`, else the smallest there is."""
    return max((budget for budget in BUDGETS if budget * token_px**2 <= image_px**2), default=BUDGETS[0])


FAMILIES = (Gemma4Family(),)
