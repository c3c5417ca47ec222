"""Runs and suites side by side: gains over the first where the items are the same, and a refusal of all else."""

import html
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from page_inputs import without_heads, write_suite

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.signed import read_signed, write_signed
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.scores.metrics import Score, paired_difference
from vlm_distill_cache.stage2_student.scores.results import format_score
from vlm_distill_cache.stage2_student.suite.cli import suite
from vlm_distill_cache.stage2_student.suite.compare import name_outputs
from vlm_distill_cache.stage2_student.suite.legends import explain_measures
from vlm_distill_cache.stage2_student.suite.measures import gain
from vlm_distill_cache.stage2_student.suite.page import SuiteOutput, write_suite_page


def compare(tmp_path, *folders, code=0):
    """The page and the document of `distill compare --json`; of a failure what it says."""
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["compare", *map(str, folders), "--output", str(page), "--json"])
    assert result.exit_code == code, result.output
    return (without_heads(page.read_text()), json.loads(result.stdout)) if not code else result.output


def rewrite(path, change):
    stored = read_signed(path)
    stored.pop("checksum", None)
    change(stored)
    write_signed(path, stored)


@pytest.mark.slow
def test_gains_between_runs_are_paired_and_wins_are_counted(finished, copied, tmp_path):
    generator = np.random.default_rng(0)
    first = read_signed(finished.output / "evaluation.json")["distilled"]["items"]
    other = {
        name: {kind: generator.integers(0, 2, len(of)).tolist() for kind, of in kinds.items()}
        for name, kinds in first.items()
    }
    expected = {name: paired_difference(other[name], first[name]).to_dict() for name in first}

    def change(stored):
        stored["distilled"]["items"] = other
        for name, gained in expected.items():
            stored["distilled"]["scores"][name]["value"] += gained["value"]

    rewrite(copied / "evaluation.json", change)
    shutil.move(copied, tmp_path / "other")
    page, told = compare(tmp_path, finished.output, tmp_path / "other")
    assert told["runs"]["other"]["gain_over_first"] == expected
    assert told["runs"]["run"]["gain_over_first"] == {}
    assert told["notes"] == []
    flat = [
        (new, old)
        for name in ("likelihood",)
        for kind, of in other[name].items()
        for new, old in zip(of, first[name][kind], strict=True)
    ]
    counts = [
        sum(new == old == 1 for new, old in flat),
        sum(new > old for new, old in flat),
        sum(new < old for new, old in flat),
    ]
    row = re.search(r"<td>other: captions by likelihood, %</td>((?:<td>\d+</td>)+)", page)[1]
    assert [int(count) for count in re.findall(r"\d+", row)][:3] == counts
    assert page.count("<polyline") > 0


def test_runs_on_other_items_have_no_gain_and_the_page_says_in_what_they_differ(finished, copied, tmp_path):
    rewrite(copied / "run.json", lambda stored: stored["evaluation"].update(split="validation", agreement_samples=9))
    shutil.move(copied, tmp_path / "other")
    page, told = compare(tmp_path, finished.output, tmp_path / "other")
    assert told["runs"]["other"]["gain_over_first"] == {}
    assert told["runs"]["other"]["gain_over_baseline"]
    assert len(told["notes"]) == 1
    assert "other was scored on other items than run (split validation there, test here)" in told["notes"][0]
    assert told["notes"][0].endswith(": no gain is told")
    assert told["notes"][0] in page


def test_of_runs_on_other_items_the_agreement_on_the_same_samples_is_told_and_said(finished, tmp_path):
    agreement = {"value": 0.5, "low": 0.4, "high": 0.6, "items": 50}
    for name, limit in {"first": None, "other": 100}.items():
        shutil.copytree(finished.output, tmp_path / name)
        rewrite(
            tmp_path / name / "evaluation.json",
            lambda stored: stored["distilled"]["scores"].setdefault("teacher/top1", agreement),
        )
        rewrite(tmp_path / name / "run.json", lambda stored, limit=limit: stored["evaluation"].update(limit=limit))
    _, told = compare(tmp_path, tmp_path / "first", tmp_path / "other")
    assert told["runs"]["other"]["gain_over_first"].keys() == {"teacher/top1"}
    assert told["notes"] == [
        "other was scored on other items than first (limit 100 there, all here): no gain is told but of the agreement with the "
        "teacher, which is on the same cached samples"
    ]


