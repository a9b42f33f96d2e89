"""The report says what the records say, escapes what comes from data, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_page import Page
from report_run_folders import (
    CONFIG,
    MEMORY,
    RECEIPT,
    RUN,
    VERIFICATION,
    draw_bars,
    step_record,
    validation_record,
    write_jsonl,
    write_run,
)

from eightgig.report.html import render_report
from eightgig.report.records import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete run folder."""
    return write_run(tmp_path / "run")


def render(folder: Path) -> Page:
    """The parsed report of the run in `folder`."""
    return Page(render_report(read_run(folder)))


def rewrite(folder: Path, name: str, content: Any) -> None:
    """Put other JSON into a file of the run."""
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_the_page_is_well_formed_and_says_every_headline_number(folder: Path) -> None:
    page = render(folder)
    assert page.open_tags == []
    top = page.text()
    for said in (
        "llava-1.5-7b",
        "QLoRA on NVIDIA GeForce RTX 4060 · 6,400 training and 200 validation samples",
        "started 2026-11-24 06:00:00 UTC",
        RUN["command"],
        "0 % → 87.5 % of 8 validation samples answered in words",
        f"{step_record(1)['loss']:.4g} → {step_record(200)['loss']:.4g} validation loss 2.69 → 0.2288",
        "30 min 34 s 200 of 200 steps",
        "3,516 tokens/s 3.52 images/s, 0.5 % waiting for data",
        "20 M 0.283 % of 7.06 B",
        "5.22 GiB 5.40 GiB reserved by PyTorch, 1.96 GiB RAM",
        "torch 2.13.0",
    ):
        assert said in top


def test_the_receipt_tells_what_is_4_bit(folder: Path) -> None:
    text = render(folder).text("receipt")
    assert "Yes: 6.48 B of 6.8 B parameters (95.2 %) are stored in 4 bits." in text
    assert "language linears 224 × Linear4bit 6.48 B – uint8 ✓ yes 12.06 GiB 3.11 GiB" in text
    assert "adapters 448 × Linear 20 M 20 M float32 no 38.12 MiB 76.25 MiB" in text
    assert "vision tower 197 × Conv2d, LayerNorm, Linear 304 M – bfloat16 no 578.89 MiB 578.89 MiB" in text
    assert "total 6.8 B 20 M 12.67 GiB 3.75 GiB" in text
    assert "Asked for: nf4 with double quantisation in the language model's linear layers, 16-bit elsewhere." in text


def test_the_receipt_tells_what_a_tower_in_4_bits_changes(folder: Path) -> None:
    assert "vision tower is in 4 bits" not in render(folder).text("receipt")
    difference = {"num_images": 8, "mean_relative_error": 0.0312, "worst_relative_error": 0.047}
    told = {"tower_difference": difference | {"mean_cosine": 0.99951, "worst_cosine": 0.99889}}
    rewrite(folder, "receipt.json", RECEIPT | told)
    said = "its features differ from those in 16 bits by 3.12 % on average and 4.70 % at worst"
    assert said in render(folder).text("receipt")


def test_the_receipt_of_a_16_bit_model_says_no(folder: Path) -> None:
    totals = {"num_parameters": 5000, "num_trainable": 0, "rows": RECEIPT["rows"][-1:]}
    rewrite(folder, "receipt.json", RECEIPT | totals)
    assert "No: all 5,000 parameters are stored in 16 bits or more." in render(folder).text("receipt")


def test_memory_adds_up_and_shows_bytes_and_share(folder: Path) -> None:
    page = render(folder)
    text = page.text("memory")
    sizes = MEMORY["categories"]
    total = sum(sizes.values())
    for name, size in sizes.items():
        assert re.search(rf"{re.escape(name)} {size:,} ", text)
    assert f"{100 * sizes['4-bit weights'] / total:.1f} %" in text
    assert f"total {total:,}" in text
    assert "on a card with 8.00 GiB" in text
    widths = [float(rect["width"] or 0) for rect in page.attributes("rect") if "part-1" in (rect["class"] or "")]
    assert widths[0] == pytest.approx(1000 * sizes["4-bit weights"] / RUN["device"]["total_bytes"], abs=0.01)


