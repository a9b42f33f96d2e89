"""Chat and pictures to model inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import cached_file

from eightgig.core.errors import UnsupportedModel
from eightgig.models.qwen_vl.configuration import QwenVLConfig
from eightgig.models.qwen_vl.image_processing import QwenVLImageProcessor
from eightgig.models.qwen_vl.tokenization import IMAGE_PAD, VOCABULARY_FILE, build_tokenizer, read_ranks

# ChatML as the model was tuned on: the same system text unless there is one, pictures numbered through the whole chat.
CHAT_TEMPLATE = (
    "{%- set pictures = namespace(number=0) -%}"
    "{%- if messages and messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}"
    "{%- set pictures.number = pictures.number + 1 -%}"
    "{{- 'Picture ' + pictures.number|string + ': <img><imgpad></img>\\n' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

PROCESSOR_FILE = "processor_config.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class QwenVLProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is untyped
    """An image processor and a tokenizer; one `<imgpad>` in a text stands for one picture.

    Args:
        image_processor: gives each picture the same square size.
        tokenizer: with `<imgpad>` as a token of its own.
        chat_template: `CHAT_TEMPLATE` unless given.
        num_image_tokens: what the placeholder of a picture becomes: the queries of the model's resampler.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 256,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_PAD
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.num_image_tokens = num_image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> QwenVLProcessor:
        """The processor in a folder or repository: as `save_pretrained` writes it, or as the model was published.

        The published one has no processor files: the vocabulary is `qwen.tiktoken`, the rest is in config.json.

        Raises:
            UnsupportedModel: the vocabulary is damaged, or another model's.
        """
        location = str(pretrained_model_name_or_path)
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        if cached_file(location, PROCESSOR_FILE, _raise_exceptions_for_missing_entries=False, **hub_arguments):
            processor: QwenVLProcessor = super().from_pretrained(location, *args, **kwargs)
            return processor
        vocabulary = cached_file(location, VOCABULARY_FILE, **hub_arguments)
        config = QwenVLConfig.from_pretrained(location, **hub_arguments)
        tokenizer = build_tokenizer(read_ranks(Path(vocabulary)), max_length=config.max_position_embeddings)
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        if image_token_id != config.image_token_id:
            raise UnsupportedModel(
                f"{location}: {VOCABULARY_FILE} gives {IMAGE_PAD} the id {image_token_id}",
                expected=f"{config.image_token_id}, as its config.json says",
                next_step="take both files from the same model",
            )
        return cls.for_config(config, tokenizer)

    @classmethod
    def for_config(cls, config: QwenVLConfig, tokenizer: Any) -> QwenVLProcessor:
        """A processor with the image size and the number of image tokens of `config`."""
        side_px = config.visual.image_size
        image_processor = QwenVLImageProcessor(size={"height": side_px, "width": side_px})
        return cls(image_processor, tokenizer, num_image_tokens=config.visual.n_queries)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """The text that a picture's placeholder becomes; transformers asks for it for each one."""
        return IMAGE_PAD * self.num_image_tokens
