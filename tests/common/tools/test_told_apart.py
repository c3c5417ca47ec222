"""What is no cache is called what it is, failed samples have names and reasons, and poor figures a remedy."""

import json
from pathlib import Path

import pytest
from cache_factory import FAILED, build_cache, make_plan, sample_id
from click.testing import CliRunner

from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec
from vlm_distill_cache.common.tools.fidelity_words import poor_fidelity


def run(*words, code=0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({}))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), "it is empty"),
        (("run.json", "table.txt", "sft/config.yaml"), "the folder of a `distill run`"),
        (("config.yaml", "log.jsonl"), "the folder of a `distill train`"),
        (("distillation.json", "config.json", "model.safetensors"), "a trained student"),
        (("config.json", "model.safetensors"), "it looks like a model"),
        (("train.json", "images/a.jpg"), "it looks like a data set"),
        (("a.jpg",), "it looks like a data set"),
        (("mine/plan.json",), "mine in it is one: give that"),
        (("letter.txt", "x"), "it holds letter.txt, x"),
    ],
)
@pytest.mark.slow(quick=2)
def test_a_folder_that_is_no_cache_is_called_what_it_looks_like(tmp_path, names, told):
    folder, whole = fill(tmp_path / "folder", *names), tmp_path / "whole"
    build_cache(whole, make_plan())
    for words in (
        ("verify", folder),
        ("inspect", folder),
        ("repair", folder),
        ("push", folder, tmp_path / "there"),
        ("pull", folder, tmp_path / "here"),
        ("merge", whole, folder, "--output", tmp_path / "merged"),
        ("convert", folder, tmp_path / "other", "--store", "zarr"),
    ):
        output = run(*words, code=1)
        assert told in output, (words, output)
        assert "damaged" not in output


def test_a_part_of_a_cache_and_one_that_is_not_sealed_are_no_strangers(tmp_path):
    cache = tmp_path / "cache"
    build_cache(cache, make_plan())
    (cache / "manifest.json").unlink()
    assert "not finished: it is not sealed; what is there is sound" in run("verify", cache, code=1)
    assert "the cache is not sealed" in run("push", cache, tmp_path / "there", code=1)
    (cache / "plan.json").unlink()
    assert "a part of a cache, whose plan.json is lost" in run("verify", cache, code=1)


def test_failed_samples_are_named_with_their_reasons(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    build_cache(cache, make_plan())
    shown = run("inspect", cache)
    assert f"ids: {sample_id(FAILED)}; all: cachectl inspect" in shown
    (line,) = run("inspect", cache, "--failed").splitlines()
    assert line == f"{sample_id(FAILED)}: image is truncated"
    run("inspect", cache, sample_id(0), "--failed", code=2)
    monkeypatch.setattr("cache_factory.FAILED", None)
    build_cache(tmp_path / "whole", make_plan())
    assert run("inspect", tmp_path / "whole", "--failed") == "no sample failed\n"


def test_poor_figures_are_said_with_a_preset_that_keeps_more(tmp_path):
    for name, preset in LOGIT_PRESETS.items():
        plan = make_plan(signals={**make_plan().signals, "logits": LogitCodec(**preset).to_dict()})
        for capped in (0.0, 0.9):
            good = {"kept_mass": 0.9, "logits_gradient_error": 0.05, "rows_at_cap": capped}
            assert poor_fidelity(plan, good) == []
            found = poor_fidelity(plan, {**good, "kept_mass": 0.899, "logits_gradient_error": 0.051})
            assert len(found) == 2
            for proposed in {
                word.split("=")[1].strip("),") for text in found for word in text.split() if "logits=" in word
            }:
                more = LOGIT_PRESETS[proposed]
                assert more["max_k"] > preset["max_k"] or (not capped and more["floor"] < preset["floor"]), (
                    name,
                    proposed,
                )
            assert name in ("full", "exact") or all("--set logits=" in text for text in found)
    noisy = {"logits_gradient_error": 0.3, "control_logits_gradient_error": 0.2}
    assert "dtype=float32" in poor_fidelity(make_plan(), noisy)[0]
    assert poor_fidelity(make_plan(), None) == []


def test_inspect_says_that_figures_are_poor(tmp_path):
    build_cache(tmp_path / "cache", make_plan(), fidelity={"samples": 4, "kept_mass": 0.5})
    shown = run("inspect", tmp_path / "cache")
    assert "poor fidelity: the kept tokens hold 0.500 of the teacher's mass" in shown
    assert "add --set logits=default to `teacher-cache extend CACHE`" in shown
