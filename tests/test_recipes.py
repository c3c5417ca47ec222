"""Named recipes through both stages: the layers, groups, signals and losses of the publication, number by number."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.layers import student_groups, teacher_groups
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cli import main as cachectl
from vlm_distill_cache.common.config import config_to_dict, read_yaml
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.recipes import merge_options, read_recipe, recipe_names, split_recipe
from vlm_distill_cache.stage1_teacher.cli import main as teacher_cache
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage2_student.cli import main as distill
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, TrainConfig
from vlm_distill_cache.stage2_student.losses.objective import Shares
from vlm_distill_cache.stage2_student.run import load_run_config
from vlm_distill_cache.stage2_student.scores.again import recipe_of
from vlm_distill_cache.stage2_student.students import build
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.training.preparation import prepare
from vlm_distill_cache.stage2_student.training.recipe_caches import cache_lines
from vlm_distill_cache.stage2_student.training.resolve import resolve_config

DATA = "shapes:images=4,seed=3"
RELEASED, PAPER = "compodistill-released", "compodistill-paper"
# docs/method.md, section 3: first layer of each of the 7 windows, and their size
TABLE = {24: (range(8, 15), 2), 28: (range(9, 16), 3), 32: (range(11, 18), 3), 40: (range(13, 20), 5)}
QUICK = ["dpt.steps=1", "dft.steps=2", "sft.steps=1", *(f"{phase}.batch_size=4" for phase in PHASE_NAMES)]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision in a process-wide singleton."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def call(program: Any, *arguments: str | Path, options: tuple[str, ...] = ()) -> str:
    flags = [part for option in options for part in ("--set", option)]
    result = CliRunner().invoke(program, [*map(str, arguments), *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def resolved(*options: str, width: int = 4096) -> TrainConfig:
    return resolve_config(None, ["cache=c", "output=o", *options], teacher_width=width)


@pytest.fixture(scope="module", params=[RELEASED, PAPER])
def built(request: pytest.FixtureRequest, deep_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe, a cache that stage one built by it, and what the command said."""
    cache = tmp_path_factory.mktemp("cache") / request.param
    said = call(
        teacher_cache, "build", "--data", DATA, "--teacher", deep_llava, "--cache", cache,
        options=(f"recipe={request.param}", "template=short", "fidelity_samples=0", "device=cpu"),
    )  # fmt: skip
    return request.param, cache, said


@pytest.fixture
def deep_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration's student with 24 layers."""
    load: Callable[..., dict[str, Any]] = build.load_preset

    def deeper(*names: str) -> dict[str, Any]:
        return merge_options(load(*names), {"language_model": {"num_hidden_layers": 24}})

    monkeypatch.setattr(build, "load_preset", deeper)


def test_a_cache_by_a_recipe_holds_its_signals_of_the_published_layers(built: Any):
    recipe, cache, said = built
    plan = read_plan(cache)
    assert (
        set(plan.signals)
        == {RELEASED: {"logits", "visual_map"}, PAPER: {"logits", "visual_map", "text_attention"}}[recipe]
    )
    firsts, size = TABLE[24]
    assert plan.teacher["groups"] == [list(range(first, first + size)) for first in firsts]
    assert {signal.get("groups", 7) for signal in plan.signals.values()} == {7}
    assert plan.signals["logits"]["temperatures"] == [1.0]
    assert plan.extra["max_length"] == {RELEASED: 1536, PAPER: 2048}[recipe]
    assert f"Options of recipe {recipe}" in said
    assert "groups=0 layers=middle" in said
    assert f"SET=recipe={recipe}" in said


