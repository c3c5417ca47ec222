"""Students by name: which there are, in which sizes, and what their preset files say. Imports no torch.

Our own (`STUDENTS`) can be built here: ``mobilevlm``, ``mobilevlm-v1``, ``compodistill``, with a size behind a
dash or by the teacher's. Those of the model library (`LIBRARY_STUDENTS`) are downloaded weights: a name checks that
a directory holds that model. Each name and size has one YAML file with its source and its published numbers.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.rules import shown
from vlm_distill_cache.common.locations import by_make, nearest, nearest_path

# A student should be clearly smaller than its teacher: widths up to each bound get the size beside it. The
# published pairing is teacher MobileVLM_V2-7B (4096) -> student V2-1.7B.
AUTO_SIZES = ((512, "tiny"), (4096, "1.7b"))
LARGEST = "3b"
SIZES_OF: dict[str, tuple[str, ...]] = {
    "mobilevlm": ("tiny", "1.7b", "3b"),
    "mobilevlm-v1": ("tiny", "1.7b", "3b"),
    "compodistill": ("tiny", "2b"),
}
STUDENTS = tuple(SIZES_OF)
LIBRARY_STUDENTS = ("qwen2.5-vl-3b", "smolvlm")
# What is compared between a preset and a directory's config.json, where both say it.
_NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def split_student_name(student: str) -> tuple[str, str]:
    """Split name and size: ``mobilevlm-v1-tiny`` -> ``("mobilevlm-v1", "tiny")``; anything else stays whole."""
    for name, sizes in SIZES_OF.items():
        for size in sizes:
            if student == f"{name}-{size}":
                return name, size
    return student, "auto"


def student_names() -> list[str]:
    """All names, with and without a size."""
    return [*SIZES_OF, *(f"{name}-{size}" for name, sizes in SIZES_OF.items() for size in sizes), *LIBRARY_STUDENTS]


def describe_students() -> str:
    """All names, for errors."""
    own = [f"{name}[-{'|'.join(sizes)}]" for name, sizes in SIZES_OF.items()]
    return ", ".join([*own, *LIBRARY_STUDENTS])


def load_preset(size: str, student: str = "mobilevlm") -> dict[str, Any]:
    """Read the preset of a student's size: source, initializer, projector, language model, vision tower."""
    sizes = SIZES_OF[student]
    if size not in sizes:
        raise ConfigError(f"student {student}: size {size!r}; choose auto, {', '.join(sizes)}")
    return _read_preset(f"{student}-{size}")


def fit_size(student: str, size: str) -> str:
    """The size of a student for one that the teacher's width chose: its own largest where it has no such size."""
    return size if size in SIZES_OF[student] else SIZES_OF[student][-1]


def student_folder(student: str, weights: str | None) -> Path | None:
    """The directory that a student is loaded from; None for one that is built from its preset.

    Raises:
        ConfigError: If there is no such student, it needs weights, or the directory holds another model.
    """
    name, size = split_student_name(student)
    if name in LIBRARY_STUDENTS and weights is None:
        preset = _read_preset(name)
        raise ConfigError(
            f"student {name} is {preset['model_class']} of the model library and needs weights: give their name on the hub "
            f"({by_make('SET=', '--set ')}student_weights={preset['download']}, or "
            f"{by_make('STUDENT=', '--student ')}{preset['download']}), or a folder instead"
        )
    if name in LIBRARY_STUDENTS or name in STUDENTS:
        if weights is not None:
            presets = [name] if name in LIBRARY_STUDENTS else [f"{name}-{size}"]
            if size == "auto" and name in STUDENTS:
                presets = [f"{name}-{one}" for one in SIZES_OF[name]]
            _check_weights(student, Path(weights), [_read_preset(one) for one in presets])
        return None if weights is None else Path(weights)
    if weights is not None:
        raise ConfigError(
            f"student_weights={weights}: goes with a student's name ({describe_students()}), not with student={shown(student)}"
        )
    if not Path(student).is_dir():
        raise ConfigError(
            f"student: {shown(student)} is neither a known student ({describe_students()}) nor a directory, nor a "
            "name on the hub (org/name[@revision], such as mtgv/MobileVLM_V2-1.7B)"
            f"{nearest(student, student_names()) or nearest_path(student)}"
        )
    return Path(student)


def _check_weights(student: str, folder: Path, presets: list[dict[str, Any]]) -> None:
    """Refuse a directory of another model than a name promises."""
    try:
        stored = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"student_weights={folder}: no readable config.json ({error}); give {_weights(presets[-1])}"
        ) from error
    kinds = sorted({kind for preset in presets for kind in preset["model_types"]})
    if stored.get("model_type") not in kinds:
        raise ConfigError(
            f"student_weights={folder}: model_type is {stored.get('model_type')!r}, {student} is {' or '.join(kinds)}; "
            f"give {_weights(presets[-1])}, or {by_make('STUDENT=', '--student ')}{folder}"
        )
    differences = [_differences(stored, preset) for preset in presets]
    if all(differences):
        raise ConfigError(
            f"student_weights={folder}: is no {student}: {'; '.join(differences[-1])}; give "
            f"{_weights(presets[-1])}, or {by_make('STUDENT=', '--student ')}{folder}"
        )


def _weights(preset: Mapping[str, Any]) -> str:
    """What to give as weights: a name on the hub where they are published there, or a folder."""
    published = str(preset["download"])
    return (
        f"{by_make('SET=', '--set ')}student_weights={published} or a folder of it"
        if "/" in published
        else f"a folder of {published}"
    )


def _differences(stored: Mapping[str, Any], preset: Mapping[str, Any]) -> list[str]:
    text = stored.get("text_config")
    found = {**stored, **(text if isinstance(text, dict) else {})}
    # As published; ours may be trained with another.
    projector = stored.get("mm_projector_type", preset.get("projector"))
    wrong = [] if projector == preset.get("projector") else [f"projector is {projector}, not {preset['projector']}"]
    return wrong + [
        f"{name} is {found[name]}, published {preset['language_model'][name]}"
        for name in _NUMBERS
        if name in found and preset["language_model"].get(name, found[name]) != found[name]
    ]


def _read_preset(name: str) -> dict[str, Any]:
    text = (resources.files("vlm_distill_cache.stage2_student.presets") / f"{name}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = yaml.safe_load(text)
    return preset


def choose_size(teacher_hidden_size: int) -> str:
    """Pick a size by the width of the teacher's language model."""
    for bound, size in AUTO_SIZES:
        if teacher_hidden_size <= bound:
            return size
    return LARGEST
