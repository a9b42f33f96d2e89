"""From pictures to pixel values, as the original does it: Pillow's bicubic, squashed to a square. No torchvision."""

from __future__ import annotations

from typing import ClassVar

from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


class QwenVLImageProcessor(PilBackend):  # type: ignore[misc]  # transformers is untyped
    """Pictures in any mode and size to `pixel_values`, fp32 [images, 3, side, side]; `size` is the side in px."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    do_convert_rgb = True
    do_resize = True
    size: ClassVar[dict[str, int]] = {"height": 448, "width": 448}
    resample = Image.Resampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
