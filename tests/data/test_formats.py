"""The record shapes: the same conversation read from each, and what each refuses."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from eightgig.data.formats import detect_format
from eightgig.data.formats.flat import DEFAULT_QUESTION
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart, Message, TextPart

ROOT = Path("/data/set")
A, B = ImagePart(path=ROOT / "a.png"), ImagePart(path=ROOT / "sub/b.png")


def parse(record: dict[str, Any], root: Path = ROOT) -> tuple[Message, ...]:
    shape = detect_format(record)
    assert shape is not None
    return shape.parse(record, root)


def exchange(*parts: TextPart | ImagePart, answer: str = "A cat.") -> tuple[Message, ...]:
    return (Message("user", parts), Message("assistant", (TextPart(answer),)))


ONE_IMAGE = {
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A cat. "}],
    },
    "llava, list": {
        "image": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}],
    },
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "openai responses": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}]},
        ]
    },
    "hugging face, image": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ]
    },
    "hugging face, path": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "hugging face, url that is a path": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "url": "./a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "images column": {
        "images": [{"bytes": None, "path": "a.png"}],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
    },
    "images column, markers in the text": {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
    },
    "flat": {"image": "a.png", "question": "What?", "answer": "A cat."},
    "flat, file URL": {"image": f"file://{ROOT}/a.png", "question": "What?", "answer": "A cat."},
    "flat, absolute": {"image": str(ROOT / "a.png"), "question": "What?", "answer": "A cat."},
}


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_every_shape_gives_the_same_conversation(name: str) -> None:
    assert parse(ONE_IMAGE[name]) == exchange(A, TextPart("What?"))


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        (ONE_IMAGE["llava"], "LLaVA"),
        (ONE_IMAGE["openai"], "chat messages"),
        (ONE_IMAGE["flat"], "flat"),
        ({"image": "a.png", "caption": "A cat."}, "flat"),
        ({"image": "a.png", "text": "A cat."}, "flat"),
        ({"question": "1+1?", "answer": "2"}, "flat"),
    ],
)
def test_shapes_are_told_apart(record: dict[str, Any], shape: str) -> None:
    found = detect_format(record)
    assert found is not None
    assert found.name == shape


@pytest.mark.parametrize(
    "record", [{}, {"prompt": "x", "completion": "y"}, {"text": "no image"}, {"conversations": "x"}]
)
def test_unknown_shapes_have_no_format(record: dict[str, Any]) -> None:
    assert detect_format(record) is None


def test_several_images_keep_their_order_and_place() -> None:
    record = {
        "image": ["a.png", "sub/b.png"],
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "First <image> then <image> ?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    system = Message("system", (TextPart("Be short."),))
    assert parse(record) == (system, *exchange(TextPart("First"), A, TextPart("then"), B, TextPart("?")))


def test_images_are_counted_over_all_turns() -> None:
    turns = [
        {"from": "human", "value": "<image>One?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Two?<image>"},
        {"from": "gpt", "value": "A dog."},
    ]
    messages = parse({"image": ["a.png", "sub/b.png"], "conversations": turns})
    assert [part for message in messages for part in message.parts if isinstance(part, ImagePart)] == [A, B]
    assert messages[2].parts == (TextPart("Two?"), B)


def test_no_image_is_fine() -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    for record in ({"conversations": turns}, {"question": "What?", "answer": "A cat."}):
        assert parse(record) == exchange(TextPart("What?"))


def test_markers_are_plain_text_where_no_image_could_stand() -> None:
    chat = {"messages": [{"role": "user", "content": "Is <image> HTML?"}, {"role": "assistant", "content": "A cat."}]}
    assert parse(chat) == exchange(TextPart("Is <image> HTML?"))
    flat = {"image": "a.png", "question": "Is <image> HTML?", "answer": "Yes: <image>"}
    assert parse(flat) == exchange(A, TextPart("Is <image> HTML?"), answer="Yes: <image>")
    llava = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>Tag?"}, {"from": "gpt", "value": "It is <image>."}],
    }
    assert parse(llava) == exchange(A, TextPart("Tag?"), answer="It is <image>.")


@pytest.mark.parametrize("key", ["caption", "text"])
def test_a_caption_answers_the_default_question(key: str) -> None:
    assert DEFAULT_QUESTION == "Describe the image."
    assert parse({"image": "a.png", key: "A cat."}) == exchange(A, TextPart("Describe the image."))


def test_numbers_are_written_out() -> None:
    messages = parse({"image": "a.png", "question": "How many?", "answer": 7})
    assert messages[1].text == "7"
    assert parse({"image": "a.png", "question": "How much?", "answer": 0.5})[1].text == "0.5"


def test_several_texts_of_an_answer_become_one() -> None:
    content = [{"type": "text", "text": "A cat."}, {"type": "text", "text": "And a dog."}]
    messages = parse({"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": content}]})
    assert messages[1].parts == (TextPart("A cat.\nAnd a dog."),)


def test_an_empty_system_text_is_left_out() -> None:
    turns = [
        {"from": "system", "value": " "},
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "A cat."},
    ]
    assert parse({"conversations": turns}) == exchange(TextPart("What?"))


@pytest.mark.parametrize("key", ["image_url", "base64"])
def test_base64_images_are_decoded(key: str) -> None:
    content = bytes(range(256))
    text = base64.b64encode(content).decode()
    url = f"data:image/png;base64,{text[:100]}\n{text[100:]}"
    part: dict[str, Any] = {"type": "image", "base64": text}
    if key == "image_url":
        part = {"type": "image_url", "image_url": {"url": url}}
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]}
    assert parse(record) == exchange(ImagePart(data=content))


def chat(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}, {"role": "assistant", "content": "Yes."}]}


def llava(*values: str, image: Any = None, roles: tuple[str, ...] = ("human", "gpt")) -> dict[str, Any]:
    turns = [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)]
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


@pytest.mark.parametrize(
    ("record", "code", "reason"),
    [
        (llava("<image>Q", "A", image="http://x.org/a.png"), ProblemCode.REMOTE_IMAGE, "download it first"),
        (
            chat([{"type": "image_url", "image_url": {"url": "HTTPS://x.org/a.png"}}]),
            ProblemCode.REMOTE_IMAGE,
            "HTTPS://x.org/a.png is on the network",
        ),
        (llava("<image>Q", "A", image="../a.png"), ProblemCode.PATH_OUTSIDE_ROOT, "../a.png leaves /data/set"),
        (llava("<image>Q", "A", image="x/../../set2/a.png"), ProblemCode.PATH_OUTSIDE_ROOT, "leaves /data/set"),
        (llava("<image>Q", "A", image=7), ProblemCode.BAD_FIELD, "must be a path, not 7"),
        (
            {"image": {"bytes": "xx"}, "caption": "A"},
            ProblemCode.BAD_FIELD,
            "must be a path, not {'bytes': 'xx'}",
        ),
        (
            chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}]),
            ProblemCode.BAD_BASE64,
            "can't be decoded",
        ),
        (
            chat([{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}]),
            ProblemCode.BAD_BASE64,
            "not a base64 data URL",
        ),
        (chat([{"type": "image", "base64": 5}]), ProblemCode.BAD_BASE64, "must be text, not 5"),
        (llava("Q", "A", image="a.png"), ProblemCode.PLACEHOLDER_MISMATCH, "0 image placeholders in the text, but 1"),
        (llava("<image><image>Q", "A", image="a.png"), ProblemCode.PLACEHOLDER_MISMATCH, "2 image placeholders"),
        (llava("<image>Q", "A"), ProblemCode.PLACEHOLDER_MISMATCH, "1 image placeholders in the text, but 0 images"),
        (chat([{"type": "image"}, {"type": "text", "text": "Q"}]), ProblemCode.PLACEHOLDER_MISMATCH, "but 0 images"),
        ({"images": ["a.png"], **chat("Q")}, ProblemCode.PLACEHOLDER_MISMATCH, "0 image placeholders"),
        (llava("Q", "A", roles=("human", "bot")), ProblemCode.UNKNOWN_ROLE, "unknown role 'bot'; known are system"),
        (chat("Q", role="tool"), ProblemCode.UNKNOWN_ROLE, "unknown role 'tool'"),
        ({"messages": [{"content": "Q"}]}, ProblemCode.UNKNOWN_ROLE, "unknown role None"),
        (llava("Q", "  \n"), ProblemCode.EMPTY_ANSWER, "an assistant's turn is empty"),
        ({"image": "a.png", "question": "Q", "answer": None}, ProblemCode.EMPTY_ANSWER, "is empty"),
        ({"image": "a.png", "caption": ""}, ProblemCode.EMPTY_ANSWER, "is empty"),
        (llava("", "A"), ProblemCode.EMPTY_MESSAGE, "neither text nor image"),
        ({"question": "", "answer": "A"}, ProblemCode.BAD_FIELD, "nothing is asked"),
        (llava("Q", "Q", roles=("human", "human")), ProblemCode.NO_SUPERVISED_TOKEN, "no assistant's turn"),
        ({"messages": []}, ProblemCode.NO_SUPERVISED_TOKEN, "no assistant's turn"),
        ({"conversations": ["Q"]}, ProblemCode.BAD_FIELD, "a turn must be an object, not 'Q'"),
        ({"messages": ["Q"]}, ProblemCode.BAD_FIELD, "a message must be an object"),
        (chat({"text": "Q"}), ProblemCode.BAD_FIELD, "content must be text, not {'text': 'Q'}"),
        (chat([{"type": "video", "video": "a.mp4"}]), ProblemCode.BAD_FIELD, "neither text nor image"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "path": "a.png"}]}]},
            ProblemCode.IMAGE_IN_ANSWER,
            "holds an image",
        ),
        ({"image": "a.png", "question": "Q", "answer": ["A"]}, ProblemCode.BAD_FIELD, "answer must be text, not ['A']"),
        ({"image": "a.png", "question": "Q", "answer": True}, ProblemCode.BAD_FIELD, "answer must be text, not True"),
    ],
)
def test_what_each_shape_refuses(record: dict[str, Any], code: ProblemCode, reason: str) -> None:
    with pytest.raises(SampleProblem) as caught:
        parse(record)
    assert caught.value.code == code
    assert reason in caught.value.reason