@pytest.mark.usefixtures("deep_student")
@pytest.mark.slow
def test_a_student_trains_by_a_recipe_and_its_configuration_holds_the_options(built: Any, tmp_path: Path):
    recipe, cache, _ = built
    options = (f"recipe={recipe}", *QUICK, "device=cpu")
    said = call(
        distill, "train", "--student", "mobilevlm-tiny", "--data", DATA, "--cache", cache,
        "--output", tmp_path / "run", options=options,
    )  # fmt: skip
    assert f"Options of recipe {recipe}" in said
    assert "dft.steps=2" in said.partition("given instead:")[2]
    saved = read_yaml(tmp_path / "run" / "config.yaml")
    assert "recipe" not in saved
    dropout = {RELEASED: 0.05, PAPER: 0.0}[recipe]
    assert saved["lora"] == {"rank": 128, "alpha": 256.0, "dropout": dropout}
    assert (saved["projector"], saved["dtype"], saved["dft"]["steps"]) == ("taf", "bfloat16", 2)
    assert (saved["dft"]["trainable"], saved["dft"]["losses"]["answer_attention"]) == ("lora", 0.0)


@pytest.mark.parametrize("recipe", [RELEASED, PAPER])
@pytest.mark.parametrize("width", [96, 4096], ids=["tiny", "published"])
def test_phases_of_a_recipe_are_the_published_ones_whatever_the_preset(recipe: str, width: int):
    config = resolved(f"recipe={recipe}", width=width)
    phases = [config.phase(name) for name in config.phases]
    assert config.phases == PHASE_NAMES
    assert [(phase.steps, phase.epochs, phase.batch_size) for phase in phases] == [
        (None, 1.0, n) for n in (256, 128, 192)
    ]
    assert [phase.trainable for phase in phases] == ["projector", "lora", "lora"]
    for phase in phases:
        assert (phase.lr, phase.schedule, phase.warmup, phase.weight_decay) == (2e-4, "cosine", 0.03, 0.0)
    attention = {RELEASED: "visual_map", PAPER: "all_attention"}[recipe]
    assert [phase.losses.active() for phase in phases] == [
        {"lm": 1.0, "logits": 1.0}, {"lm": 1.0, "logits": 1.0, attention: 1.0}, {"lm": 1.0}
    ]  # fmt: skip
    assert phases[1].losses.attention_reduction == {RELEASED: "sum", PAPER: "mean"}[recipe]
    assert phases[1].losses.visual_map_kind == "sink_filtered"


@pytest.mark.parametrize("depth", TABLE)
def test_seven_groups_are_the_tables_windows_and_the_students_layers(depth: int):
    firsts, size = TABLE[depth]
    assert teacher_groups(depth, 7) == tuple(tuple(range(first, first + size)) for first in firsts)
    assert student_groups(depth, 7) == tuple((first,) for first in firsts)


def test_what_is_given_wins_over_a_recipe_and_a_recipe_over_the_preset():
    config = resolved(f"recipe={PAPER}", "dft.losses.visual_map=0.5", "dft.epochs=2", "lora.rank=8", "projector=null")
    assert config.dft.losses.active() == {"lm": 1.0, "logits": 1.0, "visual_map": 0.5, "all_attention": 1.0}
    assert (config.dft.steps, config.dft.epochs, config.lora.rank, config.lora.alpha) == (None, 2.0, 8, 256.0)
    assert config.projector is None


def test_a_recipe_may_stand_in_a_file_and_the_last_one_named_counts(tmp_path: Path):
    (tmp_path / "o.yaml").write_text(f"recipe: {PAPER}\ndft: {{lr: 1.0e-3}}\n")
    config = resolve_config(tmp_path / "o.yaml", ["cache=c", "output=o"], teacher_width=4096)
    assert (config.dft.lr, config.dft.losses.all_attention, config.dft.losses.visual_map) == (1e-3, 1.0, 0.0)
    other = resolve_config(tmp_path / "o.yaml", ["cache=c", "output=o", f"recipe={RELEASED}"], teacher_width=4096)
    assert (other.dft.losses.all_attention, other.dft.losses.visual_map) == (0.0, 1.0)
    assert split_recipe({"recipe": PAPER}, ["recipe=", "a=1"]) == (None, {}, ["a=1"])


@pytest.mark.parametrize("name", ["compodistill-relased", "../presets/phases-tiny", "[a", "7"])
def test_an_unknown_recipe_is_refused_with_those_there_are(name: str):
    with pytest.raises(ConfigError, match=rf"there is no recipe of this name.*Known: {PAPER}, {RELEASED}"):
        resolved(f"recipe={name}")


