"""The general path: a model without a family of its own trains, says what was derived, or is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case
from torch import nn

import tiny
from eightgig import registry
from eightgig.core.errors import UnsupportedModel
from eightgig.registry.processors import image_text_processor
from tiny_families import llava
from tiny_family import TinyFamily
from tiny_training import load_tiny, tiny_config
from unknown_families import build_glm4v, build_llava_next


@pytest.fixture(scope="module", params=[build_llava_next, build_glm4v], ids=["llava_next", "glm4v"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("derived")
    folder = request.param(root / "model")
    family = registry.resolve(str(folder)).family
    stand_in = TinyFamily(name="derived", family=family, facts=llava.FACTS, conversation=())
    return Case(stand_in, folder, checks.write_samples(root / "data"), root / "work")


def test_an_unknown_family_passes_the_checks_of_the_known_ones(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert case.spec.family.name == "derived"
    checks.check_inputs(case)
    trained = checks.train(case)
    checks.check_training(case, trained)
    checks.check_image_matters(case, trained)
    checks.check_generation(case, trained)
    checks.check_reload(case, trained)
    checks.check_receipt(case, trained)
    checks.check_wrong_skip_list(case, monkeypatch)


def test_only_the_blocks_of_its_tower_are_quantised_on_request(case: Case) -> None:
    """Not the embedding of patches, nor what merges them."""
    model = load_tiny(case.folder, tiny_config({"training": {"quantization": {"vision_tower": True}}})).model
    tower = model.get_submodule(case.spec.family.modules.towers[0])
    found = {path: type(module) for path, module in tower.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {path for path in found if path.startswith(("blocks.", "encoder.layers."))}
    assert in_blocks
    assert {path for path, kind in found.items() if kind is Linear4bit} == in_blocks
    if case.spec.facts.architecture["model_type"] == "glm4v":
        assert {path.split(".")[0] for path in found.keys() - in_blocks} == {"merger"}


def test_what_was_derived_is_said(case: Case) -> None:
    said = "\n".join(case.spec.family.derivation)
    assert "language model model.language_model; kept in 16 bits: model.vi" in said
    assert f"{case.spec.facts.num_language_linears} linear layers" in said
    assert "an image is <|image|>" in said or "an image is <image>" in said
    assert "an answer ends with </s>" in said or "an answer ends with <|user|>" in said


def test_image_tokens_are_counted_by_the_processor(case: Case) -> None:
    family, facts = case.spec.family, case.spec.facts
    assert family.num_image_tokens(facts, None, width_px=64, height_px=64) > 0
    assert "changes nothing" in str(family.image_px_note(facts, 336))
    with pytest.raises(UnsupportedModel, match="no stand-in processor"):
        family.build_processor(facts)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert"}, r"model_type 'bert'[\s\S]*one of: .*llava, .*qwen[\s\S]*image-text-to-text"),
        ({"model_type": "my_own", "auto_map": {}}, "Python code of its own, which EightGig does not run"),
        ({}, "says model_type None"),
        ({"model_type": "florence2"}, "an encoder and a decoder"),
        ({"model_type": "cohere2_vision"}, r"cap or scale its logits \(logit_scale\)"),
        ({"model_type": "gemma3n"}, "can't build it here"),
        ({"model_type": "fuyu"}, "no vision tower beside its language model"),
        (
            {
                "model_type": "qwen3_vl_moe",
                "text_config": {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 64},
            },
            "% of its decoder's weights are in linear layers",
        ),
    ],
)
def test_what_cannot_be_handled_is_refused_with_the_reason(
    tmp_path: Path, config: Mapping[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=reason):
        registry.resolve(str(tmp_path))


def test_a_processor_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    build_llava_next(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModel, match="no chat template"):
        registry.resolve(str(tmp_path))


def test_a_template_that_writes_no_image_token_is_refused(tmp_path: Path) -> None:
    build_llava_next(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}")
    with pytest.raises(UnsupportedModel, match="does not write one image token"):
        registry.resolve(str(tmp_path))


def test_the_cut_down_processor_reads_and_writes_what_the_original_does(tmp_path: Path) -> None:
    processor = registry.get("qwen2.5-vl-3b").family.build_processor(registry.get("qwen2.5-vl-3b").facts)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
    again = image_text_processor("Qwen2_5_VLProcessor").from_pretrained(tmp_path)
    picture = tiny.write_image(tmp_path / "a.png", (90, 70))
    from PIL import Image

    arguments = {"images": [Image.open(picture)], "text": "<|image_pad|> hi", "return_tensors": "pt"}
    first, second = processor(**arguments), again(**arguments)
    assert first.keys() == second.keys() >= {"input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    for name, value in first.items():
        assert torch.equal(value, second[name])
