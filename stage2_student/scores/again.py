"""How a student is made again, and what it is called: for its card and for the page of its run, without folders of a machine."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlm_distill_cache.common.config import config_to_dict
from vlm_distill_cache.common.hub import on_hub
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.recipes import merge_options, read_recipe, recipe_names
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.stage2_student.config import MODELS, PHASE_NAMES
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.pruned_folder import PREFIX

PRUNING = {"importance": "--importance", "depth_importance": "--depth-importance", "ratios": "--ratios",
           "spare_first": "--spare-first", "spare_last": "--spare-last"}  # fmt: skip


def shown_model(given: Any) -> str:
    """A model as its card names it: on the hub by repository and commit, else without the folders around it."""
    named = str(given or "unknown")
    return one_line(named if on_hub(named) else Path(named).name or named)


def student_name(config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """What a student is called: as it was cut, ``pruned:depth:0.75``, else as its card names models."""
    cut = origin.get("cut") or {}
    return one_line(cut["student"]) if cut.get("student") else shown_model(config.get("student"))


def reproduce(
    config: Mapping[str, Any], caches: Iterable[Mapping[str, Any]], verb: str, cut: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """The commands that make a student again, and the ``config.yaml`` that they take, without folders of this machine.

    Args:
        verb: Of ``distill``; ``train`` takes a student that is cut out of its teacher before.
        cut: What its `PROVENANCE` says of how it was cut (`describe_cut`).
    """
    left_out = {"output", "cache", *({*PHASE_NAMES} - {*config["phases"]})}
    told = {key: _without_folders(value) for key, value in config.items() if key not in left_out}
    told |= {name: _model(told[name]) for name in MODELS if told.get(name)}
    builds = list(dict.fromkeys(str(cache["command"]) for cache in caches if cache.get("command")))
    given = ""
    if cut and cut.get("student"):
        settings = {name: cut[name] for name in PRUNING if name in cut}
        if verb == "run":
            told["student"] = cut["student"]
            told["pruning"] = {**(told.get("pruning") or {}), **settings}
        else:
            told.pop("pruning", None)
            told["student"] = given = "STUDENT"
            words = " ".join(f"{PRUNING[name]} {value}" for name, value in settings.items())
            keep = str(cut["student"]).removeprefix(PREFIX)
            teacher = quoted(str(told.get("teacher") or "TEACHER"))
            builds.append(f"distill prune --teacher {teacher} --keep {keep} --data DATA {words} --output {given}")
            builds[-1] = builds[-1].replace("  ", " ")
    lines = [*builds, f"distill {verb} --config config.yaml --cache CACHE --output OUTPUT"]
    return "\n".join(lines), yaml.safe_dump(told, sort_keys=False, width=10_000)


def recipe_of(config: Mapping[str, Any]) -> str:
    """The recipe whose options of training a configuration has, of several the one with the most; empty if there is none."""
    none, fitting = config_to_dict(LossWeights()), {}
    for name in recipe_names():
        wanted = read_recipe(name).stage_two
        phases: dict[str, Any] = {
            phase: merge_options({"losses": none}, wanted[phase])
            for phase in PHASE_NAMES
            if "losses" in wanted.get(phase, {})
        }
        if phases and _holds({**wanted, **phases}, config):
            fitting[name] = sum(map(len, phases.values())) + len(wanted)
    return max(fitting, key=lambda name: fitting[name], default="")


def _holds(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(
        _holds(value, found[name]) if isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        else found.get(name) == value
        for name, value in wanted.items()
    )  # fmt: skip


def _model(given: str) -> str:
    """A model that is no folder of this machine, or only its last part."""
    if on_hub(given) or given.startswith("PATH_TO/") or "/" not in given:
        return given
    return f"PATH_TO/{Path(given).name}"


def _without_folders(value: Any) -> Any:
    """Options without the folders of the machine that they were given on."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return f"PATH_TO/{Path(value).name}"
    return value
