"""A suite: the same results whatever stops or divides it, of one model alone, with all that is missing said."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.errors import ConfigError, DataError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.hub import HubFolder
from vlm_distill_cache.data.benchmarks import drawn
from vlm_distill_cache.data.benchmarks.items import Item
from vlm_distill_cache.data.shapes.dataset import shapes_evaluation
from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model
from vlm_distill_cache.stage2_student.suite import ask as asking
from vlm_distill_cache.stage2_student.suite import run as running
from vlm_distill_cache.stage2_student.suite.limits import take
from vlm_distill_cache.stage2_student.suite.opened import find_model, load_model
from vlm_distill_cache.stage2_student.suite.run import RESULTS, Suite, find_tasks, outlook, run_suite
from vlm_distill_cache.stage2_student.suite.table import MOST_OTHERS, render_suite

ITEMS = 2
LIKELIHOODS = "likelihood"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Two drawn benchmarks, and a file that is none."""
    folder = tmp_path_factory.mktemp("benchmarks")
    drawn.write_drawn(folder, items=ITEMS)
    for name in ("vqav2", "gqa", "mmbench", "pope"):
        shutil.rmtree(folder / name)
    (folder / "prices.json").write_text('[{"price": 3, "currency": "EUR"}]')
    return folder


@pytest.fixture
def suite(benchmarks, tiny_llava, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "BLOCK", 3)
    model = find_model(HubFolder(tiny_llava, "tiny", ""), None)
    return Suite(model=model, benchmarks=benchmarks, output=tmp_path / "out")


def results(output: Path) -> dict[str, list]:
    """The lines of items by benchmark; the heads hold seconds."""
    return {path.parent.name: path.read_text().splitlines()[1:] for path in sorted(output.glob(f"*/{RESULTS}"))}


@pytest.mark.slow
def test_a_suite_that_was_killed_or_divided_ends_as_one_that_was_not(suite, tmp_path, monkeypatch):
    whole = run_suite(suite)
    asked = []
    ask = asking.ask

    def dies(model, encoder, requests):
        asked.append(len(requests))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(model, encoder, requests)

    killed = replace(suite, output=tmp_path / "killed")
    monkeypatch.setattr(asking, "ask", dies)
    with pytest.raises(KeyboardInterrupt):
        run_suite(killed)
    blocks = sum(task.blocks for task in find_tasks(suite)[1])
    assert not results(killed.output)
    resumed = run_suite(killed)
    assert len(asked) == blocks + 1  # the block that was being asked, and none twice
    assert results(killed.output) == results(suite.output)

    def one_after_the_other(target, jobs, **_):
        for _, arguments in reversed(jobs):
            target(*arguments)

    divided = replace(suite, output=tmp_path / "divided")
    monkeypatch.setattr(running, "run_processes", one_after_the_other)
    shared = run_suite(divided, processes=3)
    assert results(divided.output) == results(suite.output)
    for other in (resumed, shared):
        for name, entry in whole["benchmarks"].items():
            assert other["benchmarks"][name] | {"seconds": 0} == entry | {"seconds": 0}
    assert not list(tmp_path.rglob("blocks"))

    asked.clear()
    assert run_suite(suite)["benchmarks"] == whole["benchmarks"]
    assert not asked  # all is there: no model is opened


def test_the_numbers_are_those_of_an_evaluation_of_the_same_pairs(suite):
    entry = run_suite(suite)["benchmarks"]["sugarcrepe"]
    model, encoder = load_model(suite.model)
    report = evaluate_model(model, encoder, shapes_evaluation("test", ITEMS, seed=drawn._SEED), resamples=10)
    scores = {measure["name"]: measure["value"] for measure in entry["measures"]}
    assert scores[LIKELIHOODS] == pytest.approx(report.scores["likelihood"].value)
    stored = read_json(suite.output / "sugarcrepe" / "measures.json")
    counted = next(measure for measure in stored["measures"] if measure["name"] == f"{LIKELIHOODS}/swap_obj")
    assert counted["hits"] == report.items["likelihood"]["swap_obj"]


