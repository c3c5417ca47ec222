"""The tokenizer and the image processor that lie in a checkpoint's or a cache's folder.

The image processor is always the library's PIL one: torchvision is no dependency, and one resampling
code on every machine is what makes pixels, and so caches, repeatable. ``AutoImageProcessor`` is not
asked for it, because some versions of it cannot even be imported without torchvision.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, ImageProcessingMixin

from common.errors import ModelError


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    try:
        # The library takes a path that is no folder for a model's name and would ask the hub for it.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises the bare class for a file that it cannot read
        raise ModelError(
            f"{folder}: no usable tokenizer ({error}); expected tokenizer.json and tokenizer_config.json "
            "as the tokenizer's save_pretrained writes them"
        ) from error


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a folder, always as the library's PIL class.

    Args:
        folder: Holds ``processor_config.json`` with the image processor inside (newer checkpoints; read
            first, as the library does) or ``preprocessor_config.json`` (LLaVA-1.5, CLIP). A class stored
            with or without ``Fast`` or ``Pil``, or under its name of old, is one and the same.

    Returns:
        A ``...ImageProcessorPil``.

    Raises:
        ModelError: If there is none, it cannot be read, or the library has no PIL class for it.
    """
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no usable image processor ({error}); expected preprocessor_config.json, or "
            "processor_config.json with an image_processor inside, as save_pretrained writes them"
        ) from error
    name = str(stored.get("image_processor_type") or stored.get("feature_extractor_type"))
    base = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    processor_class = getattr(transformers, f"{base}Pil", None)
    if not base.endswith("ImageProcessor") or processor_class is None:
        raise ModelError(
            f"{folder}: image_processor_type is {name!r}, for which transformers {transformers.__version__} "
            "has no PIL class; expected for example 'CLIPImageProcessor' in preprocessor_config.json"
        )
    return processor_class.from_pretrained(folder)
