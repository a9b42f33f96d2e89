"""Losses and gradients with a tower's features in place of pixels beside those with pixels, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.registry.family_checks import write_samples
from tests.tiny import build_tiny_llava
from torch import Tensor, nn

from eightgig.config import TrainingConfig
from eightgig.data.batch import MicroBatch
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.data.sample import Sample
from eightgig.memory.cached_tower import PIXELS, FedModel, rows_of_features, tower_features, tower_of
from eightgig.models.load import LoadedModel
from eightgig.step.step import Compute, batch_loss_sum
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family
from tiny_training import CPU, gradients, load_tiny, tiny_config

FED = [tiny for tiny in all_tiny_families() if tiny.family.accepts_image_features]
WHOLLY_FROZEN = [  # those without a trained projector inside the tower
    tiny
    for tiny in FED
    if not any(path.startswith(f"{tiny.family.modules.towers[0]}.") for path in tiny.family.modules.projectors)
]
CONFIG = tiny_config({"training": {"lora": {"rank": 4, "alpha": 8}}})
FULL = tiny_config({"training": {"method": "full", "lora": None}})
BF16_BOUND = 2.0**-7  # one rounding of bf16 is 2^-9 of a value at most; a few layers of them add up


class Case:
    """A tiny model of one family, and its samples: two images of unlike sizes, none, one very wide, one."""

    def __init__(self, tiny: TinyFamily, root: Path) -> None:
        self.tiny = tiny
        self.folder = build_tiny_family(tiny, root / "model")
        self.samples = write_samples(root / "data")

    def load(self, config: TrainingConfig = CONFIG) -> LoadedModel:
        """The model with adapters whose B matrices are not zero, so that every adapter has a gradient."""
        loaded = load_tiny(self.folder, config, adapters=config.training.lora is not None)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, parameter in loaded.model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0.0, 0.1)
        return loaded


@pytest.fixture(scope="module", params=FED, ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param.name))


def batches_of(loaded: LoadedModel, samples: tuple[Sample, ...]) -> list[MicroBatch]:
    """Each sample alone, and all of them together."""
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    encoded = [encoder.encode(sample) for sample in samples]
    groups = [*([one] for one in encoded), encoded]
    return [collate(group, encoder.pad_token_id, encoder.image_layout) for group in groups]


def with_features(loaded: LoadedModel, batch: MicroBatch) -> MicroBatch:
    """`batch` with the features that the tower makes of its own pixels."""
    if PIXELS not in batch.model_inputs:
        return batch
    features = tower_features(loaded.model, loaded.spec.family, batch.to(CPU, compute(loaded).input_dtype).model_inputs)
    return MicroBatch(**{**vars(batch), "model_inputs": {**batch.model_inputs, PIXELS: features}})


def compute(loaded: LoadedModel) -> Compute:
    return Compute(CPU, loaded.precision.compute_dtype, None, loss_chunk_tokens=7)


def loss_and_gradients(loaded: LoadedModel, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loaded.model.train()
    loaded.model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # InstructBLIP's Q-Former has dropout
    loss = batch_loss_sum(loaded.model, loaded.spec.family, batch, compute(loaded))
    torch.autograd.backward(loss)
    return loss.detach(), gradients(loaded.model)


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert expected[1]
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def test_fed_features_give_the_very_loss_and_gradients_of_pixels(case: Case) -> None:
    check_equality(case.load(), case.samples)


@pytest.mark.parametrize("tiny", WHOLLY_FROZEN, ids=lambda tiny: tiny.name)
def test_full_fine_tuning_gets_them_too(tiny: TinyFamily, tmp_path: Path) -> None:
    case = Case(tiny, tmp_path)
    check_equality(case.load(FULL), case.samples)


def check_equality(loaded: LoadedModel, samples: tuple[Sample, ...]) -> None:
    batches = batches_of(loaded, samples)
    expected = [loss_and_gradients(loaded, batch) for batch in batches]
    fed = [with_features(loaded, batch) for batch in batches]
    FedModel(loaded.model, loaded.spec.family)
    for batch, of_pixels in zip(fed, expected, strict=True):
        assert_equal(loss_and_gradients(loaded, batch), of_pixels)


def test_the_tower_is_not_called_and_not_among_the_weights(case: Case) -> None:
    loaded = case.load()
    batch = with_features(loaded, batches_of(loaded, case.samples)[-1])
    tower = tower_of(loaded.model, loaded.spec.family)
    calls: list[nn.Module] = []
    for module in tower.modules():
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
    fed = FedModel(loaded.model, loaded.spec.family)
    loss_and_gradients(loaded, batch)
    assert not calls
    ours = {id(parameter) for parameter in tower.parameters()}
    assert not ours & {id(parameter) for parameter in loaded.model.parameters()}
    fed.take_back()
    assert tower_of(loaded.model, loaded.spec.family) is tower


def test_answers_are_those_of_pixels(case: Case) -> None:
    loaded = case.load()
    loaded.model.eval()
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    prompt = encoder.encode_prompt(case.samples[0].messages[:1])
    batch = collate([prompt], encoder.pad_token_id, encoder.image_layout)

    def answer(inputs: MicroBatch) -> Tensor:
        arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": encoder.pad_token_id}
        with torch.no_grad():
            ids: Tensor = loaded.spec.family.generate(loaded.model, inputs.model_inputs, **arguments)
        return ids

    expected, fed = answer(batch), with_features(loaded, batch)
    FedModel(loaded.model, loaded.spec.family)
    assert torch.equal(answer(fed), expected)


def test_features_of_images_one_by_one_differ_by_rounding_alone(case: Case) -> None:
    """Within 1e-6 of their norm in fp32; in bf16 within BF16_BOUND of it."""
    for precision, bound in (("fp32", 1e-6), ("bf16", BF16_BOUND)):
        loaded = case.load(tiny_config({"training": {"lora": {"rank": 4, "alpha": 8}}}, precision=precision))
        encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
        encoded = [encoder.encode(sample) for sample in case.samples if sample.images]
        batch = collate(encoded, encoder.pad_token_id, encoder.image_layout)
        pixel_rows = [len(sample.image_inputs[PIXELS]) for sample in encoded]
        features = with_features(loaded, batch).model_inputs[PIXELS]
        sizes = [rows_of_features(len(features), sum(pixel_rows), rows) for rows in pixel_rows]
        for sample, together in zip(encoded, features.split(sizes), strict=True):
            own = collate([sample], encoder.pad_token_id, encoder.image_layout)
            alone = with_features(loaded, own).model_inputs[PIXELS]
            assert alone.shape == together.shape
            assert float((alone.double() - together.double()).norm() / alone.double().norm()) <= bound


def test_inputs_without_an_image_are_refused(tmp_path: Path) -> None:
    loaded = load_tiny(build_tiny_llava(tmp_path), CONFIG)
    inputs = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="never came to its tower"):
        tower_features(loaded.model, loaded.spec.family, inputs)
    assert not tower_of(loaded.model, loaded.spec.family)._forward_hooks


def test_rows_that_can_t_be_shared_out_are_refused() -> None:
    assert rows_of_features(12, 48, 8) == 2
    with pytest.raises(ValueError, match="can't be shared out"):
        rows_of_features(12, 48, 7)