def test_results_of_something_else_are_refused(suite, tmp_path):
    run_suite(replace(suite, only=("winoground",)))
    others = {
        "student: tiny-llava with other weights or settings there": {
            "model": replace(suite.model, fingerprint="another")
        },
        "student: tiny-llava there, another now": {
            "model": replace(suite.model, fingerprint="another", name="another")
        },
        "prompts": {"prompts": "plain"},
        "limit: none there, 5 now": {"limit": 5},
    }
    for word, change in others.items():
        for refuses in (run_suite, outlook):
            with pytest.raises(ConfigError, match=rf"results of something else \({word}.* give another --output"):
                refuses(replace(suite, **change))
    folder = tmp_path / "changed"
    shutil.copytree(suite.benchmarks, folder)
    examples = folder / "winoground" / "examples.jsonl"
    examples.write_text(examples.read_text().replace('"caption_0": "a', '"caption_0": "one', 1))
    with pytest.raises(ConfigError, match=r"answers to other questions .* delete .*winoground"):
        run_suite(replace(suite, benchmarks=folder))
    path = suite.output / "winoground" / RESULTS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="lacks items; delete it"):
        run_suite(suite)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"damaged .* delete it"):
        run_suite(suite)
    if Path("/proc/self").exists():  # of Linux; its mode says that root may write there
        with pytest.raises(ConfigError, match="/proc cannot be written"):
            outlook(replace(suite, output=Path("/proc/x")))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    for refuses in (run_suite, outlook):
        with pytest.raises(ConfigError, match=r"holds other things \(thesis.tex\)"):
            refuses(replace(suite, output=foreign))