def test_a_configuration_tells_its_recipe():
    for name in recipe_names():
        assert recipe_of(config_to_dict(resolved(f"recipe={name}"))) == name
    assert recipe_of(config_to_dict(resolved("dft.losses.logits=0.25"))) == ""


def test_every_recipe_gives_known_options_of_both_stages_and_says_where_they_are_from():
    for name in recipe_names():
        recipe = read_recipe(name)
        assert "arXiv:" in recipe.source
        BuildConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in recipe.stage_one.items()})
        assert resolved(f"recipe={name}").phases == (("dft",) if recipe.students else PHASE_NAMES)


BUILTIN = Path(__file__).parents[1] / "stage1_teacher" / "builtin"
RECOVERIES = {
    "sft": {"lm": 1.0},
    "projector": {"lm": 1.0},
    "hidden": {"lm": 0.5, "hidden": 0.5},
    "logits": {"lm": 1.0, "logits": 1.0},
    "reverse-kl": {"lm": 1.0, "logits": 1.0},
    "attention": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
}


@pytest.mark.parametrize("width", [96, 4096], ids=["tiny", "published"])
def test_a_recovery_gives_losses_and_leaves_budgets_to_the_preset_of_pruned_students(width: int):
    assert [name for name in recipe_names() if read_recipe(name).students] == sorted(
        f"recovery-{n}" for n in RECOVERIES
    )
    plain = resolved("student=pruned:0.5", f"teacher={BUILTIN}", width=width)
    kinds = {"hidden": ("mse", "forward_kl"), "reverse-kl": ("relative_mse", "reverse_kl")}
    for name, losses in RECOVERIES.items():
        config = resolved("student=pruned:0.5", f"teacher={BUILTIN}", f"recipe=recovery-{name}", width=width)
        assert config.dft.losses.active() == losses
        found = (config.dft.losses.hidden_kind, config.dft.losses.logit_kind)
        assert found == kinds.get(name, ("relative_mse", "forward_kl"))
        assert config.dft.trainable == ("projector" if name == "projector" else plain.dft.trainable)
        left = replace(config, dft=replace(config.dft, losses=plain.dft.losses, trainable=plain.dft.trainable))
        assert left == plain


def test_the_demonstration_runs_by_a_recipe(tmp_path: Path):
    """The built-in teacher has 6 layers, its student 3: the three middle ones are aligned."""
    cache = tmp_path / "cache"
    recipe = f"recipe={RELEASED}"
    call(teacher_cache, "build", "--data", DATA, "--cache", cache, options=(recipe, "fidelity_samples=0", "device=cpu"))
    assert read_plan(cache).teacher["groups"] == [[2], [3], [4]]
    call(distill, "train", "--cache", cache, "--output", tmp_path / "run", options=(recipe, *QUICK, "device=cpu"))


# The formulas of docs/method.md, section 3, in numpy, on maps of the library's eager attention.


def released_loss(student: np.ndarray, teacher: np.ndarray) -> float:
    """One sample's: ``[G, N, N]`` each."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        kept = (s <= s.mean() + s.std(ddof=1)) & (t <= t.mean() + t.std(ddof=1)) & (t != 0)
        counts = np.maximum(kept.sum(axis=0), 1)
        left, right = (s * kept).sum(axis=0) / counts, (t * kept).sum(axis=0) / counts
        total += 1 - left @ right / np.linalg.norm(left) / np.linalg.norm(right)
    return total


def paper_loss(student: np.ndarray, teacher: np.ndarray) -> float:
    """One sample's: ``[G, Q, N]`` each, all query rows from the picture on."""
    cosines = [np.sum(s * t) / np.linalg.norm(s) / np.linalg.norm(t) for s, t in zip(student, teacher, strict=True)]
    return 1 - float(np.mean(cosines))


@pytest.mark.usefixtures("deep_student")
def test_the_attention_loss_of_a_recipe_is_its_formula_on_seven_groups(built: Any, deep_llava: Path, tmp_path: Path):
    recipe, cache, _ = built
    # The map's 8-bit codes keep the mask and the means of its columns; the paper's loss sees every code.
    check_formula(recipe, cache, deep_llava, tmp_path, rel={RELEASED: 2e-3, PAPER: 0.02}[recipe])


