"""The tokenizer and the image processor that lie in a checkpoint's or a cache's folder.

The image processor is always the library's PIL one: torchvision is no dependency, and one resampling
code on every machine is what makes pixels, and so caches, repeatable. ``AutoImageProcessor`` is not
asked for it, because some versions of it cannot even be imported without torchvision.
"""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, ImageProcessingMixin

from vlm_distill_cache.common.errors import ModelError

BEHIND_TORCHVISION = {"Idefics3ImageProcessor": "idefics3", "SmolVLMImageProcessor": "smolvlm"}
"""PIL classes that some versions of the library (5.17) give at their top level only where torchvision is installed,
and the module that has them anyway."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, with the chat template that the model's processor uses.

    Checkpoints of some families (LLaVA-OneVision, Qwen2-VL) keep it in ``chat_template.json``, which the library reads
    for its processors only; the tokenizer's own, if there is one, may know no pictures.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    try:
        # The library takes a path that is no folder for a model's name and would ask the hub for it.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises the bare class for a file that it cannot read
        if (Path(folder) / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            raise ModelError(
                f"{folder}: its tokenizer is a tokenizer.model, which needs sentencepiece; run `pip install "
                "'vlm-distill-cache[mobilevlm]'`"
            ) from error
        raise ModelError(
            f"{folder}: no usable tokenizer ({error}); expected tokenizer.json and tokenizer_config.json "
            "as the tokenizer's save_pretrained writes them"
        ) from error
    stored = Path(folder) / "chat_template.json"
    if stored.is_file() and not (Path(folder) / "chat_template.jinja").is_file():
        tokenizer.chat_template = _chat_template(stored)
    return tokenizer


def _chat_template(path: Path) -> str:
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f'{path}: expected {{"chat_template": "..."}}, got {error!r}; download it again'
        ) from error
    return str(template)


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
    home = transformers
    if base in BEHIND_TORCHVISION:
        family = BEHIND_TORCHVISION[base]
        home = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    processor_class = getattr(home, f"{base}Pil", None)
    if not base.endswith("ImageProcessor") or processor_class is None:
        raise ModelError(
            f"{folder}: image_processor_type is {name!r}, for which transformers {transformers.__version__} "
            "has no PIL class; expected for example 'CLIPImageProcessor' in preprocessor_config.json"
        )
    return processor_class.from_pretrained(folder)
