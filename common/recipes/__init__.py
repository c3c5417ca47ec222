"""Named recipes: the options of both stages that a publication trains with, one YAML file each.

``recipe=NAME`` among the options of either stage puts the recipe's options of that stage under those that somebody gives.
A cache's plan and a run's configuration hold the options that result, so neither depends on the name.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_distill_cache.common.config import config_to_dict, read_yaml
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.yaml_text import YamlError, parse_yaml
from vlm_distill_cache.common.printing import one_line

Stage = Literal["stage_one", "stage_two"]
OPTION = "recipe"
FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe.

    Attributes:
        source: Publication and code.
        stage_one: Options of ``teacher-cache build``, nested as in YAML.
        stage_two: Options of ``distill``; the losses of a phase are all of its losses.
        students: For which students it is, a word; empty: for any, so that a cache by it proposes it.
    """

    name: str
    source: str
    stage_one: Mapping[str, Any]
    stage_two: Mapping[str, Any]
    students: str = ""


def recipe_names() -> list[str]:
    """All names, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe by its name.

    Raises:
        ConfigError: If there is none of this name, with those there are.
    """
    known = recipe_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{OPTION}={one_line(name)}: there is no recipe of this name.{hint} Known: {', '.join(known)}"
        )
    return Recipe(name=name, **read_yaml(FOLDER / f"{name}.yaml"))


def split_recipe(
    values: Mapping[str, Any], overrides: Iterable[str]
) -> tuple[Recipe | None, dict[str, Any], list[str]]:
    """Take ``recipe`` out of options: of the overrides the last one counts, else the YAML file's.

    Args:
        values: Of a YAML file.
        overrides: ``a.b=c``, as for ``load_config``.

    Returns:
        The recipe, None if there is none or it is empty, and all other options.
    """
    rest, left = dict(values), []
    name = rest.pop(OPTION, None)
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() == OPTION:
            name = _parsed(value)
        else:
            left.append(override)
    if name is None or name == "":
        return None, rest, left
    return read_recipe(str(name)), rest, left


def recipe_summary(recipe: Recipe, stage: Stage, config: Any) -> str:
    """What a recipe set in a configuration, and what somebody gave instead; some lines for a summary."""
    final, wanted = config_to_dict(config), getattr(recipe, stage)
    lines = [f"Options of recipe {recipe.name} ({recipe.source}):"]
    kept, instead = _compare(wanted, final)
    plain = [text for text in kept if "." not in text.partition("=")[0]]
    groups = dict.fromkeys(text.partition(".")[0] for text in kept if text not in plain)
    lines += [f"  {' '.join(plain)}"] if plain else []
    for group in groups:
        of_group = [text.partition(".")[2] for text in kept if text not in plain and text.startswith(f"{group}.")]
        lines.append(f"  {group}: {' '.join(of_group)}")
    if instead:
        lines.append(f"  given instead: {' '.join(instead)}")
    return "\n".join(lines)


def merge_options(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options of which ``over`` win."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge_options(below or {}, value) if both else value
    return merged


def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlError:
        return text  # no name of a recipe, which the error then shows


def _compare(wanted: Mapping[str, Any], final: Mapping[str, Any], prefix: str = "") -> tuple[list[str], list[str]]:
    """Options as ``a.b=c``: those that are as wanted, and what stands in the place of the others."""
    kept: list[str] = []
    instead: list[str] = []
    for key, value in wanted.items():
        found = final[key]
        if isinstance(value, dict):
            inner = _compare(value, found, f"{prefix}{key}.")
            kept += inner[0]
            instead += inner[1]
        elif found == value:
            kept.append(f"{prefix}{key}={show_option(value)}")
        else:
            other = {"epochs": "steps"}.get(key, key) if found is None else key
            instead.append(f"{prefix}{other}={show_option(final[other])}")
    return kept, instead


def show_option(value: Any) -> str:
    """A value as it is given on a command line."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(show_option, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return one_line(str(value))
