"""A checkpoint in its authors' layout written in one that loads anywhere here: one folder, safetensors, all that it reads with."""

import shutil
from pathlib import Path

from transformers import ImageProcessingMixin

from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.atomic import new_directory, read_json, write_json_atomic
from vlm_distill_cache.common.files.hashing import file_checksum
from vlm_distill_cache.common.models.checkpoint import Checkpoint
from vlm_distill_cache.common.models.original_llava import (
    is_original_llava,
    open_original_llava,
    original_image_processor,
)
from vlm_distill_cache.common.models.parts import describe_lost_tokenizer, has_tokenizer, read_config
from vlm_distill_cache.common.models.published import default_image_processor, open_published
from vlm_distill_cache.common.models.weight_files import weight_files

SOURCE = "converted_from.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_SHARD = "2GB"  # a file of weights is put together in memory


def convert_published(directory: Path, target: Path, *, vision_tower: Path | None = None) -> Path:
    """Write a published checkpoint, once: MobileVLM and CompoDistill in our own layout, LLaVA in the library's.

    A ``target`` that was written from the same original is left as it is.

    Args:
        directory: As for `open_published` or `open_original_llava`.
        vision_tower: As there.

    Returns:
        ``target``, with safetensors, tokenizer and image processor.

    Raises:
        ModelError: If ``target`` holds anything else, or the original cannot be loaded or has no tokenizer.
    """
    original = is_original_llava(directory)
    checkpoint = (open_original_llava if original else open_published)(directory, vision_tower=vision_tower)
    files = {"config.json": directory / "config.json"}
    files |= checkpoint.files or {path.name: path for path in weight_files(directory)}
    source = {name: file_checksum(path) for name, path in files.items()}
    if target.exists():
        try:
            found = read_json(target / SOURCE)
        except (FileNotFoundError, NotADirectoryError, CacheFormatError):
            found = None
        if found != source:
            raise ModelError(
                f"{target}: was not converted from {directory} as it is now; delete it or give another folder"
            )
        return target
    if not has_tokenizer(checkpoint.tokenizer_folder):
        raise ModelError(describe_lost_tokenizer(checkpoint.tokenizer_folder))
    with new_directory(target) as temporary:
        checkpoint.load().save_pretrained(temporary, max_shard_size=_SHARD)
        for name in _TOKENIZER:
            if (checkpoint.tokenizer_folder / name).is_file():
                shutil.copyfile(checkpoint.tokenizer_folder / name, temporary / name)
        _write_processor(checkpoint, temporary, original=original)
        write_json_atomic(temporary / SOURCE, source)
    return target


def _write_processor(checkpoint: Checkpoint, target: Path, *, original: bool) -> None:
    own = [name for name in _PROCESSOR if (checkpoint.where / name).is_file()]
    if not original and own:
        for name in own:
            shutil.copyfile(checkpoint.where / name, target / name)
        return
    processor = default_image_processor(checkpoint.config)
    if original:
        folder = next((one for one in checkpoint.processor_folders if (one / _PROCESSOR[0]).is_file()), None)
        if folder is not None:
            stored, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
            processor = type(processor).from_dict(stored)
        processor = original_image_processor(read_config(checkpoint.where), processor)
    processor.save_pretrained(target)
