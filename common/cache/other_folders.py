"""What a folder is that is no cache, for errors: whoever names the wrong folder is told which one it is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, read_bounded, read_json
from vlm_distill_cache.common.locations import nearest_path
from vlm_distill_cache.common.printing import one_line

PLAN, MANIFEST, SHARDS = "plan.json", "manifest.json", "shards"
SKETCH = "sketch.txt"  # beside the plan of a cache that was only looked at
IS_SKETCH = (
    "a sketch of a cache, as `teacher-cache build --dry-run --sketch` writes it, and no cache: it goes with `distill run --dry-run "
    "--sketch`; build the cache in a folder of its own"
)
_SKETCH_BEGINS = b"a sketch of a cache"
_INDEX = "index.bin"
STUDENT = "distillation.json"  # of a trained student
_LOOKED_AT = 10_000  # entries of a folder
_DATA = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar", ".arrow")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def is_part_of_cache(folder: Path) -> bool:
    """Whether a folder holds names that a cache has; others have them, too: for the words of an error, never for a refusal."""
    shards = folder / SHARDS
    return any((folder / name).is_file() for name in (PLAN, MANIFEST, _INDEX)) or (
        shards.is_dir()
        and any(path.suffix == ".json" or (len(path.name) == 2 and path.name.isdigit()) for path in shards.iterdir())
    )


def is_sketch(folder: Path) -> bool:
    """Whether a folder is a sketch of a cache: others may have a file of that name."""
    with contextlib.suppress(OSError, CacheFormatError):
        return (folder / PLAN).is_file() and read_bounded(folder / SKETCH).startswith(_SKETCH_BEGINS)
    return False


def _has_ours(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys, by which ours is told from others of its name."""
    with contextlib.suppress(OSError, CacheFormatError):
        found = read_json(Path(os.path.realpath(path)))  # in the hub's cache a file is a link
        return isinstance(found, dict) and found.keys() >= {*keys}
    return False


def cache_above(place: Path) -> Path | None:
    """The cache, or the sketch of one, that a place lies in; None: in none."""
    for above in Path(os.path.realpath(place)).parents:
        if is_sketch(above) or (
            (above / SHARDS).is_dir()
            and (
                _has_ours(above / PLAN, "format_version", "checksum", "signals")
                or _has_ours(above / MANIFEST, "format_version", "checksum", "plan_hash")
            )
        ):
            return above
    return None


def refuse_inside(target: Path) -> None:
    """Refuse to write into a cache or a student's folder: what is no part of it would make it count as damaged.

    Files of others that merely have such names (``shards``, ``sketch.txt``, ``distillation.json``) are in nobody's way.

    Raises:
        ConfigError: If a folder above ``target`` is one; ``target`` itself may be.
    """
    for above in Path(os.path.realpath(target)).parents:
        if _has_ours(above / STUDENT, "fingerprint", "caches"):
            what = f"{above}, a student's folder"
            break
    else:
        if (cache := cache_above(target)) is None:
            return
        what = f"{cache}, a cache"
    raise ConfigError(f"{target} lies in {what}, which takes nothing else; give a place outside of it")


def describe_folder(folder: Path) -> str:
    """What a place without a plan looks like, and what of it may have been meant, in half a sentence."""
    try:
        if not folder.exists():
            return f"there is no such folder{nearest_path(folder)}"
        if not folder.is_dir():
            return "it is a file; give the folder of a cache"
        entries = [path for path, _ in zip(folder.iterdir(), range(_LOOKED_AT), strict=False)]
        names = {path.name for path in entries if not path.name.startswith(TEMPORARY_PREFIX)}
        if is_part_of_cache(folder):
            return f"it is a part of a cache, whose {PLAN} is lost: copy the cache again from where it came from"
        inside = sorted(path.name for path in entries if path.is_dir() and (path / PLAN).is_file())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if above := cache_above(folder):
        return f"it is a part of the cache {above}: give that"
    if not names or names == {SHARDS}:
        return "it is empty"
    if inside:
        more = f" (and {len(inside) - 1} more)" if len(inside) > 1 else ""
        return f"but {one_line(folder / inside[0])} in it is one{more}: give that"
    if "run.json" in names:
        return (
            "it looks like the folder of a `distill run`; the `cache` in sft/config.yaml there says which cache it read"
        )
    if STUDENT in names:
        return "it looks like a trained student; `distill evaluate` and `distill export` take it"
    if "config.yaml" in names and names & {"checkpoints", "log.jsonl", "final"}:
        return "it looks like the folder of a `distill train`; the `cache` in its config.yaml says which cache it read"
    kinds = {Path(name).suffix.lower() for name in names}
    if "config.json" in names and kinds.intersection(_WEIGHTS):
        return "it looks like a model; as a teacher it is given by --teacher, as a student by --student"
    if kinds.intersection((*_DATA, *_PICTURES)) or "dataset_info.json" in names:
        return "it looks like a data set; `teacher-cache build --data` builds a cache of it"
    return f"it holds {', '.join(map(one_line, sorted(names)[:3]))}{', ...' if len(names) > 3 else ''}"
