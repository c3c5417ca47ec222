"""What a student's ``config.json`` says beyond its class: layers of other sizes, fewer visual tokens.

One key of the configuration, ``distilled``, names the changes and where the model keeps its parts. A model of the
library becomes an instance of a class of the same name with `Changed` in front; our own classes apply changes
themselves. Both are saved, loaded and exported like any other model: where this project is not installed, this code lies
beside the weights (``auto_map``), and `__getattr__` makes the class that it names.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.changes import APPLIED
from vlm_distill_cache.common.models.llava import LlavaOfAnyDepth as _LlavaOfAnyDepth  # as found here, it is changed

CHANGES = "distilled"
"""The key of the configuration: ``{"parts": {"language_model": PATH, "vision_tower": PATH, "projector": PATH}, ...}``."""


class Changed:
    """Put in front of a class of the library: its models are as their configuration's ``distilled`` says."""

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        apply_changes(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the library may not name weights in files as it does for its own class."""
        return False


@cache
def changed_class(model_class: Any) -> Any:
    """A class of the library with `Changed` in front, of the same name; one that has it already is returned."""
    if issubclass(model_class, Changed):
        return model_class
    return type(model_class.__name__, (Changed, model_class), {"__module__": __name__, "__doc__": model_class.__doc__})


def __getattr__(name: str) -> Any:
    """The changed class of a name of the library's, or of LLaVA's: what ``auto_map`` asks this module for."""
    ours = {_LlavaOfAnyDepth.__name__: _LlavaOfAnyDepth}
    found = ours.get(name) if name.startswith("_") or name in ours else getattr(transformers, name, None)
    if not isinstance(found, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")  # noqa: TRY004 - as Python's own
    return changed_class(found)


def changes_of(config: Any) -> dict[str, Any]:
    """What a configuration says is changed, by name; empty for a model as its class makes it."""
    return {name: value for name, value in (getattr(config, CHANGES, None) or {}).items() if name != "parts"}


def apply_changes(model: Any) -> None:
    """Change a model that was just made, before its weights are read.

    Raises:
        ModelError: If the configuration names a change that this version does not know, or no place for it.
    """
    stored = getattr(model.config, CHANGES, None)
    if stored is None:
        return
    parts = stored.get("parts") if isinstance(stored, Mapping) else None
    if not isinstance(parts, Mapping) or not all(isinstance(path, str) for path in parts.values()):
        raise ModelError(f"config.json: {CHANGES} is {str(stored)[:80]!r}; expected an object with `parts`, its paths")
    for name, path in parts.items():
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"config.json: {CHANGES}.parts: {str(name)[:40]} is {path[:80]!r}, which {type(model).__name__} does not have; "
                "copy the file again from where the model was made"
            ) from None
    if unknown := sorted(changes_of(model.config).keys() - APPLIED.keys()):
        raise ModelError(
            f"config.json: {CHANGES} names {', '.join(unknown)}, which this version does not know; expected some of "
            f"{', '.join(sorted(APPLIED))}: use the version that wrote it, or a newer one"
        )
    for name, value in changes_of(model.config).items():
        APPLIED[name](model, parts, value)


def change_model(model: Any, parts: Mapping[str, str], **changes: Any) -> None:
    """Change a model that has its weights, and say so in its configuration, so that it is saved as it is now.

    Args:
        model: Ours or the library's, without wrappers.
        parts: Paths of ``language_model``, ``vision_tower`` and ``projector``.
        changes: By name as in `APPLIED`, JSON; None takes one back that can be taken back.
    """
    stored = {**(getattr(model.config, CHANGES, None) or {}), "parts": dict(parts), **changes}
    setattr(model.config, CHANGES, {name: value for name, value in stored.items() if value is not None})
    if not getattr(model, "applies_changes", False):
        model_class: Any = type(model)
        model.__class__ = changed_class(model_class)
    for name, value in changes.items():
        APPLIED[name](model, parts, value)
