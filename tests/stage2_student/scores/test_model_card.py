"""The card of a student: valid for the hub, true, the same for the same run, and text whatever strangers call things."""

import json
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from click.testing import CliRunner
from finished_runs import make_config
from huggingface_hub import ModelCard

from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.config import config_from_dict, config_to_dict, load_options
from vlm_distill_cache.common.files.signed import write_signed
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.config import TrainConfig, describe
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final, read_provenance
from vlm_distill_cache.stage2_student.run import run, write_report_again
from vlm_distill_cache.stage2_student.scores.card import SCORES, CardScores, card_text, is_unedited, write_card
from vlm_distill_cache.stage2_student.scores.held_out import card_scores
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.origin import build_command, licence_of
from vlm_distill_cache.stage2_student.scores.results import MEMORISED, EvaluationReport

NASTY = (
    "[a](http://e) ![b](http://e/c.png) <img src=http://e> `d` | *f* &lt; $g$",
    "---\nlicense: mit\n---\n# Mine <script>",
    "```\n</details>\n```\n````\n- x: [",
    'no" ' + "'" * 3 + ": {} %&!@ \x1b]0;t\x07 \u202e\u2028 # \ud800",
    "yes", "1e3", "null", "~", "x" * 5000, "  ", "s3://k:secret@b/c?X-Amz-Signature=abc",
)  # fmt: skip


def block(card, language):
    """The code of a language in a card, by the rules of Markdown."""
    tokens = pytest.importorskip("markdown_it").MarkdownIt("commonmark").parse(card.split("\n---\n", 1)[1])
    return next(token.content for token in tokens if token.type == "fence" and token.info == language)


def test_a_run_leaves_cards_that_are_valid_and_tell_what_its_files_hold(tiny_cache, finished):
    config = make_config(tiny_cache[0], finished.output)
    stored = json.loads((finished.output / "evaluation.json").read_text())
    for own, other in (("sft", "distilled"), ("distilled", "sft")):
        final = finished.output / own / "final"
        text = (final / "README.md").read_text()
        card = ModelCard.load(final / "README.md")
        assert is_unedited(text)
        assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
            "transformers", "image-text-to-text", "unknown",
        )  # fmt: skip
        found = {result.metric_name: result.metric_value for result in card.data.eval_results}
        scores = stored[own]["scores"]
        assert found["captions by likelihood, %"] == round(100 * scores["likelihood"]["value"], 1)
        assert len(found) == 3
        assert f"| score | **{own}** | {other} | distilled minus sft |" in text
        kl, cosine = (scores[name] for name in ("teacher/kl", "attention/cosine"))
        assert f"{kl['value']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]" in text
        assert f"{cosine['value']:.3f} [" in text
        provenance = read_final(final)
        for said in (provenance["fingerprint"], *provenance["caches"].values(), "20 samples with 743 taught tokens"):
            assert said in text
        last = [json.loads(line) for line in (finished.output / own / "log.jsonl").read_text().splitlines()][-1]
        assert f"lm {last['lm']:.4g}" in text
        assert str(finished.output.parent) not in text
        # What it says about making it again is this run.
        told = yaml.safe_load(block(text, "yaml"))
        again = config_from_dict(TrainConfig, {**told, "cache": config.cache, "output": config.output})
        assert describe(again, {}) == describe(config_from_dict(TrainConfig, provenance["config"]), {})
        build, train = map(shlex.split, block(text, "sh").splitlines())
        assert train[:2] == ["distill", {"sft": "train", "distilled": "run"}[own]]
        settings = [value for flag, value in pairwise(build) if flag == "--set"]
        signals = build[build.index("--signals") + 1]
        made = load_options(BuildConfig, {"signals": signals.split(",")}, settings)
        assert (made.logits, made.attention_dtype, made.shard_size) == ("exact", "f4", 6)


