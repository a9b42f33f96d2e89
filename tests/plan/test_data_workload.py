"""What the user's data makes of a run, beside every sample encoded in full."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_image, write_jsonl
from tests.tiny_families.qwen2_vl import TINY
from tests.tiny_family import build_tiny_family

from eightgig.config import Batching, TrainingConfig
from eightgig.core.errors import DataError
from eightgig.data.grouping import Grouping
from eightgig.data.order import StepOrder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sample import Sample
from eightgig.data.sets import read_data
from eightgig.plan import data_workload
from eightgig.plan.data_workload import MOST_IMAGE_TOKENS, MOST_TOKENS, DataWorkloads, data_workloads
from eightgig.plan.workload import Workload, build_encoder, workload_sizes
from eightgig.registry import resolve
from eightgig.train.datasets import check_data
from eightgig.train.events import SilentListener
from eightgig.train.run_folder import RunFolder

IMAGE_TOKEN_ID = 303  # of the tiny Qwen2-VL, whose image tokens depend on the image's size
Record = dict[str, Any]
Settings = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_family(TINY[0], tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> Settings:
    """Settings of a run on `tmp_path/train.jsonl`; keyword arguments are settings of `data`."""

    def make(batch_size: int = 1, accumulation: int = 2, **data: Any) -> TrainingConfig:
        return TrainingConfig.model_validate(
            {
                "model": {"name": str(model)},
                "data": {"data_path": str(tmp_path / "train.jsonl"), "max_length": 400, **data},
                "training": {"batch_size": batch_size, "gradient_accumulation_steps": accumulation},
                "validation": {"num_generated": 1, "max_samples": 50},
            }
        )

    return make


def random_records(folder: Path, seed: int, num_samples: int = 24) -> list[Record]:
    """Texts of 1 to 200 letters, images of 16 to 64 px a side; a sixth of the samples without an image."""
    chooser = random.Random(seed)
    records = []
    for index in range(num_samples):
        record: Record = {"question": "What is it?", "answer": "a" * chooser.randint(1, 200)}
        if chooser.random() > 1 / 6:
            size = (chooser.randint(16, 64), chooser.randint(16, 64))
            write_image(folder / f"{index}.png", size=size, seed=index)
            record["image"] = f"{index}.png"
        records.append(record)
    return records


def workloads_of(config: TrainingConfig, folder: Path) -> DataWorkloads:
    read = read_data(config.data, Quarantine(folder / "plan-quarantine.jsonl"))
    return data_workloads(config, resolve(config.model.name), read)


def encoded_tokens(config: TrainingConfig, samples: tuple[Sample, ...]) -> list[tuple[int, int]]:
    """All tokens and image tokens of each sample, counted in what the model would get."""
    encoder, _ = build_encoder(config, resolve(config.model.name))
    encoded = [encoder.encode(sample).input_ids for sample in samples]
    return [(len(ids), int((ids == IMAGE_TOKEN_ID).sum())) for ids in encoded]


def lines_of(work: Workload) -> set[int]:
    return {sample.source.line for sample in work.samples}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_largest_batch_is_that_of_all_samples_encoded(
    seed: int, batch_size: int, settings: Settings, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", random_records(tmp_path, seed))
    config = settings(batch_size, max_length=120)
    found = workloads_of(config, tmp_path)
    read = read_data(config.data, Quarantine(tmp_path / "q.jsonl"))
    tokens = encoded_tokens(config, read.train.samples)
    work = found.largest[MOST_TOKENS]
    most = sorted((num for num, _ in tokens), reverse=True)[:batch_size]
    assert work.batch.num_tokens == sum(most)
    assert work.batch.model_inputs["input_ids"].shape == (batch_size, most[0])
    sizes = workload_sizes(work)
    assert sizes["num_image_tokens"] == int((work.batch.model_inputs["input_ids"] == IMAGE_TOKEN_ID).sum())
    assert sizes["num_text_tokens"] + sizes["num_image_tokens"] == sum(most)
    most_image = sum(sorted((num for _, num in tokens), reverse=True)[:batch_size])
    if MOST_IMAGE_TOKENS in found.largest:
        assert workload_sizes(found.largest[MOST_IMAGE_TOKENS])["num_image_tokens"] == most_image
        assert most_image > sizes["num_image_tokens"]
    else:
        assert most_image == sizes["num_image_tokens"]


def test_a_long_text_and_a_large_image_are_two_candidates(settings: Settings, tmp_path: Path) -> None:
    write_image(tmp_path / "large.png", size=(64, 64))
    write_image(tmp_path / "small.png", size=(16, 16))
    records = [{"image": "small.png", "question": "q", "answer": "a"} for _ in range(6)]
    records[2] |= {"answer": "a" * 300}
    records[4] |= {"image": "large.png"}
    write_jsonl(tmp_path / "train.jsonl", records)
    found = workloads_of(settings(), tmp_path)
    assert {reason: lines_of(work) for reason, work in found.largest.items()} == {
        MOST_TOKENS: {3},
        MOST_IMAGE_TOKENS: {5},
    }
    assert found.facts.notes == ()


@pytest.mark.parametrize("with_validation_file", [False, True])
def test_samples_and_steps_are_those_of_training(
    with_validation_file: bool, settings: Settings, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", random_records(tmp_path, seed=5, num_samples=21))
    write_jsonl(tmp_path / "val.jsonl", random_records(tmp_path, seed=6, num_samples=4))
    paths = {"val_path": str(tmp_path / "val.jsonl")} if with_validation_file else {"val_fraction": 0.2}
    config = settings(batch_size=2, accumulation=3, **paths)
    folder = RunFolder(tmp_path / "run")
    spec = resolve(config.model.name)
    encoder, _ = build_encoder(config, spec)
    trained = check_data(
        read_data(config.data, Quarantine(folder.quarantine)), config, encoder, folder, SilentListener()
    )
    facts = workloads_of(config, tmp_path).facts
    assert (facts.num_train_samples, facts.num_validation_samples) == (len(trained.train), len(trained.validation))
    assert facts.steps_an_epoch == -(-len(trained.train) // 6)
    tokens = [num for num, _ in encoded_tokens(config, tuple(trained.train))]
    assert facts.mean_tokens == pytest.approx(sum(tokens) / len(tokens))
    assert facts.max_tokens == max(tokens)


def test_a_validation_sample_may_be_the_largest(settings: Settings, tmp_path: Path) -> None:
    records = [{"question": "q", "answer": "a"} for _ in range(4)]
    write_jsonl(tmp_path / "train.jsonl", records)
    write_jsonl(tmp_path / "val.jsonl", [records[0], {"question": "q", "answer": "a" * 90}])
    found = workloads_of(settings(val_path=str(tmp_path / "val.jsonl")), tmp_path)
    assert [str(sample.source) for sample in found.largest[MOST_TOKENS].samples] == [f"{tmp_path / 'val.jsonl'}:2"]
    assert found.facts.max_tokens < found.largest[MOST_TOKENS].batch.num_tokens


def test_the_usual_batch_is_as_long_as_the_mean_one_is_padded(settings: Settings, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "a" * length} for length in range(1, 101)])
    mean_of_one = workloads_of(settings(1, val_fraction=0), tmp_path)
    tokens = sorted(num for num, _ in encoded_tokens(settings(), read_all(settings(), tmp_path)))
    assert abs(mean_of_one.usual.batch.num_tokens - sum(tokens) / 100) <= 1
    # The longest of 4 even numbers of 1 to 100 is 80.8 in the mean: 4/5 of the way.
    of_four = workloads_of(settings(4, val_fraction=0), tmp_path)
    longest = of_four.usual.batch.model_inputs["input_ids"].shape[1]
    assert abs(longest - (tokens[0] + 80.8 - 1)) < 6


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_that_samples_share(batch_size: int, settings: Settings, tmp_path: Path) -> None:
    """The planned row is as long as the longest samples together, and no row of an epoch has more images; the usual one
    is an epoch's, in tokens nearest to the mean."""
    write_jsonl(tmp_path / "train.jsonl", random_records(tmp_path, seed=8, num_samples=30))
    config = settings(batch_size, 4, val_fraction=0, max_length=120)
    packed = config.model_copy(update={"training": config.training.model_copy(update={"batching": Batching.PACKED})})
    plain, found = workloads_of(config, tmp_path), workloads_of(packed, tmp_path)
    samples = read_all(config, tmp_path)
    lengths = [num for num, _ in encoded_tokens(config, samples)]
    order = StepOrder(30, batch_size, 4, config.seed, Grouping(Batching.PACKED, batch_size, lengths))
    rows = [row for step in range(order.steps_per_epoch) for row in order.micro_batches(step)]
    longest = sum(sorted(lengths)[-batch_size:])
    most_images = max(sum(len(samples[index].images) for index in row) for row in rows)
    for reason, work in found.largest.items():
        assert work.batch.num_computed_tokens == longest
        assert work.batch.num_images >= most_images
        assert work.validation is not None
        assert lines_of(work.validation) == lines_of(plain.largest[reason])
    tokens = [sum(lengths[index] for index in row) for row in rows]
    mean_tokens = sum(tokens) / len(tokens)
    assert found.usual.num_micro_batches == len(rows) / order.steps_per_epoch
    nearest = min(abs(each - mean_tokens) for each in tokens)
    assert abs(found.usual.batch.num_computed_tokens - mean_tokens) == pytest.approx(nearest)


