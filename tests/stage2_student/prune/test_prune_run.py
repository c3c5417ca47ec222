"""`pruned:KEEP` on the way of a run, and `distill prune` by itself."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from lora_runs import save_teacher
from tiny_cache import DATA
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.models.layer_sizes import SIZES
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import iterate_readable
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.config import describe
from vlm_distill_cache.stage2_student.prune import for_run as prune_for_run
from vlm_distill_cache.stage2_student.prune.cut import prune_directory
from vlm_distill_cache.stage2_student.prune.for_run import prune_for_cache
from vlm_distill_cache.stage2_student.pruned_folder import (
    Kept,
    PruningConfig,
    cut_words,
    pruned_damage,
    pruning_record,
    refuse_damaged,
    unused_settings,
)
from vlm_distill_cache.stage2_student.run import load_run_config, run, with_pruned_student, write_report_again
from vlm_distill_cache.stage2_student.training.resolve import open_caches

FAST = [
    "dft.steps=2", "dft.batch_size=4", "dft.losses.hidden=0", "dft.losses.logits=1.0", "evaluation.limit=2",
    "evaluation.letters=false", "evaluation.agreement_samples=4", "evaluation.overlays=1", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The directory of the teacher that the tiny cache is of."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "llava")


def make_config(cache, output, teacher, *more):
    given = ["student=pruned:0.5", f"teacher={teacher}", f"data='{DATA}'", f"output={output}", *FAST, *more]
    return load_run_config(None, given, cache=cache)


@pytest.mark.slow
def test_a_run_cuts_the_student_once_and_trains_scores_and_reports_it(tiny_cache, tmp_path, teacher, monkeypatch):
    config = make_config(tiny_cache[0], tmp_path / "run", teacher)
    assert (config.phases, config.dft.trainable) == (("dft",), "all")
    said = []
    summary = run(config, say=said.append)
    assert summary.fresh
    assert f"pruned:0.5: cutting it out of {teacher}" in said
    assert any("2 heads" in line for line in said)
    record = json.loads((tmp_path / "run" / "student" / "pruning.json").read_text())
    assert record["keep"] == 0.5
    student = open_family_model(tmp_path / "run" / "distilled" / "final").model
    assert student.config.text_config.num_attention_heads == 2
    card = (tmp_path / "run" / "distilled" / "final" / "README.md").read_text()
    for line in (
        "| student | pruned:0.5 |",
        "| cut out of | llava |",
        "student: pruned:0.5\n",
        "teacher: PATH_TO/llava\n",
    ):
        assert line in card
    assert str(tmp_path) not in card
    card = (tmp_path / "run" / "sft" / "final" / "README.md").read_text()
    assert "distill prune --teacher PATH_TO/llava --keep 0.5 --data DATA --output STUDENT\n" in card
    assert "student: STUDENT\n" in card
    assert student.config.text_config.hidden_size == 32
    # killed behind the cut: it is used as it is
    stamp = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**stamp, "finished": None}))
    monkeypatch.setattr(prune_for_run, "prune_directory", None)
    said.clear()
    assert run(config, say=said.append).table == summary.table
    assert said[0] == f"pruned:0.5: cut out of {teacher} already"
    # another teacher or share is another run
    with pytest.raises(ConfigError, match=r"student: the folder has .*pruned:0.5(.|\n)*another --output"):
        run(replace(config, student="pruned:0.25"))


@pytest.mark.slow
def test_layers_of_unequal_sizes_are_cut_trained_scored_and_reported_and_the_way_is_the_runs(
    tiny_cache, tmp_path, teacher
):
    how = ["student='pruned:width:0.75,depth:0.75'", "pruning.importance=taylor", "pruning.ratios=global"]
    config = make_config(tiny_cache[0], tmp_path / "run", teacher, *how, "pruning.samples=6")
    run(config)
    record = pruning_record(tmp_path / "run" / "student")
    assert (record["keep"], record["depth"], len(record["layers"])) == (0.75, 0.75, 3)
    assert record["settings"] == {"importance": "taylor", "ratios": "global"}
    student = open_family_model(tmp_path / "run" / "distilled" / "final").model
    assert changes_of(student.config)["layer_sizes"] == record["sizes"]
    decoder = student.model.language_model
    assert [layer.mlp.down_proj.in_features for layer in decoder.layers] == [
        size["channels"] for size in record["sizes"]
    ]
    assert decoder.config.kept_layers == {"of": 4, "kept": record["layers"]}
    assert cut_words(tmp_path / "run" / "distilled" / "final") == {
        "layers of its teacher": f"{str(record['layers'])[1:-1]} of 4, counted from 0",
        "sizes of layers": ", ".join("/".join(str(size[name]) for name in SIZES) for size in record["sizes"])
        + " (heads/heads of keys and values/channels)",
    }
    write_report_again(tmp_path / "run")  # which knows the student by its fingerprint
    assert not run(config).fresh
    with pytest.raises(ConfigError, match=r"pruning(.|\n)*another --output"):
        run(replace(config, pruning=replace(config.pruning, depth_importance="taylor")))


def test_runs_of_names_and_settings_that_were_there_before_are_described_as_then(tiny_cache, tmp_path, teacher):
    def described(student, *more):
        return describe(make_config(tiny_cache[0], tmp_path, teacher, f"student='{student}'", *more), {})

    before = described("pruned:0.5")
    assert "pruning" not in before
    assert before["student"] == "pruned:0.5"
    assert described("pruned:width:0.5") == before
    assert described("pruned:depth:0.75,width:0.5") == described("pruned:width:0.5,depth:0.75") != before
    assert described("pruned:0.5", "pruning.samples=255") != before
    with pytest.raises(ConfigError, match=r"pruning.samples is 255; it must be left out.*student is mobilevlm"):
        described("mobilevlm", "pruning.samples=255")


def test_a_pruned_students_run_is_known_by_what_was_cut_not_by_where_it_lies(tiny_cache, tmp_path, teacher):
    config = make_config(tiny_cache[0], tmp_path / "run", teacher)
    described = []
    for name in ("here", "there"):
        prune_for_cache(config, open_cache(tiny_cache[0]), tmp_path / name, kept=Kept(width=0.5))
        described.append(describe(replace(config, student=str(tmp_path / name)), {}))
    assert described[0] == described[1]
    assert described[0]["student"]["keep"] == 0.5


def test_a_damaged_pruned_student_is_refused_and_a_run_cuts_it_again(tiny_cache, tmp_path, teacher):
    config, folder, said = make_config(tiny_cache[0], tmp_path / "run", teacher), tmp_path / "run" / "student", []
    caches = open_caches(config)
    with_pruned_student(config, caches, say=said.append)
    sound = list_files(folder)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-3])
        with pytest.raises(ModelError, match="cut the student again"):
            refuse_damaged(folder)
        path.write_bytes(content)
    refuse_damaged(folder)
    (folder / "model.safetensors").write_bytes(b"")
    said.clear()
    with_pruned_student(config, caches, say=said.append)
    assert said[0].startswith("pruned:0.5: cut again: ")
    assert list_files(folder) == sound


def test_another_teacher_than_the_caches_is_refused(tiny_cache, tmp_path, teacher):
    other = save_teacher(tmp_path / "other")
    made = LlavaConfig.from_pretrained(teacher)
    made.text_config.hidden_size, made.text_config.head_dim = 16, 8
    LlavaForConditionalGeneration(made).save_pretrained(other)
    config = make_config(tiny_cache[0], tmp_path / "run", other)
    with pytest.raises(ModelError, match=r"width 16; the cache .* width 32: give the directory of the cache's own"):
        prune_for_cache(config, open_cache(tiny_cache[0]), tmp_path / "student", kept=Kept(width=0.5))


def test_the_command_writes_a_folder_and_says_what_comes_next(tmp_path, teacher):
    arguments = ["prune", "--teacher", str(teacher), "--data", DATA, "--keep", "0.5", "--samples", "3"]
    arguments += ["--template", "short", "--output", str(tmp_path / "student")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "2 heads (2 of keys and values) and 32 channels a layer\n" in result.output
    assert f"Next: distill run --student {tmp_path / 'student'}" in result.output
    assert "changes nothing" not in result.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "exists; give a new folder" in again.output
    select = ["select-tokens", str(tmp_path / "student"), "--visual-tokens", "0.5", "--output", str(tmp_path / "fewer")]
    assert CliRunner().invoke(main, select).exit_code == 0
    cut, fewer = (pruning_record(tmp_path / name) for name in ("student", "fewer"))
    assert fewer.pop("distilled")["visual_tokens"]["keep"] == 0.5  # as a run is described, it is another student
    assert fewer == cut
    assert pruned_damage(tmp_path / "fewer") == []
    (tmp_path / "student" / "config.json").write_text("{}")
    refused = CliRunner().invoke(main, [*select[:-1], str(tmp_path / "no")])
    assert refused.exit_code == 1
    assert "cut the student again" in refused.output
    for share in ("0", "depth:2", "depth:0.5,depth:0.5", "height:0.5", "half", "0.5,0.5", "nan", ""):
        refused = CliRunner().invoke(main, [*arguments[:6], share, *arguments[7:]])
        assert refused.exit_code == 2
        assert "such as 0.5, depth:0.75 or width:0.5,depth:0.75" in refused.output
    more = ["--importance", "taylor", "--ratios", "global", "--spare-last", "1", "--spare-first", "0", "--json"]
    deep = [*arguments[:6], "width:0.5,depth:0.5", *arguments[7:-1], str(tmp_path / "other"), *more]
    result = CliRunner().invoke(main, deep)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (len(told["layers"]), told["sizes"][1]["channels"], told["widths"]) == (2, 64, None)
    assert "2 to 4 heads (1 to 2 of keys and values) and 32 to 64 channels a layer" in result.stderr
    assert "2 of 4 layers" in result.stderr


def test_settings_that_nothing_comes_of_are_said_and_samples_that_cannot_be_read_are_left_out(
    tmp_path, teacher, caplog
):
    how = PruningConfig(importance="taylor", ratios="global", depth_importance="taylor")
    said = [unused_settings(kept, how) for kept in (Kept(width=0.5), Kept(depth=0.5), Kept(width=0.5, depth=0.5))]
    assert said == [
        ["depth_importance=taylor changes nothing: no layer leaves (0.5 is kept)"],
        ["importance=taylor and ratios=global changes nothing: no layer is narrowed (depth:0.5 is kept)"],
        [],
    ]
    samples = [sample for sample, _ in zip(iterate_readable(open_dataset(DATA)), range(2), strict=False)]
    lost = replace(samples[0], turns=())
    rows = [
        prune_directory(
            teacher, tmp_path / str(len(given)), kept=Kept(width=0.5), samples=given, template="short", how=how
        )
        for given in (samples, [lost, *samples])
    ]
    assert rows[0].rows == rows[1].rows > 0
    assert caplog.text.count("depth_importance=taylor changes nothing") == 2
    assert caplog.text.count("importance is measured without samples that cannot be read, 1; the first: ") == 1


def test_a_dry_run_names_the_student_that_was_given_and_recoveries_refuse_others(tiny_cache, tmp_path):
    arguments = ["run", "--dry-run", "--cache", str(tiny_cache[0]), "--output", str(tmp_path / "run"), "--data", DATA]
    result = CliRunner().invoke(main, [*arguments, "--student", "pruned:depth:0.75"])
    assert "would train pruned:depth:0.75 into" in result.output
    assert "the directory of the teacher (--teacher) that student pruned:depth:0.75 is cut out of" in result.output
    result = CliRunner().invoke(main, [*arguments, "--student", "mobilevlm-tiny", "--set", "recipe=recovery-hidden"])
    assert result.exit_code == 1
    assert "recipe=recovery-hidden is for students that are cut out of their teacher" in result.output


def test_train_alone_asks_for_the_cut_first(tiny_cache, tmp_path, teacher):
    arguments = ["train", "--student", "pruned:0.5", "--cache", str(tiny_cache[0]), "--data", DATA]
    arguments += ["--set", f"teacher={teacher}", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "first run `distill prune --teacher" in result.output
    assert not (tmp_path / "run").exists()
