"""The command line: one screen, exit codes 0, 1 and 2, and no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_factory import FAILED, build_cache, make_plan, make_record, sample_id, tree
from click.testing import CliRunner

from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cli import main


@pytest.fixture(params=["zarr", "webdataset"])
def cache(request, tmp_path):
    build_cache(tmp_path / "cache", make_plan(request.param), fidelity={"kl": 0.25, "samples": 4})
    return tmp_path / "cache"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_no_torch_is_imported_to_look_into_a_cache(cache):
    script = """
import sys
import vlm_distill_cache.common.cli
assert "torch" not in sys.modules and "transformers" not in sys.modules
for arguments in (["verify", sys.argv[1]], ["inspect", sys.argv[1]], ["inspect", sys.argv[1], sys.argv[2]]):
    vlm_distill_cache.common.cli.main(arguments, standalone_mode=False)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(cache), sample_id(0)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_inspect_shows_a_cache_on_one_screen(cache):
    output = run("inspect", cache)
    for text in (
        "sealed", "tiny", "family llava", "made up, split train", "9 of 10 in 3 shards of 4; 1 failed",
        "logits", "visual_map", "base", "B/sample", "teacher aaaaaaaaaaaa", "data bbbbbbbbbbbb",
        f"{sample_id(FAILED)}: image is truncated", "kl 0.25, samples 4", "make distill STUDENT=mobilevlm",
    ):  # fmt: skip
        assert text in output, text
    lines = output.splitlines()
    assert len(lines) < 30
    assert max(len(line.replace(str(cache), "CACHE")) for line in lines) <= 110
    rows = sum(len(make_record(p)["labels"]) for p in range(10) if p != FAILED)
    logits = sum(
        make_record(p)[name].nbytes
        for p in range(10)
        if p != FAILED
        for name in ("entry_count", "token_ids", "log_gap", "top_logprob", "tail_logmass")
    )
    [line] = [line for line in lines if line.startswith("logits")]
    assert line.split()[1:3] == [f"{logits / rows:,.1f}", f"{logits / 9:,.1f}"]


def test_inspect_tells_what_an_unfinished_cache_needs(cache):
    (cache / "manifest.json").unlink()
    output = run("inspect", cache)
    assert "not sealed, 0 of 3 shards missing" in output
    assert f"teacher-cache seal {cache}" in output
    assert "not measured" in output
    (cache / "shards" / "00001.json").unlink()
    output = run("inspect", cache)
    assert "not sealed, 1 of 3 shards missing" in output
    assert "teacher-cache build with the same options" in output
    assert "1 of 3 shards missing" in output
    assert "failed, of the missing shards nobody knows yet" in output
    assert "not sealed" in run("inspect", cache, sample_id(0), code=1)


def test_inspect_shows_a_record_with_token_numbers(cache):
    record = make_record(4)
    output = run("inspect", cache, sample_id(4))
    assert f"answer: {' '.join(map(str, record['labels']))}" in output
    for name, array in record.items():
        assert any(line.split()[0] == name for line in output.splitlines() if line), name
        assert " x ".join(map(str, array.shape)) in output
    first_row = next(line for line in output.splitlines() if line.startswith("   0  ")).split()
    assert first_row[1] == str(record["labels"][0])
    assert first_row[2] == f"{np.exp(float(record['tail_logmass'][0, 0])):.4f}"
    assert first_row[3:5] == [str(record["token_ids"][0]), f"{np.exp(float(record['top_logprob'][0])):.3f}"]
    assert "no sample 'nobody'" in run("inspect", cache, "nobody", code=1)


def test_inspect_shows_a_record_as_text_with_the_caches_own_tokenizer(cache):
    words = {f"word{i}": i for i in range(99)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"},
    }  # fmt: skip
    path = cache / "processor" / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    seal(cache)
    record = make_record(4)
    output = run("inspect", cache, sample_id(4))
    assert f"answer: {' '.join(f'word{i}' if i < 99 else f'#{i}' for i in record['labels'])}" in output
    path.write_text("{}")
    seal(cache, rewritten=True)
    assert f"answer: {' '.join(map(str, record['labels']))}" in run("inspect", cache, sample_id(4))


def test_verify_exits_with_one_line_per_damaged_file(cache):
    assert "ok: " in run("verify", cache)
    assert "ok: " in run("verify", cache, "--deep")
    (cache / "processor" / "note.json").write_text("?")
    (cache / "extra").write_text("")
    output = run("verify", cache, code=1)
    damaged = [line for line in output.splitlines() if line.startswith("damaged: ")]
    assert [line.split()[1] for line in damaged] == ["processor/note.json:", "extra:"]
    assert "2 damaged files" in output


def test_verify_says_of_an_unfinished_cache_that_it_is_sound_and_what_finishes_it(cache):
    (cache / "manifest.json").unlink()
    output = run("verify", cache, code=1)
    assert f"not finished: it is not sealed; what is there is sound\nNext: teacher-cache seal {cache}" in output
    (cache / "shards" / "00001.json").unlink()
    output = run("verify", cache, code=1)
    assert "1 shards are missing (1); what is there is sound\nNext: teacher-cache build" in output
    assert "repair" not in output
    (cache / "shards" / "00002.json").write_text("{}")
    output = run("verify", cache, code=1)
    assert "damaged: shards/00002.json" in output
    assert f"Next: cachectl repair {cache} --dry-run" in output


@pytest.mark.parametrize("command", ["verify", "repair", "push", "convert", "merge"])
def test_what_works_on_folders_says_how_an_address_comes_here(command):
    output = " ".join(run(command, "s3://bucket/a b", code=2).replace("│", "").split())
    assert "`cachectl pull 's3://bucket/a b' FOLDER`, which checks every file" in output


def test_convert_there_and_back(cache, tmp_path):
    store = {True: "zarr", False: "webdataset"}[(cache / "shards" / "00000.zarr").exists()]
    other = {"zarr": "webdataset", "webdataset": "zarr"}[store]
    output = run("convert", cache, tmp_path / "there", "--store", other)
    assert "Converted 9 samples" in output
    assert f"Next: cachectl verify {tmp_path / 'there'}" in output
    run("convert", tmp_path / "there", tmp_path / "back", "--store", store)
    assert tree(tmp_path / "back") == tree(cache)
    assert "error: " in run("convert", cache, tmp_path / "new", "--store", store, code=1)


def test_wrong_usage_exits_with_two(cache, tmp_path):
    assert "there is no such folder" in run("verify", tmp_path / "nowhere", code=2)
    assert "Missing option '--store'" in run("convert", cache, tmp_path / "x", code=2)
    assert "No such option" in run("inspect", cache, "--nonsense", code=2)
    assert "not a teacher cache" in run("inspect", tmp_path, code=1)


def test_disk_errors_are_told_without_a_traceback(cache, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("vlm_distill_cache.common.tools.derive.write_plan", full)
    other = "webdataset" if (cache / "shards" / "00000.zarr").exists() else "zarr"
    output = run("convert", cache, tmp_path / "new", "--store", other, code=1)
    assert "error: somewhere: No space left on device" in output


@pytest.mark.parametrize("place", ["s3://bucket/cache", "https://example.org/cache"])
@pytest.mark.parametrize("words", ["pull . {}", "merge . . --output {}", "convert . {} --store zarr"])
def test_an_address_never_becomes_a_folder_of_that_name(tmp_path, monkeypatch, place, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words.format(place).split())
    assert (result.exit_code, "cachectl push" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())