def test_a_log_that_lacks_steps_is_told(finished, copied, tmp_path):
    log = copied / "distilled" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    shutil.move(copied, tmp_path / "other")
    log = tmp_path / "other" / "distilled" / "log.jsonl"
    for kept, content in ((0, b"{"), (0, bytes(50)), (0, None), (len(lines) - 1, b"".join(lines[:-1]))):
        log.unlink(missing_ok=True)
        if content is not None:
            log.write_bytes(content)
        page, told = compare(tmp_path, finished.output, tmp_path / "other")
        assert [f"{kept} of {len(lines)} steps can be read" in note for note in told["notes"]] == [True]
        assert f"{kept} of {len(lines)} steps" in page


def test_what_is_no_finished_run_is_refused(finished, copied, tmp_path):
    rewrite(copied / "run.json", lambda stored: stored.update(finished=None))
    assert "is not finished; run the same `distill run` command again" in compare(
        tmp_path, finished.output, copied, code=1
    )
    for content in (b"{", bytes(50), b"[]"):
        (copied / "run.json").write_bytes(content)
        said = compare(tmp_path, finished.output, copied, code=1)
        assert "damaged" in said
        assert "not finished" not in said
    (tmp_path / "empty").mkdir()
    said = compare(tmp_path, finished.output, tmp_path / "empty", code=1)
    assert "neither run.json" in said
    assert "summary.json" in said
    assert "given twice" in compare(tmp_path, finished.output, finished.output, code=1)
    assert not (tmp_path / "page.html").exists()


def test_gains_between_suites_are_those_of_their_measures(tmp_path):
    before, after = (write_suite(tmp_path / name, seed=seed, name=name) for seed, name in enumerate(("a", "b")))
    page, told = compare(tmp_path, tmp_path / "a", tmp_path / "b")
    found = told["suites"]["b"]["sugarcrepe"]["gain_over_first"]
    assert found == {
        name: gain(after[name], before[name], (after, before)).to_dict() for name in after if name != "precision"
    }
    units = {
        part: dict(zip(of[part].units, of[part].hits, strict=True))
        for of in (before,)
        for part in ("likelihood/swap", "likelihood/add")
    }
    old = {unit: hit for part in units.values() for unit, hit in part.items()}
    new = {unit: hit for part in units for unit, hit in zip(after[part].units, after[part].hits, strict=True)}
    counts = [
        sum(new[unit] == old[unit] for unit in old),
        sum(new[unit] > old[unit] for unit in old),
        sum(new[unit] < old[unit] for unit in old),
    ]
    heads = re.search(r"<th>alike</th><th>b better</th><th>a better</th></tr><tr>((?:<td>\d+</td>)+)", page)
    assert [int(count) for count in re.findall(r"\d+", heads[1])] == counts
    won = next(unit for unit in new if new[unit] > old[unit])
    assert f"<td>{won}</td><td>0</td><td>1</td><td>a on {won}</td><td>b on {won}</td>" in page