def test_memory_on_the_cpu_names_the_rest_of_the_process(folder: Path) -> None:
    rewrite(folder, "run.json", RUN | {"device": {"name": "cpu", "type": "cpu", "total_bytes": None}})
    rewrite(
        folder, "memory.json", {"categories": {"4-bit weights": 300, "adapters": 100}, "host_peak_rss_bytes": 1_000_000}
    )
    page = render(folder)
    assert "activations, data, libraries and all else 999,600" in page.text("memory")
    assert "Peak memory 976.56 KiB RAM of the process" in page.text()


def test_curves_are_drawn_from_the_records(folder: Path) -> None:
    page = render(folder)
    lines = [line for line in page.attributes("polyline") if (line["points"] or "").count(" ") > 2]
    per_chart = {"line raw": 200, "line train": 200, "line validation": 5}
    for line in lines[:3]:
        assert len((line["points"] or "").split()) == per_chart[line["class"] or ""]
    titles = page.text("curves")
    for name in ("training, mean of 8 steps", "validation", "optimizer step", "loss per target token (nats)"):
        assert name in titles
    assert "Learning rate" in titles
    assert "Lowest validation loss: 0.2287 at step 200" in titles


def test_exact_match_is_drawn_on_the_whole_scale(folder: Path) -> None:
    rows = [validation_record(step, exact_match=0.0) for step in (0, 1)]
    write_jsonl(folder / "metrics.jsonl", [step_record(1), *rows])
    page = render(folder)
    assert "% optimizer step 0 50 100 0 1" in page.text("curves")


def test_pictures_stand_with_question_and_answers(folder: Path) -> None:
    page = render(folder)
    images = page.attributes("img")
    assert len(images) == 8
    encoded = (images[0]["src"] or "").removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (256, 192))
    text = page.text("pictures")
    right = "How tall is bar 1? expected 3 before training a blue circle ✗ wrong after training 3 ✓ right"
    wrong = "expected 8 before training a blue circle ✗ wrong after training a blue circle ✗ wrong"
    assert right in text
    assert wrong in text


def test_no_more_pictures_than_fit_and_the_rest_is_counted(folder: Path) -> None:
    draw_bars(folder / "one.png", [3])
    rows = [
        {"step": 1, "sample_id": f"s{i}", "images": [str(folder / "one.png")] * 2, "question": "q", "expected": "e"}
        | {"answer": "a", "correct": False}
        for i in range(30)
    ]
    write_jsonl(folder / "generations.jsonl", rows)
    page = render(folder)
    assert len(page.attributes("img")) == 24
    assert "18 more are in generations.jsonl" in page.text("pictures")


def test_what_comes_from_data_is_escaped(folder: Path) -> None:
    evil = "<script>alert('x')</script><img src=http://evil.example/x>"
    row = {"step": 0, "sample_id": evil, "images": [evil], "question": evil, "expected": evil, "answer": evil}
    write_jsonl(folder / "generations.jsonl", [row | {"correct": False}])
    quarantined = {"file": evil, "line": 1, "sample_id": evil, "reason": evil, "code": evil}
    write_jsonl(folder / "quarantine.jsonl", [quarantined])
    rewrite(folder, "config.json", CONFIG | {"model": {"name": evil}})
    rewrite(folder, "run.json", RUN | {"command": evil})
    rewrite(folder, "verification.json", VERIFICATION | {"how": evil})
    page = render(folder)
    assert page.attributes("script") == []
    assert page.attributes("img") == []
    for section in ("pictures", "data", "settings", "verification", ""):
        assert evil in page.text(section)