def test_samples_of_nearly_equal_length_pad_less(settings: Settings, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "a" * length} for length in range(1, 101)])
    config = settings(4, 25, val_fraction=0)
    training = config.training.model_copy(update={"batching": Batching.BY_LENGTH})
    by_length = config.model_copy(update={"training": training})
    tokens = sorted(num for num, _ in encoded_tokens(config, read_all(config, tmp_path)))
    usual = workloads_of(by_length, tmp_path).usual.batch.model_inputs["input_ids"].shape[1]
    assert abs(usual - sum(tokens[3::4]) / 25) <= 3
    assert workloads_of(config, tmp_path).usual.batch.model_inputs["input_ids"].shape[1] > usual + 20


def read_all(config: TrainingConfig, folder: Path) -> tuple[Sample, ...]:
    return read_data(config.data, Quarantine(folder / "q.jsonl")).train.samples


def test_bad_data_ends_as_training_does(settings: Settings, tmp_path: Path) -> None:
    records = random_records(tmp_path, seed=1, num_samples=6)
    (tmp_path / "cut.png").write_bytes(write_image(tmp_path / "whole.png").read_bytes()[:60])
    records += [{"image": "gone.png", "question": "q", "answer": "a"}, {"image": "cut.png", "question": "q"}]
    records += [{"image": "cut.png", "question": "q", "answer": "a"}]
    write_jsonl(tmp_path / "train.jsonl", records)
    config = settings()
    encoder, _ = build_encoder(config, resolve(config.model.name))
    quarantine = tmp_path / "plan-quarantine.jsonl"
    read = read_data(config.data, Quarantine(quarantine))
    with pytest.raises(DataError) as in_training:
        check_data(read, config, encoder, RunFolder(tmp_path / "run"), SilentListener())
    listed = quarantine.read_text()
    with pytest.raises(DataError) as in_planning:
        workloads_of(config, tmp_path)
    assert str(in_planning.value) == str(in_training.value)
    assert quarantine.read_text() == listed
    assert listed.count("\n") == 3