def change_suite(folder, *, asked=None, **summary):
    """Change what a suite's folder says: `asked` from its digests to others, fields of the summary, or of its benchmark."""
    for name in ("summary.json", "sugarcrepe/measures.json"):
        stored = json.loads((folder / name).read_text())
        entry = stored.get("benchmarks", {}).get("sugarcrepe", {})
        for key, value in summary.items():
            (entry if key in entry else stored)[key] = value
        if asked and "asked" in stored:
            stored["asked"] = asked(stored["asked"])
        (folder / name).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("changes", "gains", "said"),
    [
        ({"asked": lambda of: of | {"item 3": "e"}}, False, "1 of 60 items that have the same id differ"),
        ({"asked": lambda of: {f"other {item}": digest for item, digest in of.items()}}, False, "asked different items"),
        ({"metric": "choices"}, False, "counted as choices, not as captions"),
        ({"asked": lambda of: {item: of[item] for item in list(of)[:20]}}, True, "over the 20 items that both were asked"),
        ({"prompts": "plain"}, True, "--prompts plain, a with published"),
        ({"instruction": ""}, True, "stood nothing, not 'Answer.'"),
        ({}, True, None),
    ],
)  # fmt: skip
def test_a_gain_between_suites_is_told_of_equal_items_alone_and_with_what_else_differs(tmp_path, changes, gains, said):
    for seed, name in enumerate("ab"):
        write_suite(tmp_path / name, seed=seed, name=name)
    change_suite(tmp_path / "b", **changes)
    page, told = compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert bool(told["suites"]["b"]["sugarcrepe"]["gain_over_first"]) is gains
    assert ("b better" in page) is gains
    assert bool(re.search(r"<td><span class=\"\w*\">[+-]\d", page)) is gains
    assert [said in note for note in told["notes"]] == ([True] if said else [])
    for note in told["notes"]:
        assert note.replace("'", "&#x27;") in page
        assert ("no gain is told" in note) is not gains


def test_the_command_on_a_page_makes_the_same_suite_again(tmp_path, monkeypatch):
    write_suite(tmp_path / "a", seed=0)
    monkeypatch.chdir(tmp_path)
    for folder in ("vg's", "coco", "the cache"):
        (tmp_path / folder).mkdir()
    files = {"benchmarks": "my files", "images": ["vg's", "coco"], "only": ["sugarcrepe", "x"]}
    student = {"name": "s", "place": "a student", "reads_as": "the cache"}
    change_suite(tmp_path / "a", files=files, limit=3, student=student)
    text = html.unescape(write_suite_page(tmp_path / "a").read_text())
    command = re.search(r"<dd>distill (suite .*?)</dd>", text)[1].replace("OUTPUT", str(tmp_path / "new"))
    parsed = suite.make_context("suite", shlex.split(command)[1:], resilient_parsing=True).params
    assert parsed["student"] == "a student"
    assert parsed["benchmarks"] == "my files"
    assert [str(folder) for folder in parsed["images"]] == ["vg's", "coco"]
    assert (parsed["only"], parsed["limit"], parsed["prompts"], parsed["cache"]) == (
        "sugarcrepe,x",
        3,
        "published",
        "the cache",
    )


def test_of_many_models_each_bar_has_a_name_and_wide_tables_are_turned(tmp_path):
    names = [f"r{place}" for place in range(12)]
    for seed, name in enumerate(names):
        write_suite(tmp_path / name, seed=seed)
    page, _ = compare(tmp_path, *(tmp_path / name for name in names))
    bars = re.search(r'<div class="bars">(.*?)</div>', page)[1]
    called = re.findall(r'<span class="name">(.*?)</span>', bars)
    assert called == names * (len(called) // 12)
    assert len(set(re.findall(r"background:((?:var|hsl)\(.*?\))", bars))) == 12
    headline = re.search(r"<table.*?</table>", page)[0]
    assert re.findall(r"<tr><t[hd]>(.*?)</t[hd]>", headline)[:5] == ["benchmark", "items", "score", "r0", "r1"]


def test_a_page_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path):
    write_suite(tmp_path / "a", seed=0)
    assert compare(tmp_path, tmp_path / "a") == compare(tmp_path, tmp_path / "a")
    page = write_suite_page(tmp_path / "a")
    page.rename(tmp_path / "page.html")
    assert "no earlier result of this command" in compare(tmp_path, tmp_path / "a", code=2)


