"""Making transformers' Auto classes know the model, through the functions that they have for it."""

from __future__ import annotations

import functools

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

# Where transformers itself takes it from: at its top level some versions have it only with torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from eightgig.models.qwen_vl.configuration import QwenVLConfig
from eightgig.models.qwen_vl.image_processing import QwenVLImageProcessor
from eightgig.models.qwen_vl.load_map import register_load_map
from eightgig.models.qwen_vl.modeling import QwenVLForConditionalGeneration
from eightgig.models.qwen_vl.processing import QwenVLProcessor


@functools.cache
def register() -> None:
    """Register config, model, processors and load map under the published `model_type`; later calls do nothing."""
    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(QwenVLConfig, image_processor_classes={"pil": QwenVLImageProcessor}, exist_ok=True)
    AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)
    register_load_map(QwenVLForConditionalGeneration.__name__)
