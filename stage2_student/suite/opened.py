"""A model of anybody's, opened to be asked: a student of ours, a teacher, any model that the library reads.

A student of ours reads as it was trained. Another model reads by its own processor and its family's template; or, with a
cache, as a student that is trained from it would.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.common.hub import HubFolder
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage2_student.final_folder import BEFORE, BEST, FINAL, IS_READ, PROVENANCE, read_openable
from vlm_distill_cache.stage2_student.scores.token_words import token_words
from vlm_distill_cache.stage2_student.training.stamp import COMPARED


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is asked, which need not be loaded.

    Attributes:
        folder: Where it lies.
        cache: As which cache's teacher it reads; None: in its own way.
        name: What tables call it.
        fingerprint: Of its weights and settings, and of how it reads.
        trained: Whether it is a student of ours.
        said: Further facts for readers of the scores.
    """

    folder: Path
    cache: str | None
    name: str
    fingerprint: str
    trained: bool
    said: Mapping[str, Any] = field(default_factory=dict)


def find_model(folder: HubFolder, cache: str | None) -> Model:
    """Look at a model without loading it; every byte of it is read once.

    Args:
        folder: As from `final_folder.trained_folder`.
        cache: For a model that is no student of ours.

    Raises:
        ConfigError: A cache is given for a student of ours.
        ModelError: It is damaged, or an export for other programs.
        CacheFormatError, TransferError: The cache cannot be opened.
    """
    path = folder.path
    name = folder.name if folder.revision else _called(path.resolve())
    tokens = token_words(path)
    if (path / PROVENANCE).exists():
        if cache is not None:
            raise ConfigError(f"--cache: {path} says itself how it reads ({PROVENANCE}); leave the option out")
        provenance = read_openable(path)
        said = {"trained_from": sorted(provenance["caches"]), "student": provenance["fingerprint"], **tokens}
        identity = [provenance["fingerprint"], provenance.get("files"), provenance.get("export")]
        return Model(folder=path, cache=None, name=name, fingerprint=fingerprint(identity), trained=True, said=said)
    names = sorted(file.name for file in path.iterdir() if file.is_file() and IS_READ.fullmatch(file.name))
    read = {"files": list_files(path, names), "cache": None if cache is None else open_trusted(cache).manifest_hash}
    said = tokens | ({} if cache is None else {"reads_as": cache})
    return Model(folder=path, cache=cache, name=name, fingerprint=fingerprint(read), trained=False, said=said)


def _called(folder: Path) -> str:
    """What tells a model from others: names that every run gives have those of the folders around them before them."""
    names = [folder.name]
    for around in folder.parents:
        if names[0] not in (FINAL, BEST, BEFORE, *COMPARED):
            break
        names.insert(0, around.name)
    return " ".join(name for name in names if name not in ("", FINAL)) or folder.name


def load_model(found: Model, *, device: str | None = None) -> tuple[Any, SampleEncoder]:
    """Load a model onto a device, in evaluation mode, with the encoder that fits it.

    Students of ours, and models that read by a cache, are float32, as `distill evaluate` has them; others are float32 on a
    CPU and bfloat16 elsewhere, as stage one has a teacher.

    Args:
        device: None: an accelerator if there is one.

    Raises:
        ModelError: It cannot be opened.
    """
    import torch

    from vlm_distill_cache.stage2_student.students.parts import lone_encoder, lone_parts
    from vlm_distill_cache.stage2_student.trained_student import open_model, open_student

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if found.trained:
        student = open_student(found.folder, device=device)
        return student.model, student.encoder
    if found.cache is not None:
        student = open_model(found.folder, found.cache)
        return student.model.to(device), student.encoder
    parts = lone_parts(found.folder, dtype="float32" if device == "cpu" else "bfloat16")
    return parts.load().eval().to(device), lone_encoder(parts)
