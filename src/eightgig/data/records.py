"""Reading the records of a JSON, JSONL or CSV file. What the content is decides, not the file's suffix.

A line that can't be used is a record with a reason, never the end of the file: one damaged line among a million is set
aside like any other bad sample. Lines longer than `MAX_LINE_BYTES` are passed over piece by piece, so that no line is
held whole in memory that is longer.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eightgig.core.errors import DataError
from eightgig.data.formats.record import shown
from eightgig.data.quarantine import ProblemCode, SampleProblem

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: a record with some pictures in base64 has tens of megabytes at most."""

MAX_DEPTH = 64
"""Levels of lists and objects in a record; every shape has five or six."""

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_HEAD_BYTES = 1000  # what is looked at to tell how a file is laid out
_SKIPPED_BYTES = 1 << 20  # held at one time of a line that is passed over
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a pair of them is one character in Python


@dataclass(frozen=True)
class Record:
    """One record of a file: its place (see `SourceRef.line`), and its fields or why there are none."""

    line: int
    value: dict[str, Any] | SampleProblem


def read_records(path: Path) -> list[Record]:
    """The records of `path`: rows of a `.csv` with a header, a JSON list, `{"data": [...]}`, or one JSON object a line.

    Raises:
        DataError: the file is in UTF-16; or it is a JSON list or CSV and broken somewhere, so that none of its records
            is certain.
        OSError: the system can't read it.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        if head.startswith(_UTF16_MARKS):
            raise _not_utf8(path, f"not UTF-8: byte 0x{head[0]:02x} at offset 0 (it begins like UTF-16)", "UTF-16")
        stream.seek(len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0)
        if path.suffix.lower() == ".csv":
            return _csv_records(stream, path)
        start = head.removeprefix(_UTF8_MARK).lstrip()
        if start.startswith(b"[") or (start.startswith(b"{") and b'"data"' in start):
            first = stream.tell()
            listed = _listed(stream.read(), path)
            if listed is not None:
                return [_record(position, item) for position, item in enumerate(listed, start=1)]
            stream.seek(first)
        return list(_json_lines(stream))


def encoding_error(path: Path, records: list[Record]) -> DataError | None:
    """The error of a file whose first record is in another encoding; None where that is not what ails it."""
    problem = next((record.value for record in records if isinstance(record.value, SampleProblem)), None)
    is_encoding = problem is not None and problem.code is ProblemCode.BAD_ENCODING
    return _not_utf8(path, problem.reason, "LATIN1") if problem is not None and is_encoding else None


def decode_utf8(content: bytes, where: str) -> str:
    """`content` as text, without a byte order mark; `where` tells what it is, as in "line 7". Raises SampleProblem."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} of {where}"
        raise SampleProblem(ProblemCode.BAD_ENCODING, reason) from error


def parse_json(text: str) -> Any:
    """The value of `text`. Raises SampleProblem with what is wrong and where."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise SampleProblem(ProblemCode.BAD_JSON, f"not valid JSON: column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # Python refuses to make a number of thousands of digits
        raise SampleProblem(ProblemCode.BAD_JSON, f"not usable JSON: {error}") from error


class _Ambiguous(dict[str, Any]):
    """An object that names a key twice: which of the two values is meant, nobody can tell."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Ambiguous(made)


def _record(line: int, item: Any) -> Record:
    try:
        if not isinstance(item, dict):
            reason = f"a record must be a JSON object, not {_shown_start(item)}"
            raise SampleProblem(ProblemCode.WRONG_SHAPE, reason)
        _refuse_odd(item)
    except SampleProblem as problem:
        return Record(line, problem)
    return Record(line, item)


def _shown_start(item: Any) -> str:
    """`item` as it is quoted; what is nested so deeply that Python can't write it out, by its kind."""
    try:
        return shown(item)
    except RecursionError:
        return f"a {type(item).__name__} nested too deeply to be shown"


def _refuse_odd(record: dict[str, Any]) -> None:
    """Raise SampleProblem for what JSON lets through and nothing behind can use."""
    waiting: list[tuple[Any, int]] = [(record, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, str):
            if not value.isascii() and _LONE_SURROGATE.search(value):
                reason = "a text holds half of a surrogate pair, which is no character: it was cut in the middle of one"
                raise SampleProblem(ProblemCode.BAD_JSON, reason)
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise _too_deep()
            if isinstance(value, _Ambiguous):
                raise SampleProblem(ProblemCode.BAD_JSON, "an object names the same key twice")
            inside = (each for pair in value.items() for each in pair) if isinstance(value, dict) else value
            waiting.extend((each, depth + 1) for each in inside)


def _too_deep() -> SampleProblem:
    return SampleProblem(ProblemCode.BAD_JSON, f"more than {MAX_DEPTH} lists and objects within each other")


def _listed(content: bytes, path: Path) -> list[Any] | None:
    """The items of a file that is one JSON list, or one object around `data`; None where it is one record a line."""
    is_list = content.lstrip()[:1] == b"["
    try:
        value = json.loads(decode_utf8(content, "the file"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        # Behind a first line that is complete there are more: each line is judged by itself.
        if not is_list or error.msg == "Extra data":
            return None
        raise DataError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            expected="a complete JSON list of records, or one record a line (JSONL)",
            next_step=f"correct line {error.lineno}, or write the file again if it was cut off",
        ) from error
    except SampleProblem as problem:
        if not is_list:
            return None
        raise _not_utf8(path, problem.reason, "LATIN1") from problem
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        if not is_list:
            return None
        raise DataError(
            f"{path} can't be read as JSON: {error}",
            expected="a JSON list of records in one of the known shapes",
            next_step="write it with one record a line (JSONL), so that only the record at fault is set aside",
        ) from error
    items = value if is_list else value.get("data")
    return items if isinstance(items, list) else None


def _json_lines(stream: BinaryIO) -> Iterator[Record]:
    # Bytes are split at line feeds alone: text is also split at U+2028 and its like, which JSON allows inside a text.
    for number, line in _lines(stream):
        if line is None:
            reason = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
            yield Record(number, SampleProblem(ProblemCode.TOO_LARGE, reason))
            continue
        try:
            text = decode_utf8(line, f"line {number}")
            if text.strip():
                yield _record(number, parse_json(text.rstrip("\n")))
        except SampleProblem as problem:
            yield Record(number, problem)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number from 1; None for one that is too long, of which no more than a piece is ever held."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        is_too_long = len(line) > MAX_LINE_BYTES
        while line and is_too_long and not line.endswith(b"\n"):
            line = stream.readline(_SKIPPED_BYTES)
        yield number, None if is_too_long else line


def _csv_records(stream: BinaryIO, path: Path) -> list[Record]:
    """The rows of a CSV file with a header line; empty cells become empty texts. Raises DataError."""
    reader = csv.DictReader(_csv_lines(stream, path), strict=True)
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


def _csv_lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    """The lines of a CSV file as text. Raises DataError: rows reach over lines, so that none is certain behind it."""
    for number, line in _lines(stream):
        if line is None:
            raise DataError(
                f"{path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes",
                expected="comma-separated values with a header line",
                next_step=f"correct line {number} of {path}",
            )
        try:
            yield decode_utf8(line, f"line {number}")
        except SampleProblem as problem:
            raise _not_utf8(path, problem.reason, "LATIN1") from problem


def _not_utf8(path: Path, reason: str, encoding: str) -> DataError:
    return DataError(
        f"{path} is {reason}",
        expected="a text file in UTF-8",
        next_step=f"convert it, e.g. iconv -f {encoding} -t UTF-8 {path.name} > utf8.jsonl",
    )