@pytest.mark.slow
def test_a_card_is_the_same_again_and_an_edited_one_stays(tiny_cache, copied, caplog):
    config = make_config(tiny_cache[0], copied)
    cards = {name: copied / name / "final" / "README.md" for name in ("sft", "distilled")}
    before = {name: path.read_bytes() for name, path in cards.items()}
    edited = b"---\nlicense: mit\n---\n# Mine, \xff\n"
    cards["sft"].write_bytes(edited)
    cards["distilled"].unlink()
    (cards["sft"].with_name("model.safetensors")).write_bytes(b"lost")
    assert run(config).fresh
    assert cards["distilled"].read_bytes() == before["distilled"]
    assert cards["sft"].read_bytes() == edited
    assert f"{cards['sft']} was edited and stays as it is; delete it for a new one" in caplog.text
    cards["sft"].unlink()
    for make in (cards["sft"].mkdir, lambda: cards["sft"].symlink_to(cards["sft"])):
        make()
        write_report_again(copied)
        assert f"{cards['sft']} is no file, so no card is written; move it away" in caplog.text
        caplog.clear()
        cards["sft"].unlink() if cards["sft"].is_symlink() else cards["sft"].rmdir()
    write_report_again(copied)
    assert cards["sft"].read_bytes() == before["sft"]
    assert not run(config).fresh


