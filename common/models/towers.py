"""The vision tower of a checkpoint that names it: inside its weights, in a folder, in the hub's cache, or on the hub."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.models.parts import tower_settings, tower_weights
from vlm_distill_cache.common.models.published_configs import KNOWN_TOWERS, TOWER_PREFIX
from vlm_distill_cache.common.models.weight_files import Weights
from vlm_distill_cache.common.printing import one_line

_LONGEST = 1000  # characters of a tower's name or folder


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A tower that was found.

    Attributes:
        settings: Its configuration, as plain JSON.
        folder: Where it lies outside of the checkpoint; None: nowhere else.
        inside: Whether the checkpoint's own weights are the ones to use.
    """

    settings: dict[str, Any]
    folder: Path | None
    inside: bool

    def replace(self, weights: Weights) -> Weights:
        """A checkpoint's weights with those of this tower, under the checkpoint's names."""
        if self.inside or self.folder is None:
            return weights
        others = {name: value for name, value in weights.items() if not name.startswith(TOWER_PREFIX)}
        return others | {TOWER_PREFIX + name: value for name, value in tower_weights(self.folder).items()}


def holds_tower(names: Iterable[str]) -> bool:
    """Whether a checkpoint's weights hold its tower."""
    return any(name.startswith(TOWER_PREFIX) for name in names)


def find_tower(directory: Path, stored: Mapping[str, Any], *, given: Path | None, inside: bool) -> Tower:
    """Find the tower of a checkpoint.

    Args:
        stored: The checkpoint's ``config.json``; ``mm_vision_tower`` is a folder, from there or here, or a name.
        given: Directory of a tower to use in place of any other.
        inside: Whether the checkpoint's weights hold one.

    Raises:
        ModelError: If it cannot be had: what to type.
    """
    if given is not None:
        if not (given / "config.json").is_file():
            raise ModelError(f"vision_tower {given}: no config.json; give a directory with a CLIP model")
        return Tower(settings=tower_settings(given), folder=given, inside=False)
    key = "vision_tower" if not stored.get("mm_vision_tower") and stored.get("vision_tower") else "mm_vision_tower"
    named = stored.get(key) or ""
    if not isinstance(named, str) or not named.isprintable() or len(named) > _LONGEST:
        raise ModelError(
            f"{directory}: {key} in config.json is {one_line(repr(named), limit=60)}, expected a CLIP model's name on the hub "
            f"or its folder; {_remedy('')}"
        )
    folder = next((path for path in (directory / named, Path(named)) if _is_model(path)), None)
    if not named or folder == directory:
        folder = None
    if inside and (folder is not None or named in KNOWN_TOWERS):
        settings = KNOWN_TOWERS[named] if folder is None else tower_settings(folder)
        return Tower(settings=settings, folder=folder, inside=True)
    folder = folder or _on_the_hub(directory, named, inside=inside)
    return Tower(settings=tower_settings(folder), folder=folder, inside=inside)


def _on_the_hub(directory: Path, named: str, *, inside: bool) -> Path:
    lack = (
        f"{directory}: its vision tower {named!r} is not one that is known by name ({', '.join(KNOWN_TOWERS)})"
        if inside
        else f"{directory}: its weights hold no vision tower, config.json names {named!r}"
    )
    remedy = _remedy(named)
    # A name on the hub is org/name: any other is a folder of whoever trained the model.
    if named.count("/") != 1 or named.startswith(("/", ".")):
        raise ModelError(f"{lack}, and there is no such folder; {remedy}")
    try:
        return model_folder(named, what=f"{directory}: the vision tower").path
    except (ConfigError, ModelError) as error:
        raise ModelError(f"{lack}; {remedy}. It was looked for: {error}") from error


def _remedy(named: str) -> str:
    model, name = named or "the CLIP model that it was trained with", named or "DIR"
    return (
        f"give {model} by its name on the hub or as a folder (a student: "
        f"{by_make(f'SET=vision_tower={name}, --set', f'--set vision_tower={name}')}; anything else: "
        f"`distill import` with --vision-tower {name})"
    )


def _is_model(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file()
    except OSError:  # a name longer than any file's
        return False
