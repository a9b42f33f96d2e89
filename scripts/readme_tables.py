#!/usr/bin/env python3
"""Fill the tables of README.md, README.zh-CN.md and pages of docs/reference from the code and from
`benchmarks/results/*.json`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `presets` and `models` come from the code, those in
PLANNED from the record of planned runs; any other NAME from the records whose `name` is NAME or begins with `NAME-`
(`figure_rows` tells what becomes a row). A test fails where a page differs from what this script writes.

usage: python scripts/readme_tables.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from eightgig import registry
from eightgig.cli.plan_matrix import card_rows, model_rows
from eightgig.config import ConfigPresets
from eightgig.config.values import shown
from eightgig.core.units import MIB, format_bytes, format_duration
from eightgig.report.wording import format_count, format_share

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    "README.md": False,
    "README.zh-CN.md": True,
    "docs/reference/plan_accuracy.md": False,
    "docs/reference/cards.md": False,
    "docs/reference/levers.md": False,
}
"""Pages with tables -> whether they are in Chinese."""
MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

CHINESE = {
    "preset": "预设",
    "for cards of": "适用显存",
    "method": "方法",
    "rank": "秩",
    "batch": "批大小",
    "text tokens": "文本 token 数",
    "image size": "图像边长",
    "the model's own": "模型自身",
    "model": "模型",
    "weights from": "权重来源",
    "in the package": "随包附带",
    "licence": "许可证",
    "parameters": "参数量",
    "image tokens": "图像 token 数",
    "not measured yet": "尚未测量",
    "device": "设备",
    "date": "日期",
    "seed": "种子",
    "before": "训练前",
    "after": "训练后",
    "images": "图像数",
    "training": "训练时间",
    "steps": "步数",
    "peak allocated": "峰值已分配显存",
    "peak reserved": "峰值保留显存",
    "peak RAM": "峰值内存",
    "speed": "速度",
    "trainer": "训练器",
    "precision": "精度",
    "tokens a step": "每步 token 数",
    "device used": "显卡占用",
    "run": "运行",
    "tokens at once": "一次处理的 token 数",
    "error of allocated": "已分配误差",
    "error of reserved": "保留误差",
    "error of device used": "显卡占用误差",
    "runs": "运行组",
    "allocated within 1 %": "已分配误差 1 % 以内",
    "reserved within 3 %": "保留误差 3 % 以内",
    "device used within 3 % or 100 MiB": "显卡占用误差 3 % 或 100 MiB 以内",
    "worst": "最差",
    "first blind runs, planned before they were measured": "第一批盲测，测量之前规划",
    "second blind runs, planned before they were measured": "第二批盲测，测量之前规划",
    "all, planned with today's code": "全部，用当前代码规划",
}
"""What the tables say in English -> in Chinese. Every English word of a table must stand here."""


@dataclass(frozen=True)
class Column:
    """A figure of the records that a table shows: its key, its heading, and how its values are written."""

    key: str
    heading: str

    def written(self, value: Any) -> str:
        """`value` as its key's unit says."""
        if value is None:
            return "–"
        if self.key.startswith("exact_match"):
            return format_share(value)
        if self.key.endswith("_gib"):
            return f"{value:.2f} GiB"
        if self.key.endswith("_bytes"):
            return format_bytes(value)
        if self.key.endswith("tokens_per_s"):
            return f"{value:,.0f} tokens/s"
        if self.key.endswith("_s"):
            return format_duration(value)
        return f"{value:,}" if isinstance(value, int) else f"`{value}`"


COLUMNS = (
    Column("model", "model"),
    Column("precision", "precision"),
    Column("trainer", "trainer"),
    Column("seed", "seed"),
    Column("exact_match_before", "before"),
    Column("exact_match_after", "after"),
    Column("num_images", "images"),
    Column("num_steps", "steps"),
    Column("num_tokens_a_step", "tokens a step"),
    Column("train_s", "training"),
    Column("peak_allocated_gib", "peak allocated"),
    Column("peak_reserved_gib", "peak reserved"),
    Column("device_used_gib", "device used"),
    Column("host_peak_rss_bytes", "peak RAM"),
    Column("tokens_per_s", "speed"),
)
"""Figures that tables show, in their order; a table has those that any of its rows has."""


def fill(text: str, *, chinese: bool) -> str:
    """`text` of a README with every table between its marks made anew."""

    def replaced(match: re.Match[str]) -> str:
        rows = table_rows(match[2])
        said = [[_translated(cell) for cell in row] for row in rows] if chinese else rows
        return f"{match[1]}{_markdown(said)}{match[3]}"

    return MARKED.sub(replaced, text)