def test_nothing_is_fetched_from_anywhere(folder: Path) -> None:
    html = render_report(read_run(folder))
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in html
    assert "url(" not in html
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert len(html.encode()) < 5_000_000


def test_settings_say_where_they_came_from(folder: Path) -> None:
    text = render(folder).text("settings")
    assert "lora.rank 8 preset ultra_low_memory" in text
    assert "data_path charts/train.jsonl file charts.yaml" in text
    assert "seed 42 default" in text
    assert "gradient_checkpointing yes" in text
    assert "val_path none" in text


def test_quarantine_is_summed_up_by_reason(folder: Path) -> None:
    text = render(folder).text("data")
    assert "Quarantined: 3 · prompts cut: 2 · answers cut: 0" in text
    assert "image_missing 2 empty_answer 1" in text
    assert "charts/train.jsonl:17 chart-0 images/91.png does not exist" in text


@pytest.mark.parametrize(("ok", "said"), [(True, "✓ Yes."), (False, "✗ No.")])
def test_verification_says_its_numbers(folder: Path, ok: bool, said: str) -> None:
    rewrite(folder, "verification.json", VERIFICATION | {"ok": ok})
    text = render(folder).text("verification")
    assert said in text
    assert "Largest difference of a logit 0.0125, relative 0.00072 (allowed: 0.02)" in text
    assert "without the adapter the relative difference is 0.41" in text


def test_a_full_model_has_no_adapter_to_leave_out(folder: Path) -> None:
    rewrite(folder, "verification.json", VERIFICATION | {"adapter_effect": None})
    assert "without the adapter" not in render(folder).text("verification")


@pytest.mark.parametrize(
    ("missing", "section", "said"),
    [
        ("metrics.jsonl", "curves", "No training step has been recorded"),
        ("generations.jsonl", "pictures", "No answers were generated"),
        ("receipt.json", "receipt", "there is no receipt"),
        ("memory.json", "memory", "has not recorded its memory"),
        ("verification.json", "verification", "Not checked"),
        ("quarantine.jsonl", "data", "Quarantined: 0"),
        ("sources.json", "settings", "lora.rank 8"),
        ("chart-3.png", "pictures", "not readable any more"),
        ("checkpoints/best.json", "curves", "optimizer step"),
    ],
)
def test_a_missing_part_is_said_and_the_rest_stands(folder: Path, missing: str, section: str, said: str) -> None:
    (folder / missing).unlink()
    page = render(folder)
    assert said in page.text(section)
    assert "llava-1.5-7b" in page.text()
    assert page.open_tags == []


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    rewrite(tmp_path, "run.json", {"status": "failed", "reason": "the GPU ran out of memory"})
    rewrite(tmp_path, "config.json", CONFIG)
    page = render(tmp_path)
    assert "the GPU ran out of memory" in page.text()
    assert "failed QLoRA on an unknown device" in page.text()
    assert "→" not in page.text(), "no number was measured, so none is shown"


def test_the_reason_of_an_earlier_failure_is_not_told_of_a_run_that_finished(folder: Path) -> None:
    rewrite(folder, "run.json", RUN | {"reason": "the GPU ran out of memory"})
    assert "ran out of memory" not in render(folder).text()


def test_half_a_line_and_a_precision_note_are_said_on_top(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"kind": "st')
    note = "bf16 was asked for, but this card has none; computing in fp16"
    rewrite(folder, "run.json", RUN | {"precision": {"note": note}})
    text = render(folder).text()
    assert "The last line of metrics.jsonl (line 206) was cut off in writing and is left out." in text
    assert note in text


def test_a_loss_that_is_not_finite_is_called_so(folder: Path) -> None:
    write_jsonl(folder / "metrics.jsonl", [step_record(1), step_record(2) | {"loss": float("nan")}])
    assert f"{step_record(1)['loss']:.4g} → not finite step 1 to step 2" in render(folder).text()
