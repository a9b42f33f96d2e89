"""What the tests of the data room share: one tiny processor of each template, and ways to make samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import ENDING_TEMPLATE, build_tiny_processor
from transformers import LlavaProcessor

from eightgig.data.encode import Encoder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.registry.llava import LlavaFamily

MakeEncoder = Callable[..., Encoder]


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    """Four image tokens an image, so that expected token lists can be written out."""
    return build_tiny_processor(image_px=16, patch_px=8)


@pytest.fixture(scope="session")
def ending_processor() -> LlavaProcessor:
    """The same with a template that writes the end token itself."""
    return build_tiny_processor(image_px=16, patch_px=8, chat_template=ENDING_TEMPLATE)


@pytest.fixture(scope="session")
def encoder(processor: LlavaProcessor) -> Encoder:
    return Encoder(processor, LlavaFamily(), max_length=4096)


@pytest.fixture(scope="session")
def ending_encoder(ending_processor: LlavaProcessor) -> Encoder:
    return Encoder(ending_processor, LlavaFamily(), max_length=4096)


@pytest.fixture
def quarantine(tmp_path: Path) -> Quarantine:
    return Quarantine(tmp_path / "quarantine.jsonl")


def make_sample(*turns: tuple[str, str | list[str | Path]], sample_id: str = "sample") -> Sample:
    """A sample from (role, parts), where a Path is an image and a str is a text."""
    messages = []
    for role, parts in turns:
        listed = [parts] if isinstance(parts, str) else parts
        made = tuple(TextPart(part) if isinstance(part, str) else ImagePart(path=part) for part in listed)
        messages.append(Message(role, made))
    return Sample(sample_id, tuple(messages), SourceRef(Path("test.jsonl"), 1))
