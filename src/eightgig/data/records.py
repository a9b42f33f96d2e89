"""Reading the records of a JSON, JSONL or CSV file. What the content is decides, not the file's suffix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.core.errors import DataError
from eightgig.data.formats.record import shown
from eightgig.data.quarantine import ProblemCode, SampleProblem


@dataclass(frozen=True)
class Record:
    """One record of a file: its place (see `SourceRef.line`), and its fields or why there are none."""

    line: int
    value: dict[str, Any] | SampleProblem


def decode_text(content: bytes, path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises DataError for another encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}"
            + (" (it begins like UTF-16)" if utf16 else ""),
            expected="a text file in UTF-8",
            next_step=f"convert it, e.g. iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 {path.name} > utf8.jsonl",
        ) from error


def read_json_records(text: str, path: Path) -> list[Record]:
    """The records of a JSON list, of `{"data": [...]}`, or of a file with one JSON object a line.

    Raises:
        DataError: a JSON list that is broken somewhere, so that none of its records is certain.
    """
    if text.lstrip()[:1] == "[":
        return [_record(position, item) for position, item in enumerate(_whole_json(text, path), start=1)]
    wrapped = _wrapped_list(text)
    if wrapped is not None:
        return [_record(position, item) for position, item in enumerate(wrapped, start=1)]
    return list(_json_lines(text))


def read_csv_records(text: str, path: Path) -> list[Record]:
    """The rows of a CSV file with a header line; empty cells become empty texts. Raises DataError."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [
            Record(reader.line_num, {key: value for key, value in row.items() if key is not None}) for row in reader
        ]
    except csv.Error as error:
        line = reader.reader.line_num  # the one of DictReader itself still counts the rows before
        raise DataError(
            f"{path}: line {line} is not CSV: {error}",
            expected="comma-separated values with a header line, texts with commas or line breaks in double quotes",
            next_step=f"correct line {line} of {path}",
        ) from error


def _record(line: int, item: Any) -> Record:
    if isinstance(item, dict):
        return Record(line, item)
    return Record(line, SampleProblem(ProblemCode.WRONG_SHAPE, f"a record must be a JSON object, not {shown(item)}"))


def _whole_json(text: str, path: Path) -> list[Any]:
    try:
        value: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            expected="a complete JSON list of records, or one record a line (JSONL)",
            next_step=f"correct line {error.lineno}, or write the file again if it was cut off",
        ) from error
    return value


def _wrapped_list(text: str) -> list[Any] | None:
    """The list of a file that is one object around `data`, None for any other file."""
    if '"data"' not in text[:1000]:
        return None  # spares parsing a large JSONL file as a whole
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None  # one record a line: each line is judged by itself
    items = value.get("data")
    return items if isinstance(items, list) else None


def _json_lines(text: str) -> Iterator[Record]:
    # Not str.splitlines: it also splits at U+2028 and its like, which JSON allows inside a text.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            item = json.loads(content)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON: column {error.colno}: {error.msg}"
            yield Record(line, SampleProblem(ProblemCode.BAD_JSON, reason))
            continue
        yield _record(line, item)