def test_of_a_large_set_headers_are_read_and_broken_images_passed_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_workload, "MAX_DECODED_SAMPLES", 5)
    records = random_records(tmp_path, seed=2, num_samples=8)
    broken = write_image(tmp_path / "broken.png", size=(64, 64))
    broken.write_bytes(broken.read_bytes()[:60])
    records.insert(3, {"image": "broken.png", "question": "q", "answer": "a" * 300})
    write_jsonl(tmp_path / "train.jsonl", records)
    found = workloads_of(settings(), tmp_path)
    others = [sample for sample in read_all(settings(), tmp_path) if sample.source.line != 4]
    assert found.largest[MOST_TOKENS].batch.num_tokens == max(
        num for num, _ in encoded_tokens(settings(), tuple(others))
    )
    assert "headers" in " ".join(found.facts.notes)


def test_of_a_huge_set_an_even_share_and_the_longest_texts_are_measured(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_workload, "MAX_MEASURED_SAMPLES", 10)
    monkeypatch.setattr(data_workload, "NUM_LONGEST_TEXTS", 2)
    records = [{"question": "q", "answer": "a" * (1 + index % 10)} for index in range(100)]
    records[37] = {"question": "q", "answer": "a" * 200}  # at no even distance
    write_jsonl(tmp_path / "train.jsonl", records)
    found = workloads_of(settings(accumulation=8, val_fraction=0.1), tmp_path)
    assert lines_of(found.largest[MOST_TOKENS]) == {38}
    assert (found.facts.num_train_samples, found.facts.num_validation_samples) == (90, 10)
    assert found.facts.steps_an_epoch == -(-90 // 8)
    assert found.facts.max_tokens < found.largest[MOST_TOKENS].batch.num_tokens
    assert found.facts.notes == ("measured were 10 of 100 samples, at even distances, and the longest texts",)


def test_bad_records_of_a_huge_set_keep_their_share(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_workload, "MAX_MEASURED_SAMPLES", 20)
    good: list[Record] = [{"question": "q", "answer": "a"} for _ in range(90)]
    write_jsonl(tmp_path / "train.jsonl", [*good, *({"question": "q", "answer": ""} for _ in range(10))])
    assert workloads_of(settings(max_bad_fraction=0.11), tmp_path).facts.num_train_samples < 90
    with pytest.raises(DataError, match=r"\(9\.1 %\)"):
        workloads_of(settings(max_bad_fraction=0.05), tmp_path)


def test_without_the_model_s_tokenizer_bytes_are_counted_and_it_is_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "ab " * length} for length in (1, 40, 9)])
    config = TrainingConfig.model_validate(
        {"model": {"name": "qwen2.5-vl-3b"}, "data": {"data_path": str(tmp_path / "train.jsonl"), "val_fraction": 0}}
    )
    found = workloads_of(config, tmp_path)
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in found.facts.notes[0]
    assert lines_of(found.largest[MOST_TOKENS]) == {2}
    assert found.largest[MOST_TOKENS].batch.num_tokens >= len("ab " * 40) - 1
