"""The tokenizer and the image processor that lie in a checkpoint's or a cache's folder.

The image processor is always the library's PIL one: torchvision is no dependency, and one resampling
code on every machine is what makes pixels, and so caches, repeatable. ``AutoImageProcessor`` is not
asked for it, because some versions of it cannot even be imported without torchvision.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
import xxhash
from torch import nn
from transformers import AutoTokenizer, ImageProcessingMixin

from vlm_distill_cache.common.cache.document_rules import (
    IMAGE_PROCESSOR,
    MAX_PLAN_BYTES,
    MAX_SETTINGS_BYTES,
    PROCESSOR,
)
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.hashing import file_checksum, fingerprint
from vlm_distill_cache.common.files.rules import OBJECT, check
from vlm_distill_cache.common.models.parts import describe_lost_tokenizer, has_tokenizer
from vlm_distill_cache.common.models.processing import pil_class
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.text.sentencepiece_model import is_model_only, load_sentencepiece_tokenizer
from vlm_distill_cache.data.text.tokenizer_program import PROBE
from vlm_distill_cache.data.text.tokenizer_trial import is_failure, try_tokenizers


def load_video_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder's video processor, in the order in which the library looks for them.

    Returns:
        Those in ``processor_config.json``, else of ``video_preprocessor_config.json``; empty: videos are prepared as pictures
        are.

    Raises:
        ModelError: A file cannot be read, or holds no settings.
    """
    try:
        for file in ("processor_config.json", "video_preprocessor_config.json"):
            if not (path := Path(folder) / file).is_file():
                continue
            stored = read_json(path.resolve(), max_bytes=MAX_SETTINGS_BYTES)
            check(stored, OBJECT, file, remedy="correct it")
            if file.startswith("video"):
                return dict(stored)
            if "video_processor" in stored:
                check(stored["video_processor"], OBJECT, f"{file}: video_processor", remedy="correct it")
                return dict(stored["video_processor"])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"no usable settings of videos ({error}); download the file again") from error
    return {}


def module_fingerprint(module: nn.Module) -> str:
    """Fingerprint a module's weights, read as float32, independent of the file format and of fp16 storage.

    Returns:
        Hexadecimal xxh3_128 over names, shapes and values.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("position_ids"):
            continue
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(
    directory: Path,
    dtype: str,
    *,
    device_map: str = "",
    quantisation: str = "none",
    others: Mapping[str, Path] = MappingProxyType({}),
) -> str:
    """Fingerprint a checkpoint directory: its weight files, its config and how it runs.

    How the model is spread over devices decides the last bits of its sums. ``others``: files of weights by name, where
    the directory names them or has them under names of its own.

    Raises:
        ModelError: If there are no weight files.
    """
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")])
    if not files and not others:
        raise ModelError(
            f"{directory} holds no *.safetensors or pytorch_model*.bin; point at a directory that save_pretrained wrote"
        )
    config = json.loads((directory / "config.json").read_text())
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    elsewhere = {name: file_checksum(path) for name, path in others.items() if path not in files}
    how = {"device_map": device_map, "quantisation": quantisation}
    return fingerprint(
        {
            "files": {file.name: file_checksum(file) for file in files},
            "config": config,
            "dtype": dtype,
            # Left out where they have their defaults: the fingerprints of older caches stay what they are.
            **{name: value for name, value in how.items() if value not in ("", "none")},
            **({"others": elsewhere} if elsewhere else {}),
        }
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what a tokenizer does to text, not how it is stored or how many rows a model has.

    Its vocabulary without added tokens (LLaVA adds ``<image>`` and ``<pad>`` to the very tokenizer MobileVLM
    uses, and no answer contains either), the end token, and the ids of a text that brings out blanks, case,
    digits, accents, scripts and unknown characters. Files of one tokenizer written by different
    versions of the library describe the same steps in different words, so those are not compared.

    Raises:
        ModelError: If it fails on that text.
    """
    added = set(tokenizer.get_added_vocab())
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
    try:
        probe = tokenizer(PROBE)["input_ids"]
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ModelError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: it fails on a plain text ({one_line(error)}); download it again, "
            "or take another checkpoint or cache"
        ) from error
    return fingerprint({"vocabulary": vocabulary, "eos_token_id": tokenizer.eos_token_id, "probe": probe})


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, with the chat template that the model's processor uses.

    Checkpoints of some families (LLaVA-OneVision, Qwen2-VL) keep it in ``chat_template.json``, which the library reads
    for its processors only; the tokenizer's own, if there is one, may know no pictures.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    try:
        for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            if (path := Path(folder) / file).is_file():
                check(read_json(path.resolve(), max_bytes=MAX_PLAN_BYTES), OBJECT, file, remedy="correct it")
        try_tokenizers(Path(folder))
        if is_model_only(folder):
            tokenizer = load_sentencepiece_tokenizer(folder)
        else:
            # The library takes a path that is no folder for a model's name and would ask the hub for it.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ModelError:
        raise
    except BaseException as error:  # tokenizers raises the bare Exception for a file that it cannot read, or panics
        if not is_failure(error):
            raise
        if not has_tokenizer(Path(folder)):
            raise ModelError(describe_lost_tokenizer(folder)) from error
        raise ModelError(
            f"{folder}: no usable tokenizer ({one_line(error)}); expected tokenizer.json and tokenizer_config.json, "
            "as the tokenizer's save_pretrained writes them, or tokenizer.model"
        ) from error
    stored = Path(folder) / "chat_template.json"
    if stored.is_file() and not (Path(folder) / "chat_template.jinja").is_file():
        tokenizer.chat_template = _chat_template(stored)
    return tokenizer


def _chat_template(path: Path) -> str:
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f'{path}: expected {{"chat_template": "..."}}, got {error!r}; download it again') from error
    return str(template)


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a folder, always as the library's PIL class.

    Args:
        folder: Holds ``processor_config.json`` with the image processor inside (newer checkpoints; read
            first, as the library does) or ``preprocessor_config.json`` (LLaVA-1.5, CLIP). A class stored
            with or without ``Fast`` or ``Pil``, or under its name of old, is one and the same.

    Raises:
        ModelError: If there is none, it cannot be read, or the library has no PIL class for it.
    """
    try:
        for file, rule in (("preprocessor_config.json", IMAGE_PROCESSOR), ("processor_config.json", PROCESSOR)):
            if (path := Path(folder) / file).is_file():
                check(read_json(path.resolve(), max_bytes=MAX_SETTINGS_BYTES), rule, file, remedy="correct it")
        stored, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{folder}: no usable image processor ({error}); expected preprocessor_config.json, or "
            "processor_config.json with an image_processor inside, as save_pretrained writes them"
        ) from error
    processor_class = pil_class(stored)
    if processor_class is None:
        name = stored.get("image_processor_type") or stored.get("feature_extractor_type")
        raise ModelError(
            f"{folder}: image_processor_type is {str(name)!r}, for which transformers {transformers.__version__} "
            "has no PIL class; expected for example 'CLIPImageProcessor' in preprocessor_config.json"
        )
    try:
        return processor_class.from_pretrained(folder)
    except Exception as error:  # of any class: the library checks each setting in its own way
        name = processor_class.__name__.removesuffix("Pil")
        sizes = {key: stored[key] for key in ("size", "crop_size", "max_image_size", "pad_size") if key in stored}
        raise ModelError(
            f"{folder}: {name} cannot be made of preprocessor_config.json (or processor_config.json): {error}; it has "
            f"{sizes}, and a size is height and width, shortest_edge with or without longest_edge, or max_height and "
            "max_width; correct it, or download the file again"
        ) from error