def test_scores_reach_the_card_when_asked_for_and_follow_into_exports(copied, tmp_path):
    final = copied / "sft" / "final"
    (final / SCORES).write_bytes(b"{}")
    before = (final / "README.md").read_bytes()
    arguments = ["evaluate", str(final), "--limit", "2"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (final / "README.md").read_bytes() == before
    done = CliRunner().invoke(main, [*arguments, "--card"])
    assert done.exit_code == 0, done.output
    card = (final / "README.md").read_text()
    assert "| score | **sft** |" in card
    exported = CliRunner().invoke(main, ["export", str(final), "--output", str(tmp_path / "x"), "--dtype", "float16"])
    assert exported.exit_code == 0, exported.output
    text = (tmp_path / "x" / "README.md").read_text()
    assert "These are the scores of the student before it was exported." in text
    assert "| export: dtype | `float16` |" in text
    assert text.partition("## Scores")[2].partition("| score")[2].partition("##")[0] in card
    ModelCard(text)
    read_final(tmp_path / "x")


@pytest.mark.parametrize("said", NASTY)
def test_whatever_strangers_call_things_is_text_and_the_card_stays_valid(copied, said):
    final = copied / "distilled" / "final"
    provenance = read_provenance(final)
    config = provenance["config"]
    line = "".join(character for character in " ".join(said.split()) if character.isprintable())
    config |= {"data": line, "student": line, "images": f"/home/somebody/x{line}", "license": ""}
    cache = {
        key: said if isinstance(value, str | None) else value
        for key, value in provenance["origin"]["caches"][0].items()
    }
    cache |= {"failures": [said], "signals": [said], "hash": "h"}
    provenance["origin"] |= {"caches": [cache], "bases": {said: said}, "license": said, "versions": {said: said}}
    score = Score(value=0.5, low=0.0, high=1.0, items=2)
    report = EvaluationReport(scores={"likelihood": score, f"likelihood/{line[:100]}": score})
    write_card(final, provenance, scores=CardScores({line[:900] or "x": report}, line))
    card = ModelCard.load(final / "README.md")
    assert card.data.license in ("other", "unknown")
    assert card.data.base_model is card.data.datasets is None
    text = (final / "README.md").read_text()
    assert "somebody" not in text
    assert "secret" not in text
    assert "abc" not in text or "X-Amz" not in said
    assert all(character.isprintable() or character == "\n" for character in text)
    tokens = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").parse(card.text)
    html = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert [entry.splitlines()[0] for entry in html[:3]] == ["<details>", "</details>", html[-1]]
    inline = [child.type for token in tokens if token.type == "inline" for child in token.children]
    assert not {kind for kind in inline if kind.startswith(("link", "image", "html", "em_"))}
    assert [token.content for token in tokens if token.type == "heading_open"] == [""] * 8
    assert yaml.safe_load(block(text, "yaml"))["seed"] == 0


def test_a_card_says_what_was_scored_on_what_and_no_folder_of_the_machine(tiny_cache, copied, caplog, tmp_path):
    final, score = copied / "sft" / "final", Score(value=0.5, low=0.0, high=1.0, items=2)
    report = EvaluationReport(scores=dict.fromkeys(("questions", "teacher/top1", "teacher/kl"), score))
    place = tmp_path / "my own" / "mine.json"
    config = replace(make_config(tiny_cache[0], copied), data=str(place), images=str(tmp_path / "pictures"))
    unread = f"1 of 3 questions cannot be read and are not scored; the first: b: {tmp_path}/pictures/b.png is missing"
    for notes, kind, words in (
        ((f"{MEMORISED} ({place}), so these scores include memorisation.", unread), "training-data", "Items of the training data"),
        ((), "held-out", "Held-out items"),
    ):  # fmt: skip
        scores = card_scores({"sft": report}, config, None, notes)
        write_card(final, read_provenance(final), scores=scores)
        text = (final / "README.md").read_text()
        assert str(tmp_path) not in text + (final / SCORES).read_text()
        said = text.partition("## Scores")[2].partition("## Make")[0]
        items, agreement = said.partition("Agreement with the teacher, on the first samples of the cache")[::2]
        assert f"{words}, mine.json; value" in items
        assert ("questions, exact match" in items, "teacher" in items.partition("interval")[2]) == (True, False)
        assert "top-1 agrees" in agreement
        assert "nats/row" in agreement
        assert all(note.partition(" (")[0].partition(";")[0] in agreement for note in notes)
        assert ("mine.json), so these scores include memorisation" in agreement) is bool(notes)
        found = {result.metric_name: result.dataset_type for result in ModelCard(text).data.eval_results}
        assert found == {"questions, exact match, %": kind, "top-1 agrees with teacher, %": "teacher-cache"}
    (final / "README.md").write_text("---\nlicense: mit\n---\nMine")
    assert CliRunner().invoke(main, ["export", str(final), "--output", str(tmp_path / "x")]).exit_code == 0
    assert f"{final / 'README.md'} was edited; the export has a card of its own" in caplog.text


def test_a_card_names_the_command_that_made_the_student_and_what_can_be_done_with_it(copied):
    final = copied / "distilled" / "final"
    provenance = read_provenance(final)
    assert "distill run --config" in card_text(final, provenance)
    assert "takes no question without" not in card_text(final, provenance)
    (final / SCORES).unlink()
    assert "distill train --config" in card_text(final, provenance)
    assert "`distill evaluate FOLDER --card` does it" in card_text(final, provenance)
    provenance["encoder"]["template"] |= {"name": "paligemma", "bos_after_image": True}
    for layout in ("adapter", "gguf"):
        text = card_text(final, provenance | {"export": {"layout": layout}})
        assert "--card" not in text
        assert "scores the student that this export was made of" in text
        assert "takes no question without a picture" in text


def test_licences_are_those_that_are_stated(copied, tmp_path):
    for head, licence in (
        ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"),
        ("\ufeff---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense: [mit, gpl]\n---\n", "mit, gpl"),
        ("# No head: license: mit", ""),
        ("---\nlicense: [\n---\n", ""),
        ("---\n- x\n---\n", ""),
        (None, ""),
    ):
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if head is not None:
            (folder / "README.md").write_text(head)
        assert licence_of(folder) == licence
    final = copied / "sft" / "final"
    provenance = read_provenance(final)
    assert card_text(final, provenance).count("| unknown: ask |") == 4
    provenance["origin"] |= {"license": "Apache-2.0", "bases": {f"org/base@{'a' * 40}": "mit"}}
    provenance["config"]["language_model"] = f"org/base@{'a' * 40}"
    provenance["origin"]["caches"][0] |= {"teacher_license": "llama2", "data_repository": "org/data"}
    text = card_text(final, provenance)
    card = ModelCard(text)
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", ["org/base"], ["org/data"])
    assert "| teacher: tiny | llama2 |" in text
    assert f"| base: org/base@{'a' * 40} | mit |" in text
    provenance["origin"]["license"] = "Only on Sundays"
    card = ModelCard(card_text(final, provenance))
    assert (card.data.license, card.data.license_name) == ("other", "only-on-sundays")


def test_a_student_of_an_older_version_has_a_card_and_the_licence_is_no_part_of_a_run(tiny_cache, copied):
    final = copied / "distilled" / "final"
    provenance = {name: value for name, value in read_provenance(final).items() if name != "origin"}
    del provenance["config"]["license"]
    write_signed(final / PROVENANCE, provenance)
    assert "| not stated | not stated |" in card_text(final, read_final(final))
    config = make_config(tiny_cache[0], copied)
    assert describe(replace(config, license="mit"), {}) == describe(config, {})
    assert "license" not in describe(config, {})
    assert config_to_dict(config)["license"] == ""


def test_the_command_of_a_build_names_what_a_plan_tells(tiny_cache):
    from vlm_distill_cache.common.cache.plan import read_plan

    plan = read_plan(tiny_cache[0])
    of_hub = replace(
        plan,
        teacher={**plan.teacher, "name": "org/teacher", "revision": "b" * 40},
        data={"name": "n", "repository": "org/data", "revision": "c" * 40, "config": "all", "limit": 5},
    )
    words = shlex.split(build_command(of_hub))
    assert words[:2] == ["teacher-cache", "build"]
    assert words[words.index("--teacher") + 1] == f"org/teacher@{'b' * 40}"
    assert words[words.index("--data") + 1] == f"org/data@{'c' * 40}:name=all"
    assert "limit=5" in words
    written = AnswersCodec(max_new_tokens=9, seed=3)
    own = replace(
        plan,
        teacher={**plan.teacher, "name": "built-in (shapes)"},  # that drew its pupils' data alone
        data={"name": "my data.json[:5]", "limit": 5},
        signals={**plan.signals, "answers": written.to_dict()},
        fields={**plan.fields, "answers": written.fields()},
    )
    words = shlex.split(build_command(own, images=True))
    assert words[words.index("--teacher") : words.index("--signals")] == [
        "--teacher", "TEACHER", "--data", "PATH_TO/my data.json", "--images", "IMAGES",
    ]  # fmt: skip
    assert "answers" not in words[words.index("--signals") + 1].split(",")
    assert {"answers=generate", "max_new_tokens=9", "answer_seed=3"} <= {*words}
    assert build_command(replace(plan, extra={"derived": {}})).startswith("cachectl ")
    assert build_command(replace(plan, teacher={"served": True})).startswith("cachectl import-logprobs ")


def test_the_lines_that_load_it_are_those_of_what_the_folder_holds(copied, tmp_path):
    provenance = read_provenance(copied / "sft" / "final")
    for name, text, expected in (
        ("config.json", '{"auto_map": {}}', 'AutoModelForImageTextToText.from_pretrained("PATH_OR_NAME", trust_remote_code=True)'),
        ("config.json", "{}", 'AutoProcessor.from_pretrained("PATH_OR_NAME")'),
        ("adapter_config.json", '{"base_model_name_or_path": "/home/a/base"}', '"PATH_TO/base", dtype="float32"), "PATH_OR_NAME")'),
        ("adapter_config.json", '{"base_model_name_or_path": "a/b", "revision": "c"}', '"a/b", revision="c", dtype="float32")'),
        ("model-f16.gguf", "", "llama-mtmd-cli -m model-f16.gguf --image"),
    ):  # fmt: skip
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / name).write_text(text)
        lines = block(card_text(tmp_path / "x", provenance), "python")
        assert expected in lines
        compile(lines, name, "exec")
        shutil.rmtree(tmp_path / "x")
