"""Every family of the registry, tiny, through every check; and every published model's numbers on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case, Trained
from torch import nn
from transformers import AutoModelForImageTextToText

from eightgig import registry
from eightgig.memory import layer_inputs
from eightgig.registry import ModelSpec
from eightgig.registry.discovery import families
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family

TINY_FAMILIES = all_tiny_families()
PUBLISHED = [spec for spec in registry.all_specs() if spec.facts.hub_id is not None]


@pytest.fixture(scope="module", params=TINY_FAMILIES, ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny: TinyFamily = request.param
    root = tmp_path_factory.mktemp(tiny.name)
    samples = checks.write_samples(root / "data")
    return Case(tiny, build_tiny_family(tiny, root / "model"), samples, root / "work")


@pytest.fixture(scope="module")
def trained(case: Case) -> Trained:
    return checks.train(case)


def test_a_folder_belongs_to_its_family(case: Case) -> None:
    facts, tiny = case.spec.facts, case.tiny.facts
    assert case.spec.family.name == case.tiny.family.name
    assert (facts.num_language_linears, facts.image_px) == (tiny.num_language_linears, tiny.image_px)


def test_labels_are_those_written_by_hand(case: Case) -> None:
    checks.check_labels(case)


def test_inputs_are_those_of_the_processor(case: Case) -> None:
    checks.check_inputs(case)


def test_the_image_token_rule_is_what_the_processor_emits(case: Case) -> None:
    checks.check_image_tokens(case)


def test_layer_levers_change_no_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    checks.check_layer_levers(case)


def test_samples_in_one_row_stay_apart(case: Case) -> None:
    checks.check_packing(case)


def test_three_steps_train(case: Case, trained: Trained) -> None:
    checks.check_training(case, trained)


def test_the_image_reaches_the_language_model(case: Case, trained: Trained) -> None:
    checks.check_image_matters(case, trained)


def test_greedy_generation_with_and_without_the_adapter(case: Case, trained: Trained) -> None:
    checks.check_generation(case, trained)


def test_plain_libraries_reload_the_adapter(case: Case, trained: Trained) -> None:
    checks.check_reload(case, trained)


def test_exactly_the_intended_modules_are_4bit(case: Case, trained: Trained) -> None:
    checks.check_receipt(case, trained)


def test_a_wrong_skip_list_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_wrong_skip_list(case, monkeypatch)


def test_full_fine_tuning_leaves_the_towers(case: Case) -> None:
    checks.check_full_method(case)


def test_fp16_without_autocast_trains(case: Case) -> None:
    checks.check_fp16(case)


def test_random_weights_need_no_files(case: Case) -> None:
    checks.check_random_weights(case)


def test_every_model_type_has_a_tiny_model() -> None:
    claimed = sorted(model_type for family in families() for model_type in family.model_types)
    assert sorted(str(tiny.facts.architecture["model_type"]) for tiny in TINY_FAMILIES) == claimed


@pytest.mark.parametrize("spec", PUBLISHED, ids=lambda spec: spec.name)
def test_published_facts_agree_with_the_stock_class(spec: ModelSpec, tmp_path: Path) -> None:
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(spec.family.build_config(spec.facts), dtype=torch.bfloat16)
    model.tie_weights()
    assert sum(value.numel() for value in model.parameters()) == spec.facts.num_parameters
    matched = [
        module for path, module in model.named_modules() if re.fullmatch(spec.family.lora_pattern, path) is not None
    ]
    assert all(type(module) is nn.Linear for module in matched)
    assert len(matched) == spec.facts.num_language_linears
    paths = spec.family.modules
    for path in (paths.language_model, *paths.towers, paths.lm_head):
        assert isinstance(model.get_submodule(path), nn.Module)
    assert len(spec.family.decoder_layers(model)) == len(model.get_submodule(paths.language_model).layers)
    assert spec.facts.licence_url.startswith("https://")
    spec.family.check_image_px(spec.facts, spec.facts.image_px)
