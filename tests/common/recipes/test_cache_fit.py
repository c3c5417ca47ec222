"""Plans of caches against recipes: what was built otherwise is named, and which signals' losses it changes."""

import copy
from typing import Any

import pytest

from vlm_distill_cache.common.attention.layers import teacher_groups
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.recipes import read_recipe, recipe_names
from vlm_distill_cache.common.recipes.cache_fit import COMPARED, cache_differences, differences_text, recipe_of

RELEASED, PAPER = read_recipe("compodistill-released"), read_recipe("compodistill-paper")
SEVEN = teacher_groups(24, 7)
SINGLES = tuple((layer,) for layer in range(24))


def plan_of(groups: Any = SEVEN, choice: str = "middle", **changed: Any) -> Plan:
    """Of a teacher of 24 layers, by both recipes, but for what is changed: ``signal__setting`` or a key of ``extra``."""
    signals: dict[str, dict[str, Any]] = {
        "logits": {"codec": "logits", "temperatures": [1.0]},
        "visual_map": {"codec": "visual_map", "groups": len(groups), "preset": "exact"},
        "text_attention": {"codec": "text_attention", "groups": len(groups), "grid": [6, 6], "exact": False},
    }
    extra = {"max_length": 1536, "long_samples": "truncate"}
    for key, value in changed.items():
        signal, _, setting = key.partition("__")
        (signals[signal] if setting else extra)[setting or key] = value
    return Plan(
        store="zarr",
        sample_count=4,
        shard_size=4,
        signals=signals,
        fields=dict.fromkeys(signals, ()),
        teacher={"layers": 24, "groups": [list(group) for group in groups], "layer_choice": choice},
        geometry={"grid": [6, 6]},
        extra=extra,
    )


def without(plan: Plan, *signals: str) -> Plan:
    left = {name: settings for name, settings in plan.signals.items() if name not in signals}
    values = copy.deepcopy(vars(plan)) | {"signals": left, "fields": dict.fromkeys(left, ())}
    return Plan(**values)


def test_a_cache_as_the_recipe_says_or_with_more_has_no_differences():
    assert cache_differences(RELEASED, plan_of()) == []
    assert cache_differences(RELEASED, without(plan_of(), "text_attention")) == []
    assert cache_differences(PAPER, plan_of(max_length=2048)) == []
    assert cache_differences(RELEASED, plan_of(logits__temperatures=[2.0, 1.0])) == []


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (plan_of(teacher_groups(24, 1)), "groups=1 layers=middle (the recipe: groups=7 layers=middle)"),
        (plan_of(teacher_groups(24, 3)), "groups=3 layers=middle (the recipe: groups=7 layers=middle)"),
        (plan_of(teacher_groups(24, 7, "all"), "all"), "groups=7 layers=all (the recipe: groups=7 layers=middle)"),
        (plan_of(visual_map__preset="exact8"), "map_preset=exact8 (the recipe: map_preset=exact)"),
        (plan_of(visual_map__grid=2), "map_grid=2 (the recipe: map_grid=0)"),
    ],
)
def test_what_makes_another_loss_names_the_signals_of_attention(plan: Plan, text: str):
    (found,) = cache_differences(RELEASED, plan)
    assert found.text == text
    assert found.signals == ("visual_map",)


def test_a_recipe_that_says_nothing_of_layers_asks_for_its_signals_alone_and_is_not_proposed():
    recovery = read_recipe("recovery-hidden")
    (found,) = cache_differences(recovery, plan_of(logits__temperatures=[2.0]))
    assert (found.text, found.signals) == ("no hidden", ("hidden",))
    attention = read_recipe("recovery-attention")
    plan = without(plan_of(teacher_groups(24, 1)), "visual_map", "text_attention")
    plan.signals["answer_attention"] = {"codec": "answer_attention", "groups": 1, "grid": [2, 2], "exact": False}
    assert cache_differences(attention, plan) == []
    assert recipe_of(plan) == ""


def test_text_rows_may_be_finer_than_usual_and_not_coarser():
    (found,) = cache_differences(PAPER, plan_of(max_length=2048, text_attention__grid=[2, 2]))
    assert (found.text, found.signals) == ("grid=[2,2] (the recipe: grid=[6,6])", ("text_attention",))
    assert cache_differences(PAPER, plan_of(max_length=2048, text_attention__grid=[24, 24])) == []
    assert cache_differences(RELEASED, plan_of(text_attention__grid=[2, 2])) == []


def test_signals_that_are_missing_are_named_and_nothing_is_asked_of_them():
    (found,) = cache_differences(PAPER, without(plan_of(), "visual_map", "text_attention"))
    assert (found.text, found.signals) == ("no visual_map, text_attention", ("visual_map", "text_attention"))
    served = without(plan_of((), max_length=1536), "visual_map", "text_attention")
    assert [found.signals for found in cache_differences(RELEASED, served)] == [("visual_map",)]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"max_length": 2048}, "max_length=2048 (the recipe: max_length=1536)"),
        ({"long_samples": "refuse"}, "long_samples=refuse (the recipe: long_samples=truncate)"),
        ({"logits__temperatures": [2.0]}, "temperatures=[2.0] (the recipe: temperatures=[1.0])"),
        ({"visual_map__preset": "f4"}, "attention_dtype=f4 (the recipe: attention_dtype=u1)"),
        ({"visual_map__preset": "blocks"}, "map_preset=blocks (the recipe: map_preset=exact)"),
        ({"groups": SINGLES, "choice": "all"}, "groups=24 layers=all (the recipe: groups=7 layers=middle)"),
    ],
)
def test_what_leaves_the_losses_as_they_are_is_said_and_no_more(changed: dict[str, Any], text: str):
    found = cache_differences(RELEASED, plan_of(**changed))
    assert differences_text(found) == text
    assert not any(difference.signals for difference in found)


@pytest.mark.parametrize("name", recipe_names())
def test_all_that_a_recipe_says_of_a_cache_is_compared(name: str):
    assert {*read_recipe(name).stage_one} <= {*COMPARED}
