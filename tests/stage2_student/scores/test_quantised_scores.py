"""A student with 8- and 4-bit weights is scored as its exports are, on the same items, beside what it scores itself."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from test_run import FAST
from tiny_cache import DATA

from vlm_distill_cache.stage2_student import run as run_module
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE
from vlm_distill_cache.stage2_student.run import load_run_config
from vlm_distill_cache.stage2_student.trained_student import export_student


@pytest.fixture(scope="module")
def final(tiny_cache, tmp_path_factory):
    """A student whose decoder can be packed in blocks of 64."""
    output = tmp_path_factory.mktemp("run") / "run"
    given = ["student=mobilevlm", f"data={json.dumps(DATA)}", f"output={output}", *FAST, "phases=[sft]"]
    run_module.train_arm(load_run_config(None, given, cache=tiny_cache[0]), processes=1)
    return output / "final"


def evaluate(*arguments):
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    return result, json.loads(result.stdout) if "--json" in arguments and result.exit_code == 0 else {}


@pytest.mark.slow
def test_quantised_scores_are_those_of_the_exports_and_differences_are_paired(final, tmp_path):
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "scores.json"
    result, found = evaluate(final, "--limit", "2", "--quantise", "4bit, 8bit", "--output", file, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text()).items() <= found.items()
    _, plain = evaluate(final, "--limit", "2", "--output", file, "--json")  # such a file is replaced
    assert {name: found[name] for name in plain} == plain
    assert found.keys() - plain.keys() == {"weight_bytes", "quantised"}
    assert json.loads(file.read_text()).keys() == {"scores", "items"}
    assert list(found["quantised"]) == ["8bit", "4bit"]
    sizes = [found["weight_bytes"], *(scored["weight_bytes"] for scored in found["quantised"].values())]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == (final / "model.safetensors").stat().st_size
    for scored in found["quantised"].values():
        assert scored["differences"].keys() >= {"likelihood", "teacher/top1"}
        for name, difference in scored["differences"].items():
            before = plain["items"][name]
            by_kind = [np.mean(np.subtract(after, before[kind])) for kind, after in scored["items"][name].items()]
            assert difference["value"] == pytest.approx(np.mean(by_kind))
    lines = " ".join(result.stderr.split())
    assert "8bit: weights " in lines
    assert lines.count("difference item by item: captions by likelihood, % ") == 2
    export_student(final, tmp_path / "8bit", quantise="8bit")
    assert sizes[1] == (tmp_path / "8bit" / "model.safetensors").stat().st_size
    _, exported = evaluate(tmp_path / "8bit", "--limit", "2", "--json")
    assert {name: exported[name] for name in ("scores", "items")}.items() <= found["quantised"]["8bit"].items()
    again, _ = evaluate(tmp_path / "8bit", "--quantise", "4bit")
    assert "its weights are quantised, and nothing brings the others back" in again.output


def test_what_cannot_be_quantised_is_refused_before_anything_is_scored(final, tmp_path, tiny_cache, monkeypatch):
    for wrong in ("3bit", ""):
        result, _ = evaluate(final, "--quantise", wrong)
        assert result.exit_code == 2
        assert "is not 8bit, 4bit, or both" in result.output
    monkeypatch.setattr("vlm_distill_cache.stage2_student.trained_student.open_scoring", None)
    shutil.copytree(final, tmp_path / "other", ignore=shutil.ignore_patterns(PROVENANCE))
    result, _ = evaluate(tmp_path / "other", "--cache", tiny_cache[0], "--quantise", "8bit")
    assert f"has no {PROVENANCE}: it was not trained here" in " ".join(result.output.split())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result, _ = evaluate(final, "--quantise", "8bit")
    assert "bitsandbytes is not installed; run `pip install" in " ".join(result.output.split())
