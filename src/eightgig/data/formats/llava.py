"""The shape of LLaVA's own data: `image` and `conversations`, with `<image>` where each image stands.

Source: docs/Finetune_Custom_Data.md of haotian-liu/LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.data.formats.record import (
    RecordFormat,
    check_num_markers,
    finished_messages,
    image_part,
    image_references,
    marked_parts,
    role_of,
    shown,
    text_of,
)
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart, Message, Role, TextPart


def _matches(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("conversations"), list)


def _parse(record: Mapping[str, Any], root: Path) -> tuple[Message, ...]:
    references = image_references(record.get("image", record.get("images")))
    images = [image_part(reference, root) for reference in references]
    turns: list[tuple[Role, Sequence[TextPart | ImagePart]]] = []
    num_markers = 0
    for turn in record["conversations"]:
        if not isinstance(turn, Mapping):
            raise SampleProblem(ProblemCode.BAD_FIELD, f"a turn must be an object, not {shown(turn)}")
        role = role_of(turn.get("from", turn.get("role")))
        text = text_of(turn.get("value", turn.get("content")), "a turn's value")
        if role == "assistant":  # what an answer spells is text: an image can only be asked about
            turns.append((role, [TextPart(text)]))
            continue
        parts, num_in_turn = marked_parts(text, images[num_markers:])
        num_markers += num_in_turn
        turns.append((role, parts))
    check_num_markers(num_markers, len(images))
    return finished_messages(turns)


FORMAT = RecordFormat(
    name="LLaVA", keys='"image" and "conversations" (with "from" and "value")', matches=_matches, parse=_parse
)