def test_the_page_of_a_suite_tells_all_that_its_summary_does(tmp_path):
    measures = write_suite(tmp_path / "a", seed=0)
    text = write_suite_page(tmp_path / "a").read_text()
    entry = SuiteOutput(tmp_path / "a").summary["benchmarks"]["sugarcrepe"]
    for measure in entry["measures"]:
        if measure["value"] is not None:
            assert (
                f"{100 * measure['value']:.1f} <small>[{100 * measure['low']:.1f}, {100 * measure['high']:.1f}]" in text
            )
    for said in (
        "2 items are not scored: no picture",
        "a note",
        "stray.json",
        "no known layout",
        "SugarCrepe",
        "published",
    ):
        assert said in text
    explained = explain_measures(entry["measures"])
    assert {measure.heading or name for name, measure in measures.items() if "/" not in name} <= explained.keys()
    assert "gain</th>" not in text
    assert "Counted in each of 2 subsets, of which this is the unweighted mean." in text


@pytest.mark.parametrize(
    ("metric", "name", "says", "not_this"),
    [
        ("pope", "yes", "answered with yes", 'P("Yes")'),
        ("pope", "p_yes_yes", "answered with yes", "the two fit"),
        ("sugarcrepe", "yes", "gets a higher P(yes)", "answered with yes"),
        ("winoground", "text_yes", "each picture prefers", "log-prob"),
        ("textvqa_accuracy", "accuracy", "three who gave the answer", "caption"),
        ("vizwiz_accuracy", "unanswerable_recall", "cannot be answered: the share of such questions", "precision"),
        ("relaxed_accuracy", "accuracy", "5 %", "three"),
        ("mme", "perception", "acc and acc+", "Mean"),
        ("hallusionbench", "fAcc", "figures", "Mean"),
        ("circular", "circular_likelihood", "all rotations", "two fit"),
        ("circular", "accuracy", "right answers", "rotations"),
        ("choices", "likelihood", "letter is the likeliest", "sum of"),
        ("whats-up", "pairs_yes", "both are right", "belong together"),
        ("hallusionbench", "p_yes_aAcc", "above P", "neither yes nor no"),
    ],
)
def test_a_legend_is_that_of_the_metric(metric, name, says, not_this):
    told = explain_measures([{"name": name, "heading": "h", "gains": True}], metric)["h"]
    assert says in told
    assert not_this not in told
    assert told.endswith("More is better.")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("summary.json", lambda stored: stored.pop("benchmarks"), "summary.json"),
        ("summary.json", lambda stored: stored["benchmarks"].update({"../b": stored["benchmarks"]["sugarcrepe"]}), "no name of a"),
        ("sugarcrepe/measures.json", lambda stored: stored["measures"][1]["hits"].pop(), "do not belong together"),
        ("sugarcrepe/measures.json", lambda stored: stored["measures"][0].update(parts=["likelihood"]), "do not belong together"),
        ("sugarcrepe/measures.json", lambda stored: stored["measures"][1]["of"].append("1"), "a list of numbers"),
        ("sugarcrepe/measures.json", lambda stored: stored["measures"][1].update(hits=[1e308] * 30), "a list of numbers up to"),
        ("sugarcrepe/measures.json", lambda stored: stored.update(measures=[]), "holds other measures"),
        ("sugarcrepe/measures.json", lambda stored: stored["measures"].pop(0), "(likelihood)"),
        ("sugarcrepe/measures.json", None, "is missing"),
    ],
)  # fmt: skip
def test_damaged_suites_are_refused_with_the_remedy(tmp_path, name, change, said):
    for seed, folder in enumerate(("a", "b")):
        write_suite(tmp_path / folder, seed=seed)
    path = tmp_path / "b" / name
    stored = json.loads(path.read_text())
    if change is None:
        path.unlink()
    else:
        change(stored)
        path.write_text(json.dumps(stored))
    output = compare(tmp_path, tmp_path / "a", tmp_path / "b", code=1)
    assert said in output
    assert "distill suite` command again" in output


