"""Gemma 3: square images of 896 px, pooled to 256 tokens that attend to each other both ways; window attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7
NUM_MARKS = 4  # beside an image's own tokens: its start, its end, and two line feeds in one token before and behind

# Ids of the published tokenizer. Source: tokenizer_config.json of google/gemma-3-4b-it, from memory.
SPECIAL_TOKENS: Mapping[str, int] = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
}
TWO_LINE_FEEDS: Mapping[str, int] = {"\n\n": 108}

# Writes what the published template writes for texts and images (that as transformers' own tests quote it): the
# system's words go before the first user's, texts are trimmed, and the assistant is called `model`.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set turns = messages -%}"
    "{%- if messages[0].role == 'system' -%}{%- set turns = messages[1:] -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}"
    "{%- if loop.first and messages[0].role == 'system' -%}{{- messages[0].content[0].text + '\\n\\n' -}}{%- endif -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<start_of_image>' -}}{%- else -%}{{- part.text | trim -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)

# SigLIP-So400m at 896 px. Source: config.json of google/gemma-3-4b-it, as quoted in public code.
SIGLIP_896: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}

GEMMA_3_4B = ModelFacts(
    name="gemma-3-4b",
    aliases=("gemma3-4b", "gemma-3-4b-it", "google/gemma-3-4b-it"),
    hub_id="google/gemma-3-4b-it",
    folder=None,
    licence="Gemma Terms of Use",
    licence_url="https://ai.google.dev/gemma/terms",
    source="config.json of google/gemma-3-4b-it, as quoted in public code; parameters counted on the stock class of "
    "transformers 5.23",
    architecture={
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 10240,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "sliding_window": 1024,
            "vocab_size": 262208,
        },
        "vision_config": SIGLIP_896,
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "tie_word_embeddings": True,
    },
    num_parameters=4_300_079_472,
    num_language_linears=34 * NUM_LINEARS_A_LAYER,
    image_px=896,
)


class Gemma3Family(ModelFamily):
    """Every image is squashed to one square and costs the same tokens; no cutting out of details (pan and scan)."""

    name = "gemma-3"
    model_types = ("gemma3",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_tower",),
        projectors=("model.multi_modal_projector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("model.vision_tower", "lm_head")  # the projector holds no linear layer, but a bare matrix
    image_placeholder = "<start_of_image>"
    end_of_turn = "<end_of_turn>"
    packing_obstacle = "tokens of an image attend to each other both ways, by masks made of the whole row"
    models = (GEMMA_3_4B,)
    fp32_in_fp16 = ("model.language_model",)
    dtype_caution = (
        "The language model's residual stream leaves the range of fp16 (unsloth-zoo PR 174): in fp16 mode all of it "
        "runs in fp32 but the products with 4-bit weights."
    )
    accepts_image_features = True

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the tower's grid."""
        return int(architecture["vision_config"]["image_size"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer."""
        return int(architecture["text_config"]["num_hidden_layers"]) * NUM_LINEARS_A_LAYER

    def build_processor(self, facts: ModelFacts) -> Any:
        """A `Gemma3Processor` with a byte-level tokenizer that also has two line feeds as one token."""
        from transformers import Gemma3ImageProcessor, Gemma3ImageProcessorPil, Gemma3Processor
        from transformers.utils import is_torchvision_available

        architecture, px = facts.architecture, facts.image_px
        image_processor = Gemma3ImageProcessor if is_torchvision_available() else Gemma3ImageProcessorPil
        tokenizer = byte_level_tokenizer(
            {
                **SPECIAL_TOKENS,
                self.image_placeholder: architecture["boi_token_index"],
                "<end_of_image>": architecture["eoi_token_index"],
                "<image_soft_token>": architecture["image_token_index"],
            },
            vocab_size=architecture["text_config"]["vocab_size"],
            roles={
                "pad_token": "<pad>",
                "eos_token": "<eos>",
                "bos_token": "<bos>",
                "unk_token": "<unk>",
                "boi_token": self.image_placeholder,
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
            },
            words=TWO_LINE_FEEDS,
        )
        return Gemma3Processor(
            image_processor(size={"height": px, "width": px}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
            tokenizer,
            chat_template=CHAT_TEMPLATE,
            image_seq_length=architecture["mm_tokens_per_image"],
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Accept any: `image_px_note` says that it changes nothing."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """That images have one size, where another is asked for."""
        if image_px == facts.image_px:
            return None
        num_tokens = facts.architecture["mm_tokens_per_image"]
        return (
            f"data.image_size = {image_px} changes nothing: {facts.name} takes every image at {facts.image_px} px, "
            f"{num_tokens} tokens"
        )

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """The same for every image: the pooled grid and its marks."""
        return int(facts.architecture["mm_tokens_per_image"]) + NUM_MARKS

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Change nothing."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> Mapping[str, Any]:
        """Pixels, [images, 3, height, width]; whole images only, as the processor's own call makes them by default."""
        features = processor.image_processor(images=list(images), return_tensors="pt", do_pan_and_scan=False)
        return {"pixel_values": features["pixel_values"]}

    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """`num_images` times the same tokens, between marks and line feeds."""
        return [processor.full_image_sequence] * num_images

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Which tokens are an image's own (1): those of one image attend to each other in both directions."""
        return {"token_type_ids": (input_ids == processor.tokenizer.image_token_id).long()}


FAMILIES = (Gemma3Family(),)