def test_pictures_that_changed_are_asked_about_again_and_copies_are_not(suite, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    shutil.copytree(suite.benchmarks / "winoground", folder / "winoground")
    suite = replace(suite, benchmarks=folder)
    pictures = sorted(folder.rglob("*.png"))
    whole = pictures[0].read_bytes()
    pictures[0].write_bytes(b"no picture")
    left_out = run_suite(suite)["benchmarks"]["winoground"]
    assert (left_out["items"], left_out["left_out"]["items"]) == (ITEMS - 1, 1)
    asked, ask = [], asking.ask
    monkeypatch.setattr(asking, "ask", lambda *given: asked.append(given) or ask(*given))
    run_suite(suite)
    assert not asked  # it still cannot be read
    pictures[0].write_bytes(whole)
    planned = outlook(suite)["benchmarks"]["winoground"]
    assert planned["to_ask"] == ITEMS
    said = []
    mended = run_suite(suite, say=said.append)
    assert mended["benchmarks"]["winoground"]["items"] == ITEMS
    assert len(asked) == 1
    assert (
        said[0]
        == f"winoground: pictures or items have changed since they were asked about; {ITEMS} items are asked now"
    )
    answers = results(suite.output)

    for path in pictures:  # other times, the same pictures
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert run_suite(suite)["benchmarks"] == mended["benchmarks"]
    assert len(asked) == 1
    moved = results(suite.output)
    assert moved != answers  # their times are kept, so that they are not read each time
    pictures[0].write_bytes(pictures[-1].read_bytes())
    run_suite(suite)
    assert len(asked) == 2
    answered = [
        [json.loads(line)["results"] for line in lines["winoground"]] for lines in (moved, results(suite.output))
    ]
    assert answered[0] != answered[1]


def test_items_that_could_not_be_asked_are_asked_alone_once_their_pictures_are_there(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "BLOCK", 1)
    folder = tmp_path / "mine"
    shutil.copytree(suite.benchmarks / "winoground", folder / "winoground")
    suite = replace(suite, benchmarks=folder)
    whole = run_suite(replace(suite, output=tmp_path / "whole"))["benchmarks"]["winoground"]
    lost = min(folder.rglob("*.png"))
    picture = lost.read_bytes()
    lost.unlink()
    assert run_suite(suite)["benchmarks"]["winoground"]["items"] == ITEMS - 1
    lost.write_bytes(picture)
    assert outlook(suite)["benchmarks"]["winoground"]["to_ask"] == 1
    asked, ask = [], asking.ask
    monkeypatch.setattr(asking, "ask", lambda *given: asked.append(given) or ask(*given))
    assert run_suite(suite)["benchmarks"]["winoground"]["measures"] == whole["measures"]
    assert len(asked) == 1
    lost.unlink()
    assert run_suite(suite)["benchmarks"]["winoground"]["items"] == ITEMS - 1
    assert len(asked) == 1

    begun = replace(suite, output=tmp_path / "begun")
    monkeypatch.setattr(running, "_summarise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # stopped before its blocks were joined
        run_suite(begun)
    monkeypatch.undo()
    monkeypatch.setattr(running, "BLOCK", 1)
    monkeypatch.setattr(asking, "ask", lambda *given: asked.append(given) or ask(*given))
    lost.write_bytes(picture)
    assert outlook(begun)["benchmarks"]["winoground"]["to_ask"] == 1
    assert len(asked) == 2
    assert run_suite(begun)["benchmarks"]["winoground"]["measures"] == whole["measures"]
    assert len(asked) == 3
    examples = folder / "winoground" / "examples.jsonl"
    examples.write_text(examples.read_text().replace('"caption_0": "', '"caption_0": "No '))
    lost.write_bytes(picture)
    with pytest.raises(ConfigError, match="answers to other questions"):
        run_suite(suite)


def test_results_follow_a_benchmark_that_is_called_otherwise_and_others_are_told(suite, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    shutil.copytree(suite.benchmarks / "winoground", folder / "winoground")
    suite = replace(suite, benchmarks=folder)
    run_suite(suite)
    (suite.output / "winoground").rename(suite.output / "winoground-x")
    monkeypatch.setattr(asking, "ask", None)
    assert outlook(suite)["benchmarks"]["winoground"]["to_ask"] == 0
    assert run_suite(suite)["notes"] == []
    shutil.copytree(suite.output / "winoground", suite.output / "gone")
    summary = run_suite(suite)
    assert "gone holds results of a benchmark that is not there now" in summary["notes"][0]
    assert f"note: {summary['notes'][0]}" in render_suite(summary)


def test_results_of_benchmarks_whose_names_change_places_stay_theirs(suite, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    shutil.copytree(suite.benchmarks / "winoground", folder / "m1" / "winoground")
    suite = replace(suite, benchmarks=folder)
    run_suite(suite)
    first = results(suite.output)["winoground"]
    other = folder / "a0" / "winoground"  # is looked at before, and is called as the first one was
    shutil.copytree(folder / "m1" / "winoground", other)
    path = next(other.glob("*.jsonl"))
    path.write_text(re.sub(r'("caption_0": "[^"]*)', r"\1 indeed", path.read_text()))
    assert "indeed" in path.read_text()
    run_suite(suite)
    kept = results(suite.output)
    assert len(kept) == 2
    assert first in kept.values()
    monkeypatch.setattr(asking, "ask", None)  # nothing is asked from here on
    for name, new in (("a0", "z9"), ("m1", "b1")):
        (folder / name).rename(folder / new)
        run_suite(suite)
        assert sorted(map(str, results(suite.output).values())) == sorted(map(str, kept.values()))
    shutil.rmtree(folder / "b1")
    assert run_suite(suite)["notes"]
    assert first in results(suite.output).values()  # under another name


def test_results_of_another_shape_are_damaged(suite):
    suite = replace(suite, only=("winoground",))
    run_suite(suite)
    path = suite.output / "winoground" / RESULTS
    head, line, *others = map(json.loads, path.read_text().splitlines())
    short, null = line["results"][:-1], [None] * len(line["results"])
    for lines in (
        [{"of": head["of"]}, line],
        [{**head, "seconds": None}, line],
        *([head, {"item": line["item"], "results": wrong}] for wrong in (short, null, None, "")),
        [head, {"item": line["item"]}],
        [head, "text"],
    ):
        path.write_text("".join(json.dumps(each) + "\n" for each in (*lines, *others)))
        with pytest.raises(ConfigError, match=r"damaged.* delete it: its items are then asked again"):
            run_suite(suite)


def test_items_without_a_right_answer_and_many_subsets_are_said(suite, tmp_path):
    folder = tmp_path / os.fsdecode(b"many\xff")
    folder.mkdir()
    (folder / os.fsdecode(b"\xfe.json")).write_text("[]")
    row = {"question": "Which?", "options": ["red", "blue"]}
    rows = [{"id": place, **row, "category": f"cat {place}", "answer": "AB"[place % 2]} for place in range(20)]
    rows += [{"id": "long", **row, "question": "Which? " * 5000, "answer": "A"}]
    (folder / "q.json").write_text(json.dumps([*rows, {"id": "\ud800", **row, "answer": None}]))
    summary = run_suite(replace(suite, benchmarks=folder))
    entry = summary["benchmarks"]["q"]
    assert (entry["items"], entry["scored"], entry["measures"][0]["units"]) == (21, 20, 20)
    assert entry["left_out"]["reasons"][0].endswith("tokens can hold; this model takes no longer ones")
    assert "1 of 21 items has no right answer in the files: not scored" in entry["notes"]
    shown = render_suite(summary)
    assert "  accuracy, by kind:\n    cat " in shown
    assert "    cat 15 " in shown
    assert "cat 16" not in shown
    assert "and 4 more kinds" in shown
    names = {measure["name"]: measure for measure in entry["measures"]}
    note = next((note for note in entry["notes"] if "could not be used" in note), "")
    assert (names["unparsed"]["value"] >= 0.5) == ("--prompts plain" in note)
    told = [one["heading"] for one in entry["measures"][1:] if "/" not in one["name"] and one["value"] is not None]
    assert all(f"  {heading} " in shown for heading in told[:MOST_OTHERS])  # also where two are equal


def test_what_is_missing_is_said(suite, tmp_path):
    folder = tmp_path / "holes"
    shutil.copytree(suite.benchmarks, folder)
    lost = json.loads((folder / "sugarcrepe" / "swap_obj.json").read_text())["0"]["filename"]
    damaged = json.loads((folder / "sugarcrepe" / "add_att.json").read_text())["1"]["filename"]
    (folder / "sugarcrepe" / "val2017" / lost).unlink()
    (folder / "sugarcrepe" / "val2017" / damaged).write_bytes(b"no picture")
    summary = run_suite(replace(suite, benchmarks=folder))
    entry = summary["benchmarks"]["sugarcrepe"]
    assert entry["items"] + entry["left_out"]["items"] == entry["of"] == 7 * ITEMS
    assert entry["left_out"]["items"] >= 2
    reasons = " ".join(entry["left_out"]["reasons"])
    assert lost in reasons
    assert damaged in reasons
    assert summary["unread"].keys() == {"prices.json"}
    shown = render_suite(summary)
    assert f"sugarcrepe: {entry['left_out']['items']} of {7 * ITEMS} items are not scored" in shown
    assert "not read: prices.json: no known layout; it has currency, price" in shown
    assert read_json(suite.output / "summary.json") == summary

    for picture in folder.rglob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match=r"no item of 2 benchmarks could be asked: .*no picture"):
        run_suite(replace(suite, benchmarks=folder, output=tmp_path / "none"))
    shutil.rmtree(folder / "sugarcrepe")
    shutil.rmtree(folder / "winoground")
    with pytest.raises(DataError, match=r"no benchmark of a known layout(.|\n)*prices.json: .*currency, price"):
        run_suite(replace(suite, benchmarks=folder, output=tmp_path / "none"))
    for only in ("WINOGROUND", "SugarCrepe"):
        tasks = find_tasks(replace(suite, only=(only,), output=tmp_path))[1]
        assert [task.benchmark.title.casefold() for task in tasks] == [only.casefold()]
    with pytest.raises(ConfigError, match=r"no benchmark 'winogrande'.* there are .*winoground"):
        run_suite(replace(suite, only=("winogrande",), output=tmp_path / "none"))


def test_a_submission_is_of_all_questions_or_is_not_written(suite, tmp_path):
    folder = tmp_path / "pope"
    drawn._pope(folder, 2)
    whole = replace(suite, benchmarks=folder)
    run_suite(whole)
    written = suite.output / "pope" / "submission" / "answers_random.json"
    assert len(written.read_text().splitlines()) == len((folder / "coco_pope_random.json").read_text().splitlines())
    next(folder.rglob("*.png")).unlink()
    holes = replace(whole, output=tmp_path / "holes")
    assert run_suite(holes)["benchmarks"]["pope"]["left_out"]["items"]
    assert not list(holes.output.rglob("answers_*.json"))


def test_items_of_one_id_are_refused(suite, monkeypatch):
    """No layout gives any; one that did would lose answers in silence."""
    found = find_tasks(suite)[0]
    benchmark = found.benchmarks["winoground"]
    twice = replace(benchmark, items=[*benchmark.items, benchmark.items[0]])
    monkeypatch.setattr(running, "find_benchmarks", lambda *_, **__: replace(found, benchmarks={"winoground": twice}))
    with pytest.raises(
        DataError, match=r"examples.jsonl: items of winoground have an id .* 1 such ids .* Take one away"
    ):
        run_suite(suite)


def test_results_are_no_benchmarks_the_next_time(suite, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(suite.benchmarks, folder)
    inside = replace(suite, benchmarks=folder, output=folder / "scores", only=("winoground",))
    assert run_suite(inside)["unread"] == run_suite(inside)["unread"]
    assert find_tasks(inside)[0].unread.keys() == {"prices.json"}


def test_a_limit_takes_all_kinds_alike_and_whole_groups():
    generator = np.random.default_rng(0)
    for _ in range(50):
        kinds = generator.integers(0, 4, 60)
        groups = generator.integers(0, 12, 60)
        items = [
            Item(item_id=str(place), kind=f"k{kind}", group=f"{kind}-{group}" if kind else "")
            for place, (kind, group) in enumerate(zip(kinds, groups, strict=True))
        ]
        limit = int(generator.integers(20, 61))
        taken = take(items, limit)
        assert len(taken) <= limit
        assert [item.item_id for item in taken] == sorted((item.item_id for item in taken), key=int)
        ids = {item.item_id for item in taken}
        for item in items:
            if item.group:
                mates = {other.item_id for other in items if other.group == item.group}
                assert mates <= ids or not mates & ids
        largest = max(sum(item.group == other.group for other in items) for item in items if item.group)
        assert len(taken) == len(items) or len(taken) > limit - largest
    alone = [Item(item_id=str(place), kind="ab"[place >= 90]) for place in range(100)]
    assert [item.kind for item in take(alone, 10)].count("b") == 5
    assert take(alone, 100) == take(alone, None) == alone
    together = [Item(item_id=str(place), group=str(place // 6)) for place in range(12)]
    assert [len(take(together, limit)) for limit in (1, 5, 6, 11)] == [1, 5, 6, 6]


def test_the_command_answers_with_the_summary_and_a_dry_run_writes_nothing(suite):
    main = group_of("stage2_student")
    words = ["suite", str(suite.model.folder), str(suite.benchmarks), "--output", str(suite.output), "--json"]
    planned = CliRunner().invoke(main, [*words, "--dry-run", "--limit", "4"])
    assert planned.exit_code == 0, planned.output
    assert not suite.output.exists()
    document = json.loads(planned.stdout)
    assert {name: entry["to_ask"] for name, entry in document["benchmarks"].items()} == {
        "winoground": 2,
        "sugarcrepe": 4,
    }
    done = CliRunner().invoke(main, [*words, "--only", "winoground"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document.items() >= read_json(suite.output / "summary.json").items()
    assert document["benchmarks"].keys() == {"winoground"}
    assert Path(document["page"]).is_file()
    lines = [json.loads(line) for line in (suite.output / "winoground" / "answers.jsonl").read_text().splitlines()]
    assert all(line["model_id"] == suite.model.name for line in lines)
