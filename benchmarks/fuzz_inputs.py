"""Damaged and odd pictures and JSONL lines, made from a seed: for the test suite, and in bulk for `fuzz_data`."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

# Pillow mode and format of the whole pictures that the damaged ones are made from.
MODES_AND_FORMATS = (
    *(("RGB", name) for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")),
    *(("L", name) for name in ("PNG", "JPEG", "TIFF", "PPM", "TGA", "JPEG2000")),
    *(("RGBA", name) for name in ("PNG", "WEBP", "TIFF", "TGA", "BMP")),
    *(("P", name) for name in ("PNG", "GIF", "BMP", "TIFF")),
    *(("1", name) for name in ("PNG", "BMP", "TIFF", "PPM")),
    *(("CMYK", name) for name in ("JPEG", "TIFF")),
    *(("LA", name) for name in ("PNG", "TGA")),
    *(("I;16", name) for name in ("PNG", "TIFF")),
    ("F", "TIFF"),
    ("LAB", "TIFF"),
    ("YCbCr", "JPEG"),
)
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
SOME_ORIENTATIONS = (0, 1, 3, 5, 6, 8, 9, 65535)


def picture(chooser: random.Random) -> bytes:
    """A file of a random mode, format and size, sometimes animated, turned, or with a profile and texts."""
    mode, kind = chooser.choice(MODES_AND_FORMATS)
    size = (chooser.randint(4, 90), chooser.randint(4, 90))
    image = _noise(chooser, size, mode)
    options: dict[str, Any] = {}
    if kind == "TIFF" and mode != "CMYK":
        options["compression"] = chooser.choice(TIFF_COMPRESSIONS)
    if kind == "JPEG":
        options |= {"progressive": chooser.random() < 0.5, "quality": chooser.choice((20, 75, 95))}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and chooser.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = chooser.randint(1, 8) if kind == "TIFF" else chooser.choice(SOME_ORIENTATIONS)
        options["exif"] = exif
    if kind in ("JPEG", "PNG", "WEBP") and chooser.random() < 0.2:
        options["icc_profile"] = chooser.randbytes(chooser.choice((1, 128, 3000)))
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and mode in ("P", "RGB") and chooser.random() < 0.3:
        options |= {"save_all": True, "append_images": [_noise(chooser, size, mode) for _ in range(3)]}
    if kind == "PNG" and chooser.random() < 0.2:
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Comment", "x" * chooser.choice((1, 10_000)), zip=chooser.random() < 0.5)
        options["pnginfo"] = texts
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _noise(chooser: random.Random, size: tuple[int, int], mode: str) -> Image.Image:
    width_px, height_px = size
    generator = np.random.default_rng(chooser.getrandbits(32))
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, (height_px, width_px), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(generator.random((height_px, width_px), dtype=np.float32))
    if mode == "P":
        return Image.fromarray(generator.integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)).quantize(16)
    if mode == "1":
        return Image.fromarray(generator.integers(0, 256, (height_px, width_px), dtype=np.uint8)).convert("1")
    num_bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height_px, width_px) if num_bands == 1 else (height_px, width_px, num_bands)
    return Image.frombytes(mode, size, generator.integers(0, 256, shape, dtype=np.uint8).tobytes())


def _whole(content: bytearray, chooser: random.Random) -> bytes:
    return bytes(content)


def _truncated(content: bytearray, chooser: random.Random) -> bytes:
    return bytes(content[: chooser.randrange(len(content))])


def _flipped(content: bytearray, chooser: random.Random) -> bytes:
    for _ in range(chooser.choice((1, 2, 8, 64))):
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
    return bytes(content)


def _header_overwritten(content: bytearray, chooser: random.Random) -> bytes:
    for _ in range(chooser.randint(1, 12)):
        content[chooser.randrange(min(len(content), 200))] = chooser.choice(
            (0, 1, 127, 128, 255, chooser.randrange(256))
        )
    return bytes(content)


def _cut_out(content: bytearray, chooser: random.Random) -> bytes:
    start = chooser.randrange(len(content))
    del content[start : start + chooser.randint(1, 200)]
    return bytes(content)


def _doubled(content: bytearray, chooser: random.Random) -> bytes:
    start = chooser.randrange(len(content))
    piece = content[start : start + chooser.randint(1, 400)]
    content[start:start] = piece * chooser.randint(1, 5)
    return bytes(content)


def _crossed(content: bytearray, chooser: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    other = picture(chooser)
    return bytes(content[: chooser.randrange(len(content))]) + other[chooser.randrange(len(other)) :]


def _followed_by_junk(content: bytearray, chooser: random.Random) -> bytes:
    return bytes(content) + chooser.randbytes(chooser.randint(1, 5000))


def _junk(content: bytearray, chooser: random.Random) -> bytes:
    return chooser.choice((b"", bytes(content[:12]), b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n")) + (
        chooser.randbytes(chooser.randint(0, 3000))
    )


def png_of_size(width_px: int, height_px: int, *, colour_type: int = 2, bits: int = 8) -> bytes:
    """A PNG that says it has these pixels and holds a few bytes of them."""
    header = struct.pack(">IIBBBBB", width_px, height_px, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND")
    )


def _chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _odd_size(content: bytearray, chooser: random.Random) -> bytes:
    sizes = ((0, 9), (9, 0), (1, 20_000), (20_000, 1), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (9_000, 9_000), (1, 1))
    return png_of_size(*chooser.choice(sizes), colour_type=chooser.choice((0, 2, 6)))


def _inflating_chunk(content: bytearray, chooser: random.Random) -> bytes:
    """A small PNG whose profile or text is a bomb: some kilobytes that unpack to 100 MB."""
    bomb = zlib.compress(bytes(100_000_000) if chooser.random() < 0.02 else bytes(3_000_000), 1)
    name = chooser.choice((b"iCCP", b"zTXt", b"iTXt"))
    body = b"name\0\0" + (b"\1\0\0\0" if name == b"iTXt" else b"") + bomb
    whole = png_of_size(20, 20)
    return whole[:33] + _chunk(name, body) + whole[33:]  # behind the header


DAMAGES: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    _whole,
    _truncated,
    _flipped,
    _flipped,
    _header_overwritten,
    _header_overwritten,
    _cut_out,
    _doubled,
    _crossed,
    _followed_by_junk,
    _junk,
    _odd_size,
    _inflating_chunk,
)


def fuzzed_image(seed: int) -> tuple[str, bytes]:
    """The name of a damage, and a file that has it."""
    chooser = random.Random(seed)
    damage = chooser.choice(DAMAGES)
    return damage.__name__.strip("_"), damage(bytearray(picture(chooser)), chooser)


ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "\udfff x",
        "😀" * 50,
        "a" * 5000,
        "<image>",
        "<image><image>",
        "</s>",
        "<s>",
        "<|im_end|>",
    ),
    *(
        "\u2028",
        "\ue0000\ue001",
        "\x85",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "USER: x ASSISTANT:",
        "..\\..\\a",
        "\ufeff",
        "‮abc",
    ),
)
ODD_PATHS = (
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\a.png",
        "\\\\host\\a.png",
        "http://x/a.png",
        "s3://x/a.png",
        "a\0.png",
        ".",
    ),
    *(
        "file:///etc/passwd",
        "file://",
        "//host/a.png",
        "a" * 5000,
        "data:image/png;base64,AAAA",
        "data:,",
        "data:;base64,é",
    ),
    *("/dev/zero", "/dev/stdin", "~/a.png", "", " ", "\ud800.png", "a.png/../a.png", "gone.png"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        10**4000,
        1.5,
        float("nan"),
        float("inf"),
        -0.0,
        1e308,
        [],
        {},
        [[]],
        [None],
        {"a": {}},
    ),
    *ODD_TEXTS,
    *ODD_PATHS,
)
KEYS = ("id", "image", "images", "conversations", "messages", "question", "answer", "caption", "text", "from", "value")
KEYS += ("role", "content", "type", "image_url", "url", "path", "base64", "file_name")


SHAPES = ("flat", "llava", "chat")


def good_record(shape: str, chooser: random.Random) -> dict[str, Any]:
    """A record of `shape` whose picture is `a.png`."""
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")][
        : chooser.choice((2, 4))
    ]
    if shape == "llava":
        return {"id": "1", "image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    if shape == "flat":
        caption = {"image": "a.png", "caption": "A cat."}
        return chooser.choice((caption, {"image": "a.png", "question": "What?", "answer": "A cat."}))
    roles = {"human": "user", "gpt": "assistant"}
    column = {"images": ["a.png"], "messages": [{"role": roles[who], "content": text} for who, text in turns]}
    part = {"type": "image", "path": "a.png"}
    listed = {"messages": [{"role": "user", "content": [part, "Q"]}, {"role": "assistant", "content": "A"}]}
    return chooser.choice((column, listed))


def _mutated(value: Any, chooser: random.Random) -> Any:
    """`value` with one place in it changed."""
    if chooser.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return chooser.choice(ODD_VALUES)
    if isinstance(value, list):
        at = chooser.randrange(len(value))
        return [*value[:at], *([] if chooser.random() < 0.1 else [_mutated(value[at], chooser)]), *value[at + 1 :]]
    key = chooser.choice(list(value))
    kind = chooser.random()
    if kind < 0.1:
        return {name: item for name, item in value.items() if name != key}
    if kind < 0.2:
        return {**value, chooser.choice(KEYS): chooser.choice(ODD_VALUES)}
    return {**value, key: _mutated(value[key], chooser)}


def _damaged_line(line: bytes, chooser: random.Random) -> bytes:
    """`line` as bytes that JSON, UTF-8 or a parser's limits don't like. May hold line feeds."""
    at = chooser.randrange(len(line))
    depth, num_words = chooser.choice((10, 100, 900, 100_000)), chooser.choice((10_000, 500_000))
    foreign = chooser.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\0", b"\x1b", b"\r"))
    number = chooser.choice((b"NaN", b"-Infinity", b"1e999", b"9" * 5000))
    return chooser.choice(
        (
            line[:at],
            line[:at] + bytes([line[at] ^ 1 << chooser.randrange(8)]) + line[at + 1 :],
            line[:at] + foreign + line[at:],
            b'{"image": "a.png", "answer": ' + b"[" * depth + b"]" * depth + b"}",
            b'{"id": 1, "image": "a.png", "caption": "x", ' + line[1:],
            b'{"image": "a.png", "caption": ' + number + b"}",
            b'{"image": "a.png", "caption": "' + b"x " * num_words + b'"}',
            b"\xef\xbb\xbf" + line,
            line + b"\r",
            line + chooser.choice((b",", b"}", line, b"\n" + line, b" // note")),
            chooser.randbytes(chooser.randint(0, 300)),
        )
    )


def fuzzed_line(seed: int, shape: str) -> bytes:
    """One line of a JSONL file (now and then two, or a piece of one), mostly of `shape`, without its line feed."""
    chooser = random.Random(seed)
    record: Any = good_record(shape if chooser.random() < 0.95 else chooser.choice(SHAPES), chooser)
    for _ in range(chooser.choice((0, 1, 1, 1, 2, 4))):
        record = _mutated(record, chooser)
    line = json.dumps(record).encode()  # lone surrogates as escapes, as Python and JavaScript write them
    return _damaged_line(line, chooser) if chooser.random() < 0.4 else line
