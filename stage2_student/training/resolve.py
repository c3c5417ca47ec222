"""From a preset of phases, a recipe, a user's YAML and the command line to what a run is, and its caches. Imports no torch."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.config import (
    canonical_overrides,
    canonical_values,
    config_to_dict,
    last_given,
    load_config,
    read_stage,
)
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.rules import shown
from vlm_distill_cache.common.hub import hub_name, model_folder
from vlm_distill_cache.common.recipes import Recipe, split_recipe
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.data.sources.mixture import own_caches
from vlm_distill_cache.stage2_student.config import MODELS, PHASE_NAMES, TrainConfig, choose_size
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.pruned_folder import RECORD, kept_share, read_settings
from vlm_distill_cache.stage2_student.students.presets import LIBRARY_STUDENTS, STUDENTS, split_student_name

PRESETS = Path(__file__).parents[1] / "presets"


def resolve_config(path: Path | None, overrides: Sequence[str], *, teacher_width: int) -> TrainConfig:
    """A preset, then a recipe if one is named, then a user's YAML, then ``a.b=c`` overrides.

    ``teacher_width`` is of the cached teacher's language model; it picks the preset for student size ``auto``.

    Raises:
        ConfigError: For an unknown or unusable option.
    """
    recipe, given = given_options(path, overrides)
    student = _student_folder(last_given(given, "student"))
    preset = PRESETS / f"{phases_preset(student, teacher_width)}.yaml"
    of_recipe = [] if recipe is None else _flatten(_all_losses(recipe.stage_two))
    where = f"options ({path}, command line)" if path else "options"
    options = [*_one_length(of_recipe), *given]
    return with_folders(load_config(TrainConfig, preset, options, where=where))


def given_options(path: Path | None, overrides: Sequence[str]) -> tuple[Recipe | None, list[str]]:
    """The recipe that is named, and all other options of a user's YAML and the overrides, as ``a.b=c`` in our own words.

    Raises:
        ConfigError: If there is no such file or recipe.
    """
    recipe, values, overrides = split_recipe(read_stage(path, "distill"), overrides)
    values = canonical_values(TrainConfig, values, where=str(path))
    return recipe, [*_one_length(_flatten(values)), *_one_length(canonical_overrides(TrainConfig, overrides))]


def with_folders(config: TrainConfig) -> TrainConfig:
    """The same run with its models as folders: names on the hub are looked up, and downloaded where they are not there.

    Raises:
        ModelError: If there is no such model.
        TransferError: If one could not be downloaded.
    """
    others = [name for name in MODELS if name not in ("student", "teacher") and getattr(config, name) is not None]
    if kept_share(config.student) is not None:
        others.append("teacher")
    found: dict[str, Any] = {name: _folder(getattr(config, name), name) for name in others}
    return replace(config, student=_student_folder(config.student), **found)


def _student_folder(student: str) -> str:
    """A student's folder, where it is neither given by a short name nor cut out of its teacher."""
    by_name = split_student_name(student)[0] in (*STUDENTS, *LIBRARY_STUDENTS) or kept_share(student) is not None
    return (
        student
        if by_name or (hub_name(student) is None and not Path(student).is_dir())
        else _folder(student, "student")
    )


def _folder(given: str, what: str) -> str:
    found = model_folder(given, what=what)
    return str(found.path) if found.revision else given


def open_caches(
    config: TrainConfig, *, opening: Callable[[str], TeacherCache] | None = None
) -> dict[str, TeacherCache]:
    """Open each cache that the phases of a run read, by the folder or address that configuration or mixture names.

    Args:
        opening: How; None: to be trained on.

    Raises:
        CacheFormatError: If one is not sealed, damaged or no cache, or holds what no teacher says.
        TransferError: If an address cannot be read.
    """
    phases = [config.phase(name) for name in config.phases]
    places = dict.fromkeys(
        place for phase in phases for place in own_caches(phase.data, str(phase.cache)) or [str(phase.cache)]
    )
    if opening is not None:
        return {place: opening(place) for place in places}
    # Twice the window: a step may begin the next window while loading threads still read the last.
    return {place: open_trusted(place, open_shards=2 * config.shuffle_window, verify=config.verify) for place in places}


def phases_preset(student: str, teacher_width: int) -> str:
    """The preset of phases that a student is trained by: how it was made, and whether it is a demonstration."""
    tiny = _size_of(student, teacher_width) == "tiny"
    if kept_share(student) is not None or (Path(student) / RECORD).is_file():
        return "phases-pruned-tiny" if tiny else "phases-pruned"
    return "phases-tiny" if tiny else "phases-published"


def _size_of(student: str, teacher_width: int) -> str:
    """The size a student is trained like: the one in its name, a directory's by its width, else by the teacher."""
    found = read_settings(Path(student) / "config.json")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # the loader says what is wrong with it
        return choose_size(int(found.get("text_config", found)["hidden_size"]))
    _, size = split_student_name(student)
    return choose_size(teacher_width) if size == "auto" else size


def _one_length(given: list[str]) -> list[str]:
    """Options, and none in place of the steps or epochs below them: whoever gives one of the two means it instead."""
    keys = {item.partition("=")[0] for item in given}
    pairs = [(f"{phase}.steps", f"{phase}.epochs") for phase in PHASE_NAMES]
    others = [(one, other) for pair in pairs for one, other in (pair, pair[::-1])]
    return given + [f"{other}=null" for one, other in others if one in keys and other not in keys]


def _all_losses(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options, with no losses of a phase but its own where it names any."""
    none = config_to_dict(LossWeights())
    phases = {name: value for name, value in values.items() if name in PHASE_NAMES and "losses" in value}
    return {**values, **{name: {**phase, "losses": none | phase["losses"]} for name, phase in phases.items()}}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested options as ``a.b=c``.

    Raises:
        ConfigError: For a value that only YAML has, such as a date.
    """
    flat: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            try:
                flat.append(f"{prefix}{key}={json.dumps(value)}")
            except TypeError as error:
                raise ConfigError(
                    f"option {prefix}{key} is {shown(value)}; expected texts, numbers, true, false, lists or mappings; put "
                    "texts in quotes"
                ) from error
    return flat