def table_rows(name: str) -> list[list[str]]:
    """Heading and rows of the table `name`, in English."""
    if name == "presets":
        return _preset_rows()
    if name == "models":
        return _model_rows()
    if name in PLANNED:
        return PLANNED[name](_record("planned_runs"))
    if name == "longest_texts":
        return longest_rows(_record("longest_texts"))
    if name == "lever_prices":
        return lever_rows(read_records(name))
    if name == "levers_8gb":
        return capped_rows(_record(name)["figures"])
    if name in CARD_TABLES:
        return [list(row) for row in CARD_TABLES[name](_record("card_table")["figures"])]
    return record_rows(read_records(name))


def _record(name: str) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def read_records(name: str) -> list[Mapping[str, Any]]:
    """The records of table `name`, by the names of their files."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [record for record in records if re.fullmatch(rf"{re.escape(name)}(-.*)?", record.get("name", ""))]


def record_rows(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A table of what the records measured; one cell that says so where nothing is measured yet."""
    rows = [(record, row) for record in records for row in figure_rows(record["figures"])]
    if not rows:
        return [["not measured yet"]]
    shown = [column for column in COLUMNS if any(column.key in row for _, row in rows)]
    heading = [*(column.heading for column in shown), "device", "date"]
    return [
        heading,
        *(
            [
                *(column.written(row.get(column.key)) for column in shown),
                f"`{record['device']['name']}`",
                record["date"],
            ]
            for record, row in rows
        ),
    ]


