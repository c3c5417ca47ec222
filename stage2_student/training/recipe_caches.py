"""Whether the caches of a run are those of its recipe; imports no torch unless one is not."""

from collections.abc import Collection

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.locations import by_make, public_location
from vlm_distill_cache.common.recipes import OPTION, Recipe
from vlm_distill_cache.common.recipes.cache_fit import Difference, cache_differences, differences_text
from vlm_distill_cache.common.remotes.mirror import local_folder
from vlm_distill_cache.common.terminal.next_step import set_words
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.students.presets import LIBRARY_STUDENTS, STUDENTS, split_student_name


def refuse_other_caches(config: TrainConfig, recipe: Recipe, given: Collection[str]) -> None:
    """Refuse a recipe that is for other students, or a loss of it that a cache cannot give as meant, unless somebody gave it.

    Args:
        given: Options that are not the recipe's, as ``a.b=c``.

    Raises:
        ConfigError: For a recipe of students that are cut, on one that is built or published.
        CacheMismatchError: Naming what the cache holds instead, and what to do.
    """
    if recipe.students == "pruned" and split_student_name(config.student)[0] in (*STUDENTS, *LIBRARY_STUDENTS):
        raise ConfigError(
            f"{OPTION}={recipe.name} is for students that are cut out of their teacher, and student is {config.student}; give "
            "student=pruned:0.5 (or pruned:depth:0.75) with teacher=FOLDER, what `distill prune` wrote, or another recipe"
        )
    by_hand = {option.partition("=")[0].strip() for option in given}
    for name in config.phases:
        place = str(config.phase(name).cache)
        differences = _differences(place, recipe)
        others = {signal for difference in differences for signal in difference.signals}
        if not others:
            continue
        from vlm_distill_cache.stage2_student.losses.terms import choose_terms  # torch

        of_recipe = recipe.stage_two[name]["losses"]
        wrong = {
            loss: term
            for loss, term in choose_terms(config.phase(name).losses.distilled).items()
            if of_recipe.get(loss) and others.intersection(term.reads) and f"{name}.losses.{loss}" not in by_hand
        }
        if not wrong:
            continue
        held = read_plan(local_folder(place)).signals.keys()
        by_name = f"{OPTION}={recipe.name}"
        themselves = [
            f"{name}.losses.{loss}={of_recipe[loss] if {*term.reads} <= held else 0}" for loss, term in wrong.items()
        ]
        why = [difference for difference in differences if difference.signals]
        raise CacheMismatchError(
            f"phase {name}: {public_location(place)} is no cache of recipe {recipe.name}, whose {', '.join(wrong)} would be "
            f"another loss with it: {differences_text(why)}. Build a cache by the recipe, in another folder "
            f"({by_make(f'CACHE_SET={by_name} with make, ')}teacher-cache build --set {by_name}); or, to train with this one "
            f"all the same, say so by giving the loss ({set_words([by_name, *themselves])})"
        )


def cache_lines(config: TrainConfig, recipe: Recipe) -> list[str]:
    """For a summary: a line for each cache that was not built as the recipe says, and what it holds instead."""
    places = dict.fromkeys(str(config.phase(name).cache) for name in config.phases)
    found = {place: _differences(place, recipe) for place in places}
    return [f"  the cache {public_location(place)}: {differences_text(of)}" for place, of in found.items() if of]


def _differences(place: str, recipe: Recipe) -> list[Difference]:
    return cache_differences(recipe, read_plan(local_folder(place)))
