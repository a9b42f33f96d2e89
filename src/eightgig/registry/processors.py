"""transformers' processors without their video and audio parts, which need torchvision and more."""

from __future__ import annotations

import functools
from typing import Any

KEPT_PARTS = ("image_processor", "tokenizer")


@functools.cache
def image_text_processor(class_name: str, *, code_of: str | None = None) -> Any:
    """The transformers processor class `class_name`, holding an image processor and a tokenizer alone.

    Its `from_pretrained` reads folders that were saved with more parts and leaves those alone; what it saves carries
    the original class's name, so that plain transformers reads it. It works without torchvision.

    Args:
        class_name: the class that the model's processor was saved as.
        code_of: a class that treats images and texts alike, for where `class_name` itself wants packages for video.
    """
    import transformers
    from transformers.processing_utils import ProcessorMixin

    original = getattr(transformers, code_of or class_name)
    parts = original.get_attributes()

    class WithoutAbsentParts(ProcessorMixin):  # type: ignore[misc]
        """Takes all parts that the original class hands up, and hands up those that are kept."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(parts, args, strict=False)), **kwargs}
            absent = set(parts) - set(KEPT_PARTS)
            super().__init__(**{name: value for name, value in given.items() if name not in absent})

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in parts if name in KEPT_PARTS]

    def _get_arguments_from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        kept = super(created, cls)._get_arguments_from_pretrained(*args, **kwargs)
        loaded = dict(zip(cls.get_attributes(), kept, strict=True))
        return [loaded.get(name) for name in parts]

    def __reduce__(self: Any) -> Any:
        return _empty, (class_name, code_of), self.__dict__

    created: Any = type(
        class_name,
        (original, WithoutAbsentParts),
        {
            "__doc__": f"{class_name} without video and audio.",
            "get_attributes": classmethod(get_attributes),
            "_get_arguments_from_pretrained": classmethod(_get_arguments_from_pretrained),
            "__reduce__": __reduce__,  # made at run time, so it can't be found by its name when a worker gets a copy
        },
    )
    return created


def _empty(class_name: str, code_of: str | None) -> Any:
    processor_class = image_text_processor(class_name, code_of=code_of)
    return processor_class.__new__(processor_class)
