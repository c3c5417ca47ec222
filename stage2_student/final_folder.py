"""The folder ``final`` of a finished training: what it says of itself, and whether it is whole. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.document_rules import GEOMETRY, MAX_TOKEN, TEMPLATE
from vlm_distill_cache.common.cache.other_folders import STUDENT
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.files.rules import (
    ANYTHING,
    OBJECT,
    also,
    check,
    either,
    entries,
    items,
    maybe,
    number,
    one_of,
    record,
    text,
    whole,
)
from vlm_distill_cache.common.files.signed import find_damage, read_signed
from vlm_distill_cache.common.hub import HubFolder, model_folder, snapshot_name
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.terminal.command_line import quoted

FINAL, PROVENANCE = "final", STUDENT
BEST, BEFORE = "best", "best-before"  # kept while a student trains; the one that it follows, until the next checkpoint
FOR_OTHERS = ("adapter", "gguf")  # layouts of exports that hold no model which is read here
_COUNT = whole(0, 1 << 60)
_ENCODER = {"template": TEMPLATE, "image_token_id": whole(-MAX_TOKEN, MAX_TOKEN), "max_length": whole(1, 1 << 24)}
_UNSIGNED = {
    "fingerprint": text(100),
    **dict.fromkeys(("caches", "config"), OBJECT),
    "encoder": also(
        record(_ENCODER, {"geometry": GEOMETRY, "layout": text(100)}, free=True),
        "a geometry, or the layout of older versions",
        lambda encoder: bool({"geometry", "layout"} & encoder.keys()),
    ),
    "vocabulary": record({}, {"entries_read": _COUNT, "entries_beyond": _COUNT}),
}
_FILES = entries(ANYTHING, most=100_000)
_QUANTISED = maybe(one_of("8bit", "4bit"))
_EXPORT = {
    "layout": text(100),
    "dtype": text(100),
    "quantise": _QUANTISED,
    "made_from": record({"files": _FILES, "export": maybe(OBJECT)}),
}
_WORDS = text(1 << 16)
# For people, on the card: as `scores.origin` writes it.
_ORIGIN = record(
    {},
    {
        "caches": items(entries(maybe(either(_WORDS, _COUNT, items(_WORDS, most=1000))), most=100), most=1000),
        "bases": entries(_WORDS, most=100),
        "license": _WORDS,
        "cut": entries(maybe(either(_WORDS, _COUNT)), most=100),
        "phases": items(
            entries(either(_WORDS, number(-1e300, 1e300), entries(number(-1e300, 1e300), most=100)), most=100), most=100
        ),
        "versions": entries(_WORDS, most=100),
    },
)
# Of a student that was kept on the way: after which step of which run, and by which score of what.
_KEPT = record(
    {"step": whole(1, 1 << 60), "by": text(100), "value": number(-1e300, 1e300), "of": text(100), "run": text(100)}
)
_RULE = also(
    record(_UNSIGNED, {"files": _FILES, "export": record(_EXPORT), "origin": _ORIGIN, "best": _KEPT}),
    "a list that names config.json and the weights",
    lambda found: "files" not in found or "export" in found or _names_a_model(found["files"]),
)
# What the libraries read of a model's folder if it is there.
IS_READ = re.compile(
    r".*(?:config|token|vocab|template|processor|index)[^/]*\.json|(?:.*/)?(?:merges|vocab)\.txt"
    r"|.*\.(?:safetensors|bin|pt|pth|h5|msgpack|gguf|model|jinja|py)"
)
_log = logging.getLogger(__name__)


def _names_a_model(files: Any) -> bool:
    """Whether what `train()` saves is listed; each layout of an export has files of its own."""
    names = files if isinstance(files, dict) else ()
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def read_final(folder: Path) -> dict[str, Any]:
    """What a trained student says of itself, after a look at every byte of the files that it lists.

    Other files may lie beside them (a card, say), unless libraries would read them.

    Raises:
        ModelError: If the folder is no trained student of ours, or is damaged.
        ConfigError: If the system does not let it be read.
    """
    try:
        found, damage = look_at_final(folder)
    except FileNotFoundError:
        raise ModelError(f"{folder}: {without_provenance(folder)}") from None
    if damage:
        again = (
            "export the student again (`distill export`)"
            if "export" in found
            else "run the command that trained this student again: it makes the folder anew from what is left"
        )
        raise ModelError(
            f"{damage[0]}; {again}. Copy a copy again. A student that is to be changed by hand is an export without its "
            f"{PROVENANCE}: anybody's model"
        )
    return found


def read_openable(folder: Path) -> dict[str, Any]:
    """As `read_final`, of a folder that holds a model which is read here.

    Raises:
        ModelError: Also if it is an export for other programs.
    """
    provenance = read_final(folder)
    layout = provenance.get("export", {}).get("layout")
    if layout in FOR_OTHERS:
        raise ModelError(
            f"{folder}: an export in layout {layout}, which other programs read; give the student that it was made of"
        )
    return provenance


def without_provenance(folder: Path) -> str:
    """What a folder is that does not say what it was trained from, and what can be done with it."""
    if (folder / "adapter_config.json").is_file():
        return f"adapters of peft without {PROVENANCE}: load them with peft on the model that they were trained on"
    if (folder / "config.json").is_file():
        place = quoted(folder)
        return (
            f"a model without {PROVENANCE}, as `save_student` and `save_model` write it from Python, or anybody's. It needs no "
            f"export, from_pretrained opens it as it is; `hf upload org/name {place}` publishes it, `distill evaluate {place} "
            f"--cache CACHE` scores it, and `distill train --student {place} ...` trains a student with {PROVENANCE}"
        )
    return f"no {PROVENANCE}; give the `final` folder of a finished training (distill train, distill run)"


def look_at_final(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What a folder says of itself, empty if that cannot be read; and what is damaged, a text each.

    Raises:
        FileNotFoundError: If it does not say what it is.
        ModelError: If there is a file more that libraries would read; it is somebody's, so nothing removes it.
        ConfigError: If the system does not let it be read.
    """
    try:
        found = read_provenance(folder)
    except CacheFormatError as error:
        return {}, [str(error)]
    if "files" not in found:
        _log.warning(
            "%s: written by an older version, without digests: whether its files are whole is not known; train it again, "
            "with another --output, for a student that is checked",
            folder,
        )
        return found, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in found["files"] and name != PROVENANCE and IS_READ.fullmatch(name):
            raise ModelError(
                f"{path}: none of the files that {PROVENANCE} lists, and whoever loads the student would read it; move it away"
            )
    listed = found["files"]
    if snapshot_name(folder) is not None:  # code and folders of a repository are never fetched, nor needed here
        listed = {
            name: entry
            for name, entry in listed.items()
            if (folder / name).exists() or not (name.endswith(".py") or "/" in name)
        }
    return found, find_damage(folder, listed)


