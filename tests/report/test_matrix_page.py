"""The page of the table of cards and models."""

from __future__ import annotations

from pathlib import Path

from plan_pages import matrix_json
from report_page import Page

from eightgig.app.reporting import write_matrix_page
from eightgig.report.matrix_page import render_matrix


def test_each_cell_stands_in_the_row_of_its_model_and_the_order_of_the_cards() -> None:
    page = Page(render_matrix(matrix_json()))
    assert page.open_tags == []
    text = page.text("matrix")
    assert "model parameters RTX 4060 RTX 3070 A100 80GB SXM memory of the card 8.00 GiB 8.00 GiB 80.00 GiB" in text
    assert "llava-1.5-7b 7.06 B 512 ×0.10 2,048 2,048 ×1.00" in text
    assert "llava-1.5-13b 13.3 B – – 2,048" in text


def test_a_cell_tells_its_bytes_and_how_long_it_goes() -> None:
    cells = [
        cell
        for cell in Page(render_matrix(matrix_json())).attributes("td")
        if (cell.get("class") or "").startswith("fit")
    ]
    assert [cell["class"] for cell in cells] == ["fit-2", "fit-4", "fit-4", "fit-0", "fit-0", "fit-4"]
    assert cells[0]["title"] == "llava-1.5-7b on RTX 4060: 9.00 GiB at 512 tokens; 150 tokens/s at 512"
    assert cells[3]["title"] == "llava-1.5-13b on RTX 4060: 9.00 GiB at 256 tokens"


def test_without_speeds_none_are_spoken_of() -> None:
    matrix = matrix_json()
    matrix["cells"] = [cell | {"tokens_per_s": None, "relative_speed": None} for cell in matrix["cells"]]
    text = Page(render_matrix(matrix)).text("matrix")
    assert "×" not in text
    assert "speed" not in text
    assert "estimated speed at 512 tokens" in Page(render_matrix(matrix_json())).text("matrix")


def test_what_is_left_out_is_named_and_the_file_is_whole(tmp_path: Path) -> None:
    path = write_matrix_page(tmp_path / "matrix.html", matrix_json())
    page = Page(path.read_text(encoding="utf-8"))
    assert "qwen-vl: no <processor>" in page.text("matrix")
    assert {"script", "link", "img"}.isdisjoint(tag for tag, _ in page.tags)
    matrix = matrix_json() | {"left_out": []}
    assert "Left out" not in Page(render_matrix(matrix)).text("matrix")
