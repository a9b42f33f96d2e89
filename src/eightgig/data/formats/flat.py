"""The flat shape: one question and answer, or one caption, a record; also the rows of a folder's metadata file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightgig.data.formats.record import RecordFormat, finished_messages, image_part, image_references, text_of
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import Message, TextPart

DEFAULT_QUESTION = "Describe the image."
"""What a caption answers when its record asks nothing."""

_IMAGE_KEYS = ("image", "images", "file_name")
_CAPTION_KEYS = ("caption", "text")


def _matches(record: Mapping[str, Any]) -> bool:
    if "answer" in record and "question" in record:
        return True
    return any(key in record for key in _IMAGE_KEYS) and any(key in record for key in (*_CAPTION_KEYS, "answer"))


def _parse(record: Mapping[str, Any], root: Path) -> tuple[Message, ...]:
    field = next((record[key] for key in _IMAGE_KEYS if key in record), None)
    images = [image_part(reference, root) for reference in image_references(field)]
    question = text_of(record.get("question"), "question").strip()
    if "answer" in record:
        answer = text_of(record["answer"], "answer")
    else:
        answer = next((text_of(record[key], key) for key in _CAPTION_KEYS if key in record), "")
    if not question:
        if not images:
            raise SampleProblem(ProblemCode.BAD_FIELD, "neither a question nor an image: nothing is asked")
        question = DEFAULT_QUESTION
    return finished_messages([("user", [*images, TextPart(question)]), ("assistant", [TextPart(answer)])])


FORMAT = RecordFormat(
    name="flat",
    keys='"image" (or "file_name") with "question" and "answer", or with "caption" or "text"',
    matches=_matches,
    parse=_parse,
)