def students_in(folder: Path) -> list[Path]:
    """The trained students of a run's or a training's folder, the distilled one first, those kept on the way last."""
    parts = [f"{place}{name}" for name in (FINAL, BEST) for place in ("", "distilled/", "sft/")]
    return [folder / part for part in parts if (folder / part / PROVENANCE).is_file()]


def trained_folder(student: str) -> HubFolder:
    """The folder of a trained student; of one that is lost, its run is named."""
    path = Path(student)
    if path.is_file():
        inside = path.parent if (path.parent / PROVENANCE).is_file() else "the `final` folder of a training"
        raise ModelError(f"{student} is a file; give {inside}")
    found = [] if (path / PROVENANCE).exists() else students_in(path if path.is_dir() else path.parent)
    if found:
        meant = " or ".join(map(quoted, found))
        raise ModelError(
            f"{student} is the folder of a run or a training; give a student in it: {meant}"
            if path.is_dir()
            else f"{student} is not there; is {meant} meant?"
        )
    if not path.is_dir() and any((path.parent / name).exists() for name in ("config.yaml", "checkpoints")):
        raise ModelError(
            f"{student} is not there, but {path.parent} holds its training: run the command that trained it again, which makes "
            "the folder anew from what is left"
        )
    return model_folder(student, what="student")


def own_file(path: Path) -> Path:
    """Where the bytes of a student's file lie that no digest covers: there, or among the blobs of the hub's cache.

    Raises:
        ModelError: If it is a link to anything else, which may be a file that nobody meant to show.
    """
    if not path.is_symlink():
        return path
    found, folder = Path(os.path.realpath(path)), path.parent.resolve()
    if snapshot_name(folder) is None or found.parent != folder.parent.parent / "blobs":
        raise ModelError(f"{path}: a link, which is not followed; put the file itself there, or take the link away")
    return found


def refuse_other_student(
    folder: Path, identity: str, *, earlier: str | None = None, why: Callable[[], str] = str
) -> list[str] | None:
    """Refuse to train over another student than ``identity``, the fingerprint of what is to be trained.

    Args:
        earlier: Of a shorter training that is gone on with.
        why: Gives in what the two differ, for the error.

    Returns:
        What is damaged of the student that is there, a text each; None if there is none.

    Raises:
        ConfigError: If it is another one.
    """
    try:
        found, damage = look_at_final(folder)
    except FileNotFoundError:
        return None
    if found and found["fingerprint"] not in (identity, earlier):
        raise ConfigError(
            f"{folder} belongs to another run: fingerprint {found['fingerprint']} there, {identity} now (configuration, "
            f"cache or data differ{why()}). Use the same options, another --output{by_make(' (OUTPUT=...)')}, or delete that folder"
        )
    return damage


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a trained student says of itself; its files are not looked at.

    Raises:
        FileNotFoundError: If it does not say what it is.
        CacheFormatError: If what it says is damaged.
        ConfigError: If the system does not let it be read.
    """
    path = folder / PROVENANCE
    # In the hub's cache it is a link.
    found = read_signed(Path(os.path.realpath(path)), unsigned=_UNSIGNED.keys())
    check(found, _RULE, str(path), remedy="train again, or copy the folder again")
    return found
