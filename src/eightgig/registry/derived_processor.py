"""What an unknown model's processor tells about it: found out by using it on small pictures and conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig.core.errors import UnsupportedModel
from eightgig.registry.facts import ImageLayout
from eightgig.registry.hub import explained_hub_errors
from eightgig.registry.processors import KEPT_PARTS, image_text_processor

LOAD_ERRORS = (ImportError, ValueError, TypeError, KeyError, AttributeError)
MARK = "\ue000"  # a private-use character: no template writes it
PROBE_SIZES = ((96, 64), (64, 192))


@dataclass(frozen=True)
class ProcessorFacts:
    """What `DerivedFamily` takes from a processor.

    Attributes:
        image_placeholder: what the chat template writes for one image.
        end_of_turn: the special token behind an answer.
        image_layout: how image inputs of different shapes are laid out.
        takes_token_types: whether the model is told which tokens are an image's.
    """

    image_placeholder: str
    end_of_turn: str
    image_layout: ImageLayout
    takes_token_types: bool


def load_any_processor(model_type: str, location: str, **arguments: Any) -> Any:
    """The processor at `location`; cut down to images and texts where it has other parts, which need more packages."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    class_name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if class_name is not None:
        original = getattr(transformers, class_name)
        if set(original.get_attributes()) > set(KEPT_PARTS):
            return image_text_processor(class_name).from_pretrained(location, **arguments)
    return transformers.AutoProcessor.from_pretrained(location, **arguments)


def processor_facts(model_type: str, location: str, source: str) -> ProcessorFacts:
    """What the processor at `location` tells.

    Raises:
        UnsupportedModel: it can't be loaded, has no chat template, or does not tell what is needed.
        EnvironmentProblem: the hub can't be reached, or does not hand it out.
    """
    try:
        with explained_hub_errors(location, None):
            processor = load_any_processor(model_type, location)
    except LOAD_ERRORS as error:
        raise _refused(source, f"its processor can't be loaded ({type(error).__name__}: {error})") from error
    for part in KEPT_PARTS:
        if not hasattr(processor, part):
            raise _refused(source, f"its {type(processor).__name__} has no {part.replace('_', ' ')}")
    names = set(processor.model_input_names)
    if "token_type_ids" in names - set(processor.tokenizer.model_input_names):
        raise _refused(source, "what its token_type_ids mean, only a family of its own can know")
    return ProcessorFacts(
        image_placeholder=_image_placeholder(processor, source),
        end_of_turn=_end_of_turn(processor, source),
        image_layout=_image_layout(processor, source),
        takes_token_types="mm_token_type_ids" in names,
    )


def _refused(source: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source}: {reason}",
        expected="a processor with an image processor, a fast tokenizer and a chat template",
        next_step="choose another model, or write a family for it: docs/guides/adding-a-model-family.md",
    )


def _rendered(processor: Any, conversation: list[dict[str, Any]], source: str) -> str:
    for owner in (processor, processor.tokenizer):
        if getattr(owner, "chat_template", None):
            return str(owner.apply_chat_template(conversation, tokenize=False))
    raise _refused(source, "its processor has no chat template")


def _image_placeholder(processor: Any, source: str) -> str:
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARK}]}]
    text = _rendered(processor, conversation, source)
    known = [getattr(owner, "image_token", None) for owner in (processor, processor.tokenizer)]
    for token in (*known, getattr(processor, "boi_token", None)):
        if isinstance(token, str) and text.count(token) == 1:
            return token
    raise _refused(source, f"its chat template does not write one image token for an image: {text!r}")


def _end_of_turn(processor: Any, source: str) -> str:
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": MARK}]},
    ]
    tokenizer = processor.tokenizer
    behind = _rendered(processor, conversation, source).partition(MARK)[2].lstrip()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    match = re.match("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)), behind)
    if match and match[0]:
        return match[0]
    if tokenizer.eos_token is None:
        raise _refused(source, "neither its chat template nor its tokenizer has a token that ends an answer")
    return str(tokenizer.eos_token)


def _image_layout(processor: Any, source: str) -> ImageLayout:
    """Found by processing two pictures of different shapes, each alone and both together."""
    from PIL import Image
    from transformers import ProcessorMixin

    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise _refused(source, f"{type(processor).__name__} does not say what an image becomes in a text")
    pictures = [Image.new("RGB", size, "red") for size in PROBE_SIZES]
    alone = [_tensors(processor, [picture]) for picture in pictures]
    together = _tensors(processor, pictures)
    padding = {}
    for name, tensor in together.items():
        num_rows = [features[name].shape[0] for features in alone]
        if tensor.shape[0] != sum(num_rows):
            raise _refused(source, f"its {name} does not count images, so samples can't be laid end to end")
        if len({features[name].shape[1:] for features in alone}) > 1:
            padding[name] = 0.0
    return ImageLayout(padding=padding)


def _tensors(processor: Any, pictures: list[Any]) -> Mapping[str, Any]:
    import torch

    features = processor.image_processor(images=pictures, return_tensors="pt")
    return {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
