"""Samples that can't be used are set aside with a reason; they don't end the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from eightgig.core.files import write_text
from eightgig.data.sample import SourceRef


class ProblemCode(StrEnum):
    """Why a sample can't be used; stable names for scripts that read `quarantine.jsonl`."""

    BAD_JSON = "bad_json"
    BAD_ENCODING = "bad_encoding"
    TOO_LARGE = "too_large"
    WRONG_SHAPE = "wrong_shape"
    BAD_FIELD = "bad_field"
    UNKNOWN_ROLE = "unknown_role"
    EMPTY_ANSWER = "empty_answer"
    EMPTY_MESSAGE = "empty_message"
    IMAGE_IN_ANSWER = "image_in_answer"
    PLACEHOLDER_MISMATCH = "placeholder_mismatch"
    REMOTE_IMAGE = "remote_image"
    PATH_OUTSIDE_ROOT = "path_outside_root"
    BAD_BASE64 = "bad_base64"
    MISSING_CAPTION = "missing_caption"
    MISSING_FILE = "missing_file"
    NOT_AN_IMAGE = "not_an_image"
    BROKEN_IMAGE = "broken_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    UNUSABLE_SHAPE = "unusable_shape"
    UNSUPPORTED_MODE = "unsupported_mode"
    NO_SUPERVISED_TOKEN = "no_supervised_token"
    TOO_LONG = "too_long"
    TEMPLATE_MISMATCH = "template_mismatch"
    SPECIAL_TOKEN = "special_token"


class SampleProblem(Exception):
    """One sample can't be used; whoever reads samples in bulk catches this and sets the sample aside."""

    def __init__(self, code: ProblemCode, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"{code}: {reason}")


@dataclass(frozen=True)
class QuarantineRecord:
    """One line of `quarantine.jsonl`."""

    file: str
    line: int
    sample_id: str
    reason: str
    code: ProblemCode

    @property
    def where(self) -> str:
        """File and line as an editor takes them."""
        return f"{self.file}:{self.line}" if self.line else self.file


def commonest(records: Sequence[QuarantineRecord], num_codes: int) -> list[tuple[ProblemCode, int, QuarantineRecord]]:
    """The commonest codes among `records`: code, how many, and the first such record."""
    first = {record.code: record for record in reversed(records)}
    counts = Counter(record.code for record in records)
    return [(code, count, first[code]) for code, count in counts.most_common(num_codes)]


class Quarantine:
    """The samples of one run that were set aside. `path` is where `write` puts them, one JSON record a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[QuarantineRecord] = []

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[QuarantineRecord, ...]:
        """Everything set aside so far, in order."""
        return tuple(self._records)

    def add(self, source: SourceRef, sample_id: str, problem: SampleProblem) -> None:
        """Set one sample aside."""
        self._records.append(
            QuarantineRecord(
                file=str(source.file), line=source.line, sample_id=sample_id, reason=problem.reason, code=problem.code
            )
        )

    def write(self) -> Path:
        """Write all records to `path`, whole or not at all; no record gives an empty file, so that none is stale."""
        lines = (json.dumps(asdict(record), ensure_ascii=False) for record in self._records)
        write_text(self.path, "".join(f"{line}\n" for line in lines))
        return self.path
