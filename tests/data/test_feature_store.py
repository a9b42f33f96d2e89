"""Kept features: what is written comes back; what is damaged is told and gone; several writers don't meet."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eightgig.core.errors import DoesNotFit, EnvironmentProblem
from eightgig.data.feature_store import FeatureStore, StoredImage, stored_bytes
from eightgig.data.image_features import ImageFeatures, image_key
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import ImagePart

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def image(seed: int, *, rows: int = 3, dtype: torch.dtype = torch.float32) -> StoredImage:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 4, generator=generator).to(dtype)
    return StoredImage({"pixel_values": features, "image_grid_thw": torch.tensor([[1, rows, 2]])}, f"<i{seed}>" * rows)


def opened(folder: Path) -> tuple[FeatureStore, list[str]]:
    said: list[str] = []
    store = FeatureStore(folder)
    store.look(said.append)
    return store, said


def assert_same(found: StoredImage, expected: StoredImage) -> None:
    assert found.placeholder == expected.placeholder
    assert found.inputs.keys() == expected.inputs.keys()
    for name, tensor in expected.inputs.items():
        assert found.inputs[name].dtype == tensor.dtype
        assert torch.equal(found.inputs[name], tensor)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(DTYPES)), min_size=1, max_size=6), st.integers(1, 3))
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, torch.dtype]], a_file: int
) -> None:
    folder = tmp_path_factory.mktemp("store") / "new"
    images = {f"{seed:064x}": image(seed, rows=rows, dtype=dtype) for seed, (rows, dtype) in enumerate(shapes)}
    writer = FeatureStore(folder)
    names = list(images)
    for start in range(0, len(names), a_file):
        writer.add({name: images[name] for name in names[start : start + a_file]})
    reader, said = opened(folder)
    reader.verify(images, said.append)
    assert not said
    for store in (writer, reader, pickle.loads(pickle.dumps(reader))):
        for name, expected in images.items():
            assert name in store
            assert_same(store.get(name), expected)


def test_a_missing_folder_holds_nothing(tmp_path: Path) -> None:
    store, said = opened(tmp_path / "none")
    assert not said
    assert "a" not in store
    assert stored_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize("where", ["head", "middle", "cut", "empty"])
def test_a_damaged_file_is_told_and_the_others_stay(tmp_path: Path, where: str) -> None:
    writer = FeatureStore(tmp_path)
    writer.add({"a" * 64: image(1), "b" * 64: image(2)})
    (damaged,) = tmp_path.glob("*.safetensors")
    writer.add({"c" * 64: image(3)})
    content = bytearray(damaged.read_bytes())
    if where == "head":
        content[3] ^= 0xFF
    elif where == "middle":
        content[-5] ^= 0x10  # inside the last tensor's values: only the checksum can tell
    content = content[: len(content) // 2] if where == "cut" else content[:0] if where == "empty" else content
    damaged.unlink()  # a mapped file must not change under its readers
    damaged.write_bytes(content)
    store, said = opened(tmp_path)
    store.verify(["a" * 64, "b" * 64, "c" * 64, "d" * 64], said.append)
    assert len(said) == 1
    assert str(damaged) in said[0]
    assert "computed again" in said[0]
    assert not damaged.exists()
    assert "a" * 64 not in store
    assert "b" * 64 not in store
    assert_same(store.get("c" * 64), image(3))


def test_a_changed_placeholder_is_damage(tmp_path: Path) -> None:
    FeatureStore(tmp_path).add({"a" * 64: image(1)})
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b"<i1><i1><i1>", b"<i1><i2><i1>"))
    store, said = opened(tmp_path)
    assert "a" * 64 in store
    store.verify(["a" * 64], said.append)
    assert "a" * 64 not in store
    assert len(said) == 1


def test_two_writers_at_once_both_count(tmp_path: Path) -> None:
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    first.add({"a" * 64: image(1), "b" * 64: image(2)})
    second.add({"b" * 64: image(2), "c" * 64: image(3)})
    store, _ = opened(tmp_path)
    for number, key in enumerate("abc", start=1):
        assert_same(store.get(key * 64), image(number))
    assert stored_bytes(tmp_path) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eightgig.core.files.os.fsync", full)
    with pytest.raises(DoesNotFit, match="the disk is full"):
        FeatureStore(tmp_path).add({"a" * 64: image(1)})
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_folders_place_is_explained(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("x")
    with pytest.raises(EnvironmentProblem):
        FeatureStore(tmp_path / "blocked").add({"a" * 64: image(1)})


def test_images_are_known_by_their_bytes_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    (tmp_path / "b.png").write_bytes(b"pixels")
    key = image_key(ImagePart(path=tmp_path / "a.png"))
    assert key == image_key(ImagePart(path=tmp_path / "b.png")) == image_key(ImagePart(data=b"pixels"))
    assert key != image_key(ImagePart(data=b"Pixels"))
    with pytest.raises(SampleProblem, match="can't be read"):
        image_key(ImagePart(path=tmp_path / "none.png"))


def test_inputs_of_several_images_are_laid_end_to_end(tmp_path: Path) -> None:
    parts = [ImagePart(data=b"one"), ImagePart(data=b"two")]
    images = [image(1, rows=2), image(2, rows=5)]
    store = FeatureStore(tmp_path)
    store.add({image_key(part): stored for part, stored in zip(parts, images, strict=True)})
    inputs, placeholders = ImageFeatures(store).inputs_of([parts[1], parts[0], parts[1]])
    order = [images[1], images[0], images[1]]
    assert placeholders == [stored.placeholder for stored in order]
    for name, tensor in inputs.items():
        assert torch.equal(tensor, torch.cat([stored.inputs[name] for stored in order]))
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    reopened = pickle.loads(pickle.dumps(store))
    with pytest.raises(SampleProblem, match=r"the kept features of .* can't be read"):
        ImageFeatures(reopened).inputs_of(parts)
    with pytest.raises(SampleProblem, match="is not the file any more"):
        ImageFeatures(store).inputs_of([ImagePart(data=b"three")])