def figure_rows(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that the figures of one record make: those of a list (of seeds, of rounds), those of two or more sides
    that were measured (`{"tokens_per_s": {"eightgig": 1, "peer": 2}}`), or a single one.
    """
    known = {column.key for column in COLUMNS}
    for value in figures.values():
        if isinstance(value, list) and all(isinstance(row, Mapping) and known & row.keys() for row in value):
            return value
    by_side = {key: value for key, value in figures.items() if key in known and isinstance(value, Mapping)}
    sides = dict.fromkeys(side for values in by_side.values() for side in values)
    if not sides:
        return [figures]
    return [{"trainer": side} | {key: values.get(side) for key, values in by_side.items()} for side in sides]


def _preset_rows() -> list[list[str]]:
    rows = [["preset", "for cards of", "method", "rank", "batch", "text tokens", "image size"]]
    for name in ConfigPresets.names():
        config = getattr(ConfigPresets, name)()
        training = config.training
        rows.append(
            [
                f"`{name}`",
                f"{ConfigPresets.card(name).card_gib} GB",
                f"`{training.method.value}`",
                "–" if training.lora is None else str(training.lora.rank),
                f"{training.batch_size} × {training.gradient_accumulation_steps}",
                str(config.data.max_length),
                "the model's own" if config.data.image_size is None else f"{config.data.image_size} px",
            ]
        )
    return rows


def _model_rows() -> list[list[str]]:
    rows = [["model", "weights from", "licence", "parameters", "image size", "image tokens"]]
    for spec in registry.all_specs():
        facts = spec.facts
        full_px, half_px = facts.image_px, facts.image_px // 2
        num_image_tokens, num_at_half = (
            spec.family.num_image_tokens(facts, None, width_px=px, height_px=px) for px in (full_px, half_px)
        )
        upper_bound = "" if num_at_half == num_image_tokens else "≤ "  # images of any size, up to this area
        rows.append(
            [
                f"`{facts.name}`",
                "in the package" if facts.hub_id is None else f"`{facts.hub_id}`",
                f"`{facts.licence}`",
                format_count(facts.num_parameters or _count_parameters(Path(spec.location))),
                f"{upper_bound}{full_px} px",
                f"{upper_bound}{num_image_tokens}",
            ]
        )
    return rows


def summary_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """How many planned runs are within the bars, and the worst error of each kind."""
    bars = record["figures"]["bars"]
    device_mib = bars["device_bytes"] // MIB
    rows = [
        [
            "runs",
            f"allocated within {100 * bars['allocated']:g} %",
            "worst",
            f"reserved within {100 * bars['reserved']:g} %",
            "worst",
            f"device used within {100 * bars['device']:g} % or {device_mib} MiB",
            "worst",
        ]
    ]
    for key, label in SUMMARIES.items():
        told = record["figures"][key]
        cells = (_close_and_worst(told, kind) for kind in KINDS)
        rows.append([label, *(cell for pair in cells for cell in pair)])
    return rows


def worst_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The run with the worst error of each kind, by its name."""
    rows = [["runs", "figure", "within the bar", "worst error", "of run"]]
    for key, label in SUMMARIES.items():
        told = record["figures"][key]
        rows += [[label, KINDS[kind], *_close_and_worst(told, kind), f"`{told[kind]['worst_run']}`"] for kind in KINDS]
    return rows


def blind_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The blind runs: what they took, and how far off the plan was that was made before."""
    errors = [heading for label in KINDS.values() for heading in (label, f"error of {label.removeprefix('peak ')}")]
    rows = [["run", "tokens at once", *errors]]
    for run in _planned_runs(record, "blind_again"):
        cells = [f"`{run['name']}`", f"{run['num_tokens']:,}"]
        for kind in KINDS:
            cells += [format_bytes(run["measured"][f"{kind}_bytes"]), _error(run["before"], kind)]
        rows.append(cells)
    return rows


def compared_rows(record: Mapping[str, Any], part: str) -> list[list[str]]:
    """Each run with its settings: measured, planned with today's code, the errors; of blind ones those before too."""
    is_blind = part != "built"
    heading = ["run", "model", "settings", "tokens at once"]
    for label in KINDS.values():
        heading += [label, "planned", "error", *(["error before"] if is_blind else [])]
    rows = [heading]
    for run in _planned_runs(record, part):
        cells = [f"`{run['name']}`", f"`{run['model']}`", settings_in_words(run), f"{run['num_tokens']:,}"]
        for kind in KINDS:
            cells += [format_bytes(side[f"{kind}_bytes"]) for side in (run["measured"], run["planned"])]
            cells += [_error(run, kind), *([_error(run["before"], kind)] if is_blind else [])]
        rows.append(cells)
    return rows


def longest_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """What came of the longest text that is said to fit under a cap, and of one 5 % longer."""
    longer = f"text of {record['conditions']['longer']:g} × that"
    rows = [["model", "cap", "longest text said to fit", "it", longer, "it"]]
    for pair in record["figures"]["pairs"]:
        cells = [f"`{pair['model']}`", f"{pair['cap_gib']:g} GiB"]
        for run in (pair["longest_run"], pair["longer_run"]):
            cells += [f"{run['tokens']:,} tokens", _came_through(run)]
        rows.append(cells)
    return rows


def _came_through(run: Mapping[str, Any]) -> str:
    if run["ran"]:
        return f"ran, {format_bytes(run['reserved_bytes'])} reserved"
    return "ran out of memory" if run["ran_out_of_memory"] else "failed"


def capped_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Runs with levers under a cap, and without, beside a peer's in the same call; those that came to their end."""
    head = ["run", "tokens", "cap", "levers", "planned", "reserved", "counted", "step", "tokens/s", "moved a step"]
    rows = [head]
    for row in (row for row in figures["runs"] if "step_s" in row):
        plan = row["planned"]
        cap_gib = plan["cap_gib"]
        rows.append(
            [
                f"`{plan['model']}`",
                f"{plan['tokens']:,}",
                "–" if cap_gib is None else f"{cap_gib:g} GiB",
                ", ".join(f"`{name}={shown(value)}`" for name, value in plan["levers"].items()),
                format_bytes(plan["reserved_bytes"]),
                format_bytes(row["reserved_bytes"]),
                format_bytes(row["counted_bytes"]),
                f"{row['step_s']:.2f} s",
                f"{row['tokens_per_s']:,.0f}",
                format_bytes(row["moved_bytes"]),
            ]
        )
    for row in (row for row in figures["peers"] if row.get("ok")):
        cells = [
            row["fw"].capitalize() + f" (`{row['ckpt']}`)",
            f"{row['seq']:,}",
            f"{row['cap']:g} GiB",
            "",
            "",
        ]
        reserved = f"{row['peak_reserved_GiB']:.2f} GiB"
        rows.append([*cells, reserved, "", f"{row['step_s']:.2f} s", f"{row['tok_s']:,}", ""])
    return rows


def lever_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What each lever saves and costs; one cell that says so where nothing is measured yet."""
    if not records:
        return [["not measured yet"]]
    rows = [["model", "lever", "against", "saves", "of", "costs a step", "of", "moved a step"]]
    for row in (row for record in records for row in record["figures"]["levers"]):
        if row["without"] is None:
            continue
        of_bytes, of_s = row["allocated_bytes"] + row["saves_bytes"], row["step_s"] - row["costs_s"]
        cells = [f"`{row['model']}`", row["lever"], row["without"]]
        cells += [format_bytes(row["saves_bytes"]), format_bytes(of_bytes), f"{row['costs_s']:+.3f} s", f"{of_s:.3f} s"]
        rows.append([*cells, format_bytes(row["moved_bytes"])])
    return rows


def source_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Where each part of the record comes from: machine, versions, commit, day."""
    sources = {**record["conditions"]["measured"], **record["conditions"]["before"], "planned_runs.json": record}
    packages = list(record["versions"])
    rows = [["record", "on", "date", "commit", *packages]]
    for name, source in sources.items():
        on = f"{source['device']['name']}{', no GPU' if source['device']['type'] == 'cpu' else ''}"
        versions = (source["versions"].get(package) or "–" for package in packages)
        rows.append([f"`{name}`", on, source["date"], f"`{source['commit'][:7]}`", *versions])
    return rows


def settings_in_words(run: Mapping[str, Any]) -> str:
    """What differs from the default settings, or from the run's preset."""
    words = [SETTINGS[path](value) for path, value in run["settings"].items()]
    if run["mixes_lengths"]:
        words.append("texts of mixed lengths")
    if run["preset"] is not None:
        words.append(f"else preset `{run['preset']}`")
    return ", ".join(words) or "the defaults"


def _planned_runs(record: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    return [run for run in record["figures"]["runs"] if run["part"] == part]


def _close_and_worst(told: Mapping[str, Any], kind: str) -> tuple[str, str]:
    return f"{told[kind]['num_close']}/{told['num_runs']}", f"`{told[kind]['worst_error']:+.2%}`"


def _error(said: Mapping[str, Any], kind: str) -> str:
    return f"`{said['errors'][kind]:+.2%}`"


KINDS = {"allocated": "peak allocated", "reserved": "peak reserved", "device": "device used"}
SUMMARIES = {
    "blind_before": "first blind runs, planned before they were measured",
    "blind_again_before": "second blind runs, planned before they were measured",
    "all_now": "all, planned with today's code",
}
PLANNED: Mapping[str, Callable[[Mapping[str, Any]], list[list[str]]]] = {
    "planned_summary": summary_rows,
    "planned_worst": worst_rows,
    "planned_blind": blind_rows,
    "planned_again_compared": lambda record: compared_rows(record, "blind_again"),
    "planned_blind_compared": lambda record: compared_rows(record, "blind"),
    "planned_built_compared": lambda record: compared_rows(record, "built"),
    "planned_sources": source_rows,
}
"""Tables of `benchmarks/results/planned_runs.json`, which `benchmarks/planned_runs.py` writes."""
CARD_TABLES: Mapping[str, Callable[[Mapping[str, Any]], Sequence[Sequence[str]]]] = {
    "cards_lengths": model_rows,
    "cards_speeds": card_rows,
}
"""Tables of `benchmarks/results/card_table.json`, which `benchmarks/card_table.py` writes."""
METHODS = {"full": "every weight", "lora": "LoRA on 16-bit weights", "qlora": "QLoRA"}
SETTINGS: Mapping[str, Callable[[Any], str]] = {
    "data.max_length": lambda value: f"{value:,} text tokens",
    "data.image_size": lambda value: f"{value} px",
    "training.batch_size": lambda value: f"batch {value}",
    "training.gradient_accumulation_steps": lambda value: f"{value} accumulated",
    "training.lora.rank": lambda value: f"rank {value}",
    "training.lora.dropout": lambda value: f"dropout {value:g}",
    "training.lora.target_modules": lambda _: "adapters in the vision tower too",
    "training.method": lambda value: METHODS[value],
    "training.optimizer": lambda value: f"`{value}`",
    "hardware.gradient_checkpointing": lambda value: f"{'' if value else 'no '}checkpointing",
    "hardware.mixed_precision": lambda value: f"{value}",
}
"""The settings in which planned runs differ, in words."""


def _count_parameters(folder: Path) -> int:
    """The parameters in the safetensors files of `folder`, by their headers."""
    counts = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            counts += [math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
    return sum(counts)


def _translated(cell: str) -> str:
    """`cell` in Chinese; code, numbers and dates stay."""
    return cell if re.fullmatch(r"`[^`]*`|[\d–≤].*", cell) else CHINESE[cell]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) == 1:
        return f"*{rows[0][0]}*\n"
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def main() -> None:
    """Fill all pages."""
    for name, chinese in PAGES.items():
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8"), chinese=chinese), encoding="utf-8")


if __name__ == "__main__":
    main()
