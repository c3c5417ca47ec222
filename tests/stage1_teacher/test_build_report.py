"""What a build ends with says how many pictures there were, and why samples failed."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_unknown_words import KNOWN, write_data

from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.report import next_command, summary_text


def test_pictures_are_counted_in_summary_card_and_manifest(tmp_path: Path, build_cache):
    data = write_data(tmp_path, [KNOWN] * 9, pictures=lambda index: index % 3)
    summary = build_cache(tmp_path / "cache", data=data)
    assert summary.manifest is not None
    assert summary.manifest.totals["pictures"] == 6
    assert "  6 of 9 samples with a picture" in summary_text(summary).splitlines()
    assert "no sample has a picture" not in summary_text(summary)
    assert "- Pictures: 6 of 9 samples with a picture" in (tmp_path / "cache" / "README.md").read_text()
    report = CliRunner().invoke(main, ["report", str(tmp_path / "cache")])
    assert "6 of 9 samples with a picture" in report.output


def test_attention_of_data_without_a_picture_is_warned_of_and_text_alone_is_welcome(tmp_path: Path, build_cache):
    data = write_data(tmp_path, [KNOWN] * 3, pictures=lambda index: False)
    summary = build_cache(tmp_path / "cache", data=data)
    said = summary_text(summary)
    assert "0 of 3 samples with a picture" in said
    assert "warning: no sample has a picture, so there is nothing in answer_attention" in said
    off = "SET='dpt.losses.answer_attention=0 dft.losses.answer_attention=0'"
    assert off in next_command(summary, BuildConfig(cache=str(tmp_path / "cache"), data=data))
    logits = build_cache(tmp_path / "logits", data=data, signals=("logits", "hidden"))
    assert "no sample has a picture" not in summary_text(logits)


def test_failures_are_said_by_reason(tmp_path: Path, build_cache):
    data = write_data(tmp_path, [KNOWN] * 8)
    for index in (1, 4, 6):
        (tmp_path / f"{index}.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    summary = build_cache(tmp_path / "cache", data=data, max_failed_share=0.5)
    failed = [line for line in summary_text(summary).splitlines() if line.startswith("  failed: ")]
    assert len(failed) == 2
    assert failed[0].startswith("  failed: 3 x, e.g. s1: image 1.png cannot be read: No such file")
    assert failed[1].startswith("  failed: s2: image 2.png")
    assert "| 3 | `image 1.png cannot be read: No such file" in (tmp_path / "cache" / "README.md").read_text()
    assert "failed: 3 x" in CliRunner().invoke(main, ["report", str(tmp_path / "cache")]).output


def test_a_payload_in_place_of_a_path_never_becomes_the_reason(tmp_path: Path, build_cache):
    data = Path(write_data(tmp_path, [KNOWN] * 8))
    entries = json.loads(data.read_text())
    entries[3]["image"] = "img/" + "payload" * 500
    data.write_text(json.dumps(entries))
    build_cache(tmp_path / "cache", data=str(data), max_failed_share=0.5)
    [reason] = open_cache(tmp_path / "cache").failed.values()
    assert len(reason) <= 300
    assert reason.removeprefix("sample 's3': ").startswith("image img/payload")
    assert reason.endswith("or from images (IMAGES=FOLDER, --images FOLDER)")


@pytest.mark.parametrize("share", ["1", "0.5"])
def test_a_build_of_nothing_but_failures_ends_in_the_reasons_every_time_and_loses_nothing(
    tmp_path: Path, tiny_llava: Path, share: str
):
    data = write_data(tmp_path, [KNOWN] * 6)
    for index in range(6):
        (tmp_path / f"{index}.png").unlink()
    cache = tmp_path / "cache"
    command = ["build", "--data", data, "--teacher", str(tiny_llava), "--cache", str(cache), "--set", "shard_size=4",
               "--set", f"max_failed_share={share}"]  # fmt: skip
    for _ in range(2):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert "image 0.png cannot be read: No such file" in result.output
        assert not (cache / "manifest.json").exists()
    if share != "1":
        return
    assert "6 x, e.g. s0: image 0.png" in result.output
    assert "--overwrite" in result.output
    assert [len(read_sidecar(cache, shard).failed) for shard in range(2)] == [4, 2]
    sealed = CliRunner().invoke(main, ["seal", str(cache)])
    assert sealed.exit_code == 1
    assert "none of its 6 samples could be used" in sealed.output
    # The remedy works.
    write_data(tmp_path, [KNOWN] * 6)
    assert CliRunner().invoke(main, [*command, "--overwrite"]).exit_code == 0
    assert len(open_cache(cache)) == 6


def test_skipping_all_samples_is_no_remedy(tmp_path: Path, build_cache):
    data = write_data(tmp_path, [KNOWN] * 6)
    for index in range(6):
        (tmp_path / f"{index}.png").unlink()
    with pytest.raises(DataError, match="6 of 6 samples cannot be used") as caught:
        build_cache(tmp_path / "cache", data=data, shard_size=6)
    assert "max_failed_share=" not in str(caught.value)


def test_the_counts_depend_on_neither_store_nor_interruption(tmp_path: Path, build_cache):
    data = write_data(tmp_path, [KNOWN] * 9, pictures=lambda index: index % 3)
    totals = []
    for store in ("zarr", "webdataset"):
        build_cache(tmp_path / store, data=data, store=store)
        for path in (tmp_path / store / "shards").glob("00001.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / store / "manifest.json").unlink()
        manifest = build_cache(tmp_path / store, data=data, store=store).manifest
        assert manifest is not None
        totals.append({**manifest.totals, "bytes": 0})
    assert totals[0] == totals[1]
    assert totals[0]["pictures"] == 6