def test_models_are_called_by_their_names_and_where_these_are_the_same_by_their_folders_too(tmp_path):
    for folder, name in {"a": "x distilled", "b": "y distilled", "c": "y distilled", "d": "a (b)"}.items():
        write_suite(tmp_path / folder, seed=0, name=name)
    for folders, names in {
        "ab": ["x distilled", "y distilled"],
        "abc": ["x distilled", "y distilled (b)", "y distilled (c)"],
        "ad": ["x distilled", "a (b)"],
    }.items():
        _, told = compare(tmp_path, *(tmp_path / folder for folder in folders))
        assert list(told["suites"]) == names
        assert told["folders"] == {name: str(tmp_path / folder) for name, folder in zip(names, folders, strict=True)}


def test_the_terminal_tells_scores_and_gains_with_their_intervals(finished, copied, tmp_path):
    shutil.move(copied, tmp_path / "other")
    for seed, name in enumerate("ab"):
        write_suite(tmp_path / name, seed=seed)
    folders = [finished.output, tmp_path / "other", tmp_path / "a", tmp_path / "b"]
    _, told = compare(tmp_path, *folders)
    said = CliRunner().invoke(main, ["compare", *map(str, folders), "--output", str(tmp_path / "page.html")]).stdout

    def shown(score, sign=""):
        return " ".join(format_score(Score(**score), 100, sign=sign))

    for name, of in told["runs"].items():
        found = [
            " ".join([name, shown(of["scores"][key]), shown(of["gain_over_baseline"][key], "+"),
                      *([shown(of["gain_over_first"][key], "+")] if key in of["gain_over_first"] else [])])
            for key in ("likelihood", "questions")
        ]  # fmt: skip
        plain = re.sub(" +", " ", said)
        assert all(line in plain for line in found), plain
    values = {
        name: {key: of["sugarcrepe"]["measures"][0][key] for key in ("value", "low", "high")} | {"items": 60}
        for name, of in told["suites"].items()
    }
    gained = shown(told["suites"]["b"]["sugarcrepe"]["gain_over_first"]["likelihood"], "+")
    assert f"sugarcrepe likelihood a {shown(values['a'])}\n b {shown(values['b'])} {gained}\n" in plain
    assert len(said.splitlines()) < 20


def test_what_was_said_stands_beside_wins_where_it_is_counted_with_all_items_of_a_unit(tmp_path):
    for seed, name in enumerate("ab"):
        measures = write_suite(tmp_path / name, seed=seed)
    unit = measures["likelihood/swap"].units[0]
    page, _ = compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "a said" in page
    for name in "ab":  # items of other names, two of each unit
        path = tmp_path / name / "sugarcrepe" / "results.jsonl"
        head, *lines = map(json.loads, path.read_text().splitlines())
        twice = [line | {"item": f"{line['item']}/{place}"} for line in lines for place in range(2)]
        path.write_text("".join(json.dumps(line) + "\n" for line in (head, *twice)))
        path = path.with_name("measures.json")
        groups = {line["item"]: line["item"][:-2] for line in twice}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": groups}))
    assert SuiteOutput(tmp_path / "a").answers("sugarcrepe", [unit]) == {
        unit: f"{unit}/0: a on {unit}; {unit}/1: a on {unit}"
    }
    for name in "ab":
        change_suite(tmp_path / name, metric="sugarcrepe")  # known by its likelihood, which no answer tells
    page, _ = compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "b better" in page
    assert "a said" not in page


def test_folders_of_one_name_are_told_apart_by_those_around_them(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"]
    assert list(name_outputs(folders)) == ["x/run", "y/run", "y/other"]
    assert list(name_outputs(folders[1:])) == ["run", "other"]
    with pytest.raises(ConfigError, match="given twice"):
        name_outputs([folders[0], tmp_path / "x" / ".." / "x" / "run"])
