"""Each layout from its published files to its scores, submission and page, by a model that says nothing sensible."""

import json
import math
import shutil

import pytest
from every_layout import write_every_layout

from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.hub import HubFolder
from vlm_distill_cache.data.benchmarks.search import LAYOUTS
from vlm_distill_cache.stage2_student.suite import ask as asking
from vlm_distill_cache.stage2_student.suite.measures import Measure, score
from vlm_distill_cache.stage2_student.suite.opened import find_model
from vlm_distill_cache.stage2_student.suite.page import SuiteOutput, compare_suites, write_suite_page
from vlm_distill_cache.stage2_student.suite.run import Suite, run_suite
from vlm_distill_cache.stage2_student.suite.table import render_suite

OTHER_FORMS = {"options", "scienceqa-llava"}  # tables of any questions; the same questions as LLaVA writes them
SECRET = {"llava-mine", "vizwiz-test"}


@pytest.mark.slow
def test_every_layout_is_asked_counted_and_written_for_scorers(tiny_llava, tmp_path, monkeypatch):
    generate = asking.generate_answers  # of a random model no answer ends by itself: two words are enough
    monkeypatch.setattr(
        asking, "generate_answers", lambda *given, **more: generate(*given, **{**more, "max_new_tokens": 2})
    )
    folder, output = tmp_path / "benchmarks", tmp_path / "out"
    write_every_layout(folder)
    model = find_model(HubFolder(tiny_llava, "tiny", ""), None)
    summary = run_suite(Suite(model=model, benchmarks=folder, output=output))
    found = summary["benchmarks"]
    assert {layout.name for layout in LAYOUTS} == {entry["layout"] for entry in found.values()} | OTHER_FORMS
    assert all(
        "no known layout" not in why or file.startswith("mme/eval_tool") for file, why in summary["unread"].items()
    )
    for name, entry in found.items():
        assert entry["items"], name
        assert bool(entry["measures"]) == (name not in SECRET), name
        names = [measure["name"] for measure in entry["measures"]]
        assert len(set(names)) == len(names)
        assert name in SECRET or entry["measures"][0]["value"] is not None, name
        for measure in entry["measures"]:
            values = [measure[key] for key in ("value", "low", "high")]
            assert values == [None] * 3 or all(map(math.isfinite, values)), (name, measure)
        lines = (output / name / "answers.jsonl").read_text().splitlines()
        assert all(json.loads(line)["model_id"] == summary["student"]["name"] for line in lines)
    written = {path.parent.parent.name for path in output.glob("*/submission/*")}
    assert {"vqav2-val2014", "vizwiz-test", "mme", "pope"} <= written

    stored = read_json(output / "mme" / "measures.json")["measures"]
    fields = ("name", "units", "hits", "of", "parts", "summed", "factor", "gains", "heading")
    measures = {one["name"]: Measure(**{field: one[field] for field in fields}) for one in stored}
    for entry in found["mme"]["measures"]:
        counted = score(measures[entry["name"]], measures)
        assert (None if counted is None else counted.value) == entry["value"]

    shown = render_suite(summary)
    assert all(name in shown for name in found)
    assert "no score: its files hold no answers" in shown
    page = write_suite_page(output).read_text()
    assert all(name in page for name in found)
    shutil.copytree(output, tmp_path / "again")
    again = {name: SuiteOutput(tmp_path / name) for name in ("out", "again")}
    compared = compare_suites(again)
    assert compared.keys() == found.keys() - SECRET
    for name, of in compared.items():
        assert len(again["out"].asked(name)) == found[name]["items"]
        assert of["again"].note == ""
        assert {gain.value for gain in of["again"].gains.values() if gain} == {0.0}
