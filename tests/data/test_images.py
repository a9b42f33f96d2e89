"""Pixels of every mode and orientation against ones computed without Pillow's conversions; damaged files."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tests.tiny import write_image

from eightgig.data.images import check_image, image_size, load_image
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart

Pixels = NDArray[np.uint8]


def loaded(path: Path) -> NDArray[np.int64]:
    """The image as the encoder gets it, int64 [height, width, 3]."""
    image = load_image(ImagePart(path=path))
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int64)


def random_pixels(*shape: int, high: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def over_white(colour: Pixels, alpha: Pixels) -> NDArray[np.float64]:
    opacity = alpha[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


def test_rgb_is_kept(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(loaded(tmp_path / "a.png"), pixels)


def test_rgba_lies_on_white(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9, 4)
    Image.fromarray(pixels, mode="RGBA").save(tmp_path / "a.png")
    assert np.abs(loaded(tmp_path / "a.png") - over_white(pixels[..., :3], pixels[..., 3])).max() <= 1


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9, 2)
    Image.fromarray(pixels, mode="LA").save(tmp_path / "a.png")
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    assert np.abs(loaded(tmp_path / "a.png") - over_white(grey, pixels[..., 1])).max() <= 1


def test_grey(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(loaded(tmp_path / "a.png"), np.repeat(pixels[..., None], 3, axis=2))


def test_black_and_white(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9, high=2) * 255
    Image.fromarray(pixels).convert("1").save(tmp_path / "a.png")
    assert np.array_equal(loaded(tmp_path / "a.png"), np.repeat(pixels[..., None], 3, axis=2))


@pytest.mark.parametrize("transparent", [None, 2])
def test_palette(tmp_path: Path, transparent: int | None) -> None:
    indices, palette = random_pixels(7, 9, high=5), random_pixels(5, 3, seed=1)
    image = Image.fromarray(indices, mode="P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", **({} if transparent is None else {"transparency": transparent}))
    wanted = palette[indices].astype(np.int64)
    if transparent is not None:
        wanted[indices == transparent] = 255
    assert np.array_equal(loaded(tmp_path / "a.png"), wanted)


def test_one_transparent_colour(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=tuple(pixels[2, 3].tolist()))
    wanted = pixels.astype(np.int64)
    wanted[2, 3] = 255
    assert np.array_equal(loaded(tmp_path / "a.png"), wanted)


def test_cmyk(tmp_path: Path) -> None:
    pixels = random_pixels(7, 9, 4)
    Image.fromarray(pixels, mode="CMYK").save(tmp_path / "a.tif")
    ink = pixels.astype(np.float64) / 255
    wanted = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(loaded(tmp_path / "a.tif") - wanted).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (7, 9), dtype=np.uint16)
    pixels[0, :3] = (0, 65535, 300)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    wanted = np.rint(pixels / 257)
    assert np.array_equal(loaded(tmp_path / f"a.{suffix}"), np.repeat(wanted[..., None], 3, axis=2))


def test_32_bit_grey_within_16_bits_is_scaled_and_beyond_refused(tmp_path: Path) -> None:
    pixels = np.array([[0, 257, 65535, 514]] * 4, dtype=np.int32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert loaded(tmp_path / "a.tif")[0, :, 1].tolist() == [0, 1, 255, 2]
    Image.fromarray(pixels * 2).save(tmp_path / "b.tif")
    with pytest.raises(SampleProblem, match="grey values from 0 to 131070") as caught:
        loaded(tmp_path / "b.tif")
    assert caught.value.code == ProblemCode.UNSUPPORTED_MODE


def test_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((5, 5), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(SampleProblem, match="floating-point") as caught:
        loaded(tmp_path / "a.tif")
    assert caught.value.code == ProblemCode.UNSUPPORTED_MODE


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """Orientation as the EXIF 2.32 standard (tag 0x0112) tells where row 0 and column 0 are to be shown."""
    pixels = random_pixels(7, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(loaded(tmp_path / "a.png"), TURNED[orientation](pixels))


def test_embedded_bytes_give_the_files_pixels(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    embedded = load_image(ImagePart(data=path.read_bytes()))
    assert np.array_equal(np.asarray(embedded), loaded(path))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert loaded(tmp_path / "a.gif")[4, 4].tolist() == [255, 0, 0]


MODES = [("RGB", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("1", "png")]
MODES += [("I;16", "png"), ("RGB", "webp"), ("RGB", "bmp"), ("CMYK", "tif"), ("LA", "png"), ("P", "gif")]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_good_images_pass_the_check_with_their_size(tmp_path: Path, mode: str, suffix: str) -> None:
    path = write_image(tmp_path / f"a.{suffix}", size=(37, 23), mode=mode)
    assert check_image(ImagePart(path=path)) == (37, 23)
    assert loaded(path).shape == (23, 37, 3)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("RGBA", "png"), ("L", "tif"), ("RGBA", "webp")])
def test_truncated_images_fail_the_check(tmp_path: Path, mode: str, suffix: str, share: float) -> None:
    path = write_image(tmp_path / f"a.{suffix}", size=(200, 160), mode=mode)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for read in (check_image, load_image):
        with pytest.raises(SampleProblem) as caught:
            read(ImagePart(path=path))
        assert caught.value.code in (ProblemCode.BROKEN_IMAGE, ProblemCode.NOT_AN_IMAGE)
        assert str(path) in caught.value.reason


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("good")
    made = [write_image(folder / f"{i}.{suffix}", mode=mode) for i, (mode, suffix) in enumerate(MODES)]
    return [path.read_bytes() for path in made]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL.*")  # Pillow says what it finds odd in the files
@settings(max_examples=400)
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(good_files: list[bytes], data: st.DataObject) -> None:
    """Whatever bytes are overwritten: either pixels come out or SampleProblem; and what the check passes, loads."""
    content = bytearray(data.draw(st.sampled_from(good_files)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    part = ImagePart(data=bytes(content))
    try:
        check_image(part)
    except SampleProblem:
        return
    assert load_image(part).mode == "RGB"


def missing(path: Path) -> None:
    assert not path.exists()


def folder(path: Path) -> None:
    path.mkdir()


def text_file(path: Path) -> None:
    path.write_text("<html>404</html>")


def empty_file(path: Path) -> None:
    path.touch()


def thin(path: Path) -> None:
    Image.new("RGB", (50, 3)).save(path)


def long(path: Path) -> None:
    Image.new("RGB", (1001, 5)).save(path)


@pytest.mark.parametrize(
    ("make", "code", "reason"),
    [
        (missing, ProblemCode.MISSING_FILE, "a.png does not exist"),
        (folder, ProblemCode.BROKEN_IMAGE, "Is a directory"),
        (text_file, ProblemCode.NOT_AN_IMAGE, "a.png is no image that Pillow can read"),
        (empty_file, ProblemCode.NOT_AN_IMAGE, "a.png is no image"),
        (thin, ProblemCode.UNUSABLE_SHAPE, "50 × 3 pixels"),
        (long, ProblemCode.UNUSABLE_SHAPE, "1001 × 5 pixels"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: object, code: ProblemCode, reason: str) -> None:
    assert callable(make)
    make(tmp_path / "a.png")
    for read in (check_image, load_image):
        with pytest.raises(SampleProblem) as caught:
            read(ImagePart(path=tmp_path / "a.png"))
        assert caught.value.code == code
        assert reason in caught.value.reason


def test_more_pixels_than_pillow_reads_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to twice its limit Pillow only warns; the image is refused all the same, before it is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    path = write_image(tmp_path / "a.png", size=(40, 30))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(SampleProblem, match="40 × 30 pixels, more than 800") as caught,
    ):
        check_image(ImagePart(path=path))
    assert caught.value.code == ProblemCode.TOO_MANY_PIXELS


def test_more_pixels_than_pillow_reads_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    path = write_image(tmp_path / "a.png", size=(40, 30))
    with pytest.raises(SampleProblem, match="1200 pixels") as caught:
        check_image(ImagePart(path=path))
    assert caught.value.code == ProblemCode.TOO_MANY_PIXELS


def test_an_image_goes_through_the_same_door_from_anywhere(tmp_path: Path) -> None:
    """A file with the wrong suffix is judged by its content."""
    path = write_image(tmp_path / "a.png")
    shutil.copy(path, tmp_path / "a.jpg")
    assert np.array_equal(loaded(tmp_path / "a.jpg"), loaded(path))
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (1, 2, 3)).save(buffer, format="PNG")
    assert load_image(ImagePart(data=buffer.getvalue())).size == (6, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (37, 23)).save(path, exif=exif)
    upright = load_image(ImagePart(path=path)).size
    assert image_size(ImagePart(path=path)) == upright
    assert check_image(ImagePart(path=path)) == upright


def test_a_size_is_read_without_pixels(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", size=(200, 160))
    path.write_bytes(path.read_bytes()[:60])  # the header and a little of the pixels
    assert image_size(ImagePart(path=path)) == (200, 160)
    with pytest.raises(SampleProblem):
        check_image(ImagePart(path=path))
    with pytest.raises(SampleProblem, match="does not exist"):
        image_size(ImagePart(path=tmp_path / "gone.png"))