@pytest.mark.usefixtures("deep_student")
def test_a_cache_of_single_layers_serves_a_recipe_with_its_formula(deep_llava: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    said = build_otherwise(cache, deep_llava, f"recipe={RELEASED}", "groups=24", "layers=all", "attention_dtype=f4")
    assert f"SET=recipe={RELEASED}" in said
    check_formula(RELEASED, cache, deep_llava, tmp_path, rel=1e-4)
    assert "groups=24 layers=all" in "".join(cache_lines(over(cache, RELEASED), read_recipe(RELEASED)))


def check_formula(recipe: str, cache: Path, deep_llava: Path, tmp_path: Path, *, rel: float) -> None:
    """Compare the loss of a recipe over a cache with its formula."""
    config = resolved(
        f"recipe={recipe}", f"cache={cache}", f"data={DATA}", f"output={tmp_path / 'o'}", "student=mobilevlm-tiny"
    )  # fmt: skip
    run = prepare(replace(config, phases=("dft",)))
    phase, student = run.phases[0], run.student.eval()
    teacher = LlavaForConditionalGeneration.from_pretrained(deep_llava, attn_implementation="eager").eval()
    firsts, size = TABLE[24]
    assert phase.objective.groups == tuple((first,) for first in firsts)
    batch = phase.dataset.batch(range(4))
    with torch.no_grad():
        found = phase.objective(student, AttentionCapture(student.language_model), batch, Shares())
        inputs = model_inputs_of(student, batch.inputs)
        mask = inputs["attention_mask"]  # eager attention adds it
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        seen = teacher(
            input_ids=batch.inputs.input_ids,
            attention_mask=added,
            position_ids=inputs["position_ids"],
            pixel_values=batch.inputs.model_inputs()["pixel_values"],
            output_attentions=True,
        ).attentions
        length = batch.inputs.input_ids.shape[1]
        every = torch.arange(length).repeat(4, 1)
        capture = AttentionCapture(student.language_model)
        with capture.record({"all": AttentionRequest(every, every, phase.objective.groups)}) as maps:
            student(**inputs)
    values = []
    for index in range(4):
        columns = batch.inputs.visual_mask[index].nonzero()[:, 0].numpy()
        rows = (
            columns
            if recipe == RELEASED
            else np.r_[columns, batch.text_rows[index][batch.text_rows[index] >= 0].numpy()]
        )
        both = np.ix_(range(7), rows, columns)
        heads = torch.stack([layer[index].mean(dim=0) for layer in seen])  # [24, T, T]
        theirs = torch.stack([heads[first : first + size].mean(dim=0) for first in firsts]).double().numpy()[both]
        own = maps["all"][index].double().numpy()[both]
        values.append({RELEASED: released_loss, PAPER: paper_loss}[recipe](own, theirs))
    loss = {RELEASED: "visual_map", PAPER: "all_attention"}[recipe]
    assert float(found.terms[loss]) == pytest.approx(float(np.mean(values)), rel=rel)


# Caches that are not the recipe's.


def build_otherwise(cache: Path, teacher: Path, *options: str) -> str:
    """Build a cache of 4 samples; what stage one said."""
    options = (*options, "template=short", "fidelity_samples=0", "device=cpu")
    return call(teacher_cache, "build", "--data", DATA, "--teacher", teacher, "--cache", cache, options=options)


def over(cache: Path, recipe: str, *options: str) -> TrainConfig:
    given = ("output=o", f"data={DATA}", "student=mobilevlm-tiny", f"recipe={recipe}", *options)
    return load_run_config(None, given, cache=cache)


@pytest.fixture(scope="module")
def one_group(deep_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the recipe's signals, of which nobody said more: one mean over the middle layers."""
    cache = tmp_path_factory.mktemp("cache") / "one-group"
    build_otherwise(cache, deep_llava, "signals=[logits,visual_map,text_attention]")
    return cache


@pytest.mark.parametrize(("recipe", "loss"), [(RELEASED, "visual_map"), (PAPER, "all_attention")])
def test_a_recipe_over_other_layer_groups_is_refused_and_both_remedies_work(
    recipe: str, loss: str, one_group: Path, built: Any, tmp_path: Path
):
    arguments = ["train", "--student", "mobilevlm-tiny", "--data", DATA, "--cache", str(one_group), "--output"]
    result = CliRunner().invoke(distill, [*arguments, str(tmp_path / "run"), "--set", f"recipe={recipe}"])
    assert result.exit_code == 1
    assert f"phase dft: {one_group} is no cache of recipe {recipe}, whose {loss} would be another loss" in result.output
    assert "groups=1 layers=middle (the recipe: groups=7 layers=middle)" in result.output
    assert f"CACHE_SET=recipe={recipe} " in result.output
    assert not (tmp_path / "run").exists()
    by_hand = re.search(r' SET="(.*?)"', " ".join(result.output.split()).replace("(SET", " SET"))
    assert by_hand is not None
    config = over(one_group, recipe, *by_hand[1].split())
    assert config.dft.losses.active() == {"lm": 1.0, "logits": 1.0, loss: 1.0}
    assert "groups=1" in "".join(cache_lines(config, read_recipe(recipe)))
    if built[0] == recipe:
        assert cache_lines(over(built[1], recipe), read_recipe(recipe)) == []


def test_a_recipe_is_refused_by_phase_and_by_the_phases_own_cache(one_group: Path, built: Any):
    recipe, cache, _ = built
    assert over(one_group, recipe, "phases=[dpt]").phases == ("dpt",)
    assert over(one_group, recipe, f"dft.cache={cache}").dft.cache == str(cache)
    with pytest.raises(CacheMismatchError, match=re.escape(f"phase dft: {one_group} is no cache")):
        over(cache, recipe, f"dft.cache={one_group}")
    # A setting of the loss that is not its weight leaves it the recipe's.
    with pytest.raises(CacheMismatchError, match="groups=1"):
        over(one_group, recipe, "dft.losses.attention_reduction=mean")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("signals=[logits]",), "no visual_map"),
        (("groups=3",), "groups=3 layers=middle (the recipe: groups=7 layers=middle)"),
        (("attention_dtype=u1", "map_preset=exact8"), "map_preset=exact8"),
    ],
)
@pytest.mark.slow(quick=1)
def test_stage_one_proposes_the_recipe_for_its_own_cache_only(
    options: tuple[str, ...], why: str, deep_llava: Path, tmp_path: Path
):
    said = build_otherwise(tmp_path / "cache", deep_llava, f"recipe={RELEASED}", *options)
    told, _, following = said.partition("Next: make distill")
    assert following
    assert f"so this is no cache for SET=recipe={RELEASED}" in told
    assert why in told
    assert "recipe" not in following
    with pytest.raises(CacheMismatchError, match=re.escape(why)):
        over(tmp_path / "cache", RELEASED)


def test_inspect_proposes_the_recipe_of_a_cache_that_is_one(built: Any):
    recipe, cache, _ = built
    assert f"SET=recipe={recipe}" in CliRunner().invoke(cachectl, ["inspect", str(cache)]).output


def test_another_longest_sequence_is_said_in_the_summary_and_leaves_the_cache_the_recipes(
    deep_llava: Path, tmp_path: Path
):
    said = build_otherwise(tmp_path / "cache", deep_llava, f"recipe={RELEASED}", "max_length=512")
    assert f"SET=recipe={RELEASED}" in said
    lines = cache_lines(over(tmp_path / "cache", RELEASED), read_recipe(RELEASED))
    assert lines == [f"  the cache {tmp_path / 'cache'}: max_length=512 (the recipe: max_length=1536)"]


def test_a_student_of_fewer_layers_than_groups_is_refused_with_what_to_build(built: Any):
    recipe, cache, _ = built
    with pytest.raises(CacheMismatchError, match=r"7 layer groups, .* has 3 layers.* CACHE_SET.*groups=3"):
        prepare(over(cache, recipe))
