import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, DataError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import recompute_fidelity
from vlm_distill_cache.stage1_teacher.loop import writer as pipeline
from vlm_distill_cache.stage1_teacher.loop.encode_ahead import encode_shards
from vlm_distill_cache.stage1_teacher.loop.signals import image_weights
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

EXACT = {"logits": "exact", "attention_dtype": "f4"}
ALL_SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map")


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def write_llava_json(folder: Path, count: int, *, text_only: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(count):
        entry = {
            "id": f"s{index}",
            "image": f"{index}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat color is the circle ?"},
                {"from": "gpt", "value": "red"},
                {"from": "human", "value": "is there a square ?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        Image.new("RGB", (40 + index, 30), (10 * index, 80, 90)).save(folder / f"{index}.png")
        if index == text_only:
            del entry["image"]
            entry["conversations"][0]["value"] = "what color is the circle ?"
        entries.append(entry)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.parametrize("shards_before_kill", [0, 1, 2])
@pytest.mark.slow
def test_a_killed_and_resumed_build_is_byte_identical(
    tmp_path: Path, build_cache, monkeypatch, shards_before_kill: int, store: str
):
    build_cache(tmp_path / "whole", store=store)
    finish, calls = pipeline.finish_shard, []

    def killed(writer, failed=()):
        if len(calls) == shards_before_kill:
            raise KeyboardInterrupt
        calls.append(writer)
        return finish(writer, failed)

    monkeypatch.setattr(pipeline, "finish_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "resumed", store=store)
    monkeypatch.setattr(pipeline, "finish_shard", finish)
    summary = build_cache(tmp_path / "resumed", store=store)
    assert summary.built == 3 - shards_before_kill
    assert tree(tmp_path / "whole") == tree(tmp_path / "resumed")


def test_a_complete_cache_is_left_alone(tmp_path: Path, build_cache):
    build_cache(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert build_cache(tmp_path / "cache").built == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_another_option_on_resume_is_refused_with_both_values(tmp_path: Path, build_cache):
    build_cache(tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=r"max_k.*64.*255"):
        build_cache(tmp_path / "cache", logits="full")
    assert build_cache(tmp_path / "cache", logits="full", overwrite=True).built == 3


def test_a_folder_that_is_no_cache_is_not_touched(tmp_path: Path, build_cache):
    (tmp_path / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not a teacher cache"):
            build_cache(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_records_equal_the_librarys_own_forward_pass(tmp_path: Path, build_cache, tiny_llava: Path):
    cache_dir = tmp_path / "cache"
    build_cache(cache_dir, signals=ALL_SIGNALS, **EXACT)
    cache = open_cache(cache_dir)
    codecs = {name: codec_from_dict(stored) for name, stored in cache.plan.signals.items()}
    teacher = Teacher(tiny_llava)
    encoder = build_encoder(teacher, template="short", max_length=2048)
    eager = LlavaForConditionalGeneration.from_pretrained(tiny_llava, attn_implementation="eager").eval()
    for sample in list(open_dataset("shapes", limit=10))[:3]:
        batch = collate([encoder(sample)], 0)
        inputs = batch.model_inputs()
        mask = torch.zeros(batch.attention_mask.shape).masked_fill(~batch.attention_mask, -torch.inf)
        with torch.no_grad():
            output = eager(**inputs | {"attention_mask": mask}, output_attentions=True)
        rows = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        visual = batch.visual_mask[0].nonzero()[:, 0]
        record = cache.read(sample.sample_id)
        np.testing.assert_array_equal(record["labels"], batch.labels[0][rows].numpy())

        dense = output.logits[0, rows].log_softmax(-1)
        sparse = as_tensors(codecs["logits"].decode(record))
        assert sparse.entry_mask.all()  # the vocabulary is smaller than the exact preset's cap
        torch.testing.assert_close(sparse.log_probs, dense.gather(1, sparse.token_ids), atol=2e-5, rtol=1e-5)
        layers = cache.plan.teacher["groups"][0]
        mean = torch.stack([output.attentions[layer][0].mean(0) for layer in layers]).mean(0)  # [T, T]
        cells = as_tensors(codecs["answer_attention"].decode(record)).cells[:, 0]  # [A, C]
        torch.testing.assert_close(cells, mean[rows][:, visual], atol=1e-5, rtol=0)
        maps = as_tensors(codecs["visual_map"].decode(record)).values[0]  # [N, N]
        torch.testing.assert_close(maps, mean[visual][:, visual], atol=1e-5, rtol=0)
        columns = as_tensors(codecs["visual_columns"].decode(record))[0]
        torch.testing.assert_close(columns, mean[visual][:, visual].mean(0), atol=1e-5, rtol=0)


def test_both_stores_hold_the_same_values(tmp_path: Path, build_cache):
    for store in ("zarr", "webdataset"):
        build_cache(tmp_path / store, store=store, signals=ALL_SIGNALS)
    first, second = open_cache(tmp_path / "zarr"), open_cache(tmp_path / "webdataset")
    assert list(first.sample_ids) == list(second.sample_ids)
    for sample_id in first.sample_ids:
        left, right = first.read(sample_id), second.read(sample_id)
        assert left.keys() == right.keys()
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name])


def test_unreadable_samples_are_recorded_and_skipped(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 8)
    (tmp_path / "data" / "3.png").write_bytes((tmp_path / "data" / "3.png").read_bytes()[:40])
    (tmp_path / "data" / "5.png").unlink()
    summary = build_cache(tmp_path / "cache", data=str(path), limit=0, max_failed_share=0.25)
    assert summary.failed == 2
    cache = open_cache(tmp_path / "cache")
    assert set(cache.failed) == {"s3", "s5"}
    assert "3.png" in cache.failed["s3"]
    assert len(cache) == 6
    assert "s3" not in cache


def test_too_many_unreadable_samples_stop_the_run(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 8)
    (tmp_path / "data" / "3.png").unlink()
    with pytest.raises(DataError, match=r"(?s)1 of 8 samples cannot be used.*'s3'.*max_failed_share"):
        build_cache(tmp_path / "cache", data=str(path), limit=0)


def test_text_only_samples_have_logits_and_no_attention(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 6, text_only=2)
    build_cache(tmp_path / "cache", data=str(path), limit=0, signals=ALL_SIGNALS)
    cache = open_cache(tmp_path / "cache")
    text, picture = cache.read("s2"), cache.read("s1")
    assert len(text["labels"]) == len(picture["labels"]) == 4  # two answers of one word, each with its end
    assert not text["image_hash"].any()
    assert len(text["tiles"]) == 0
    assert not text["answer_image_mass"].any()
    assert text["visual_columns"].shape[0] == 0
    assert picture["visual_columns"].shape[0] == 36


def test_data_without_a_teacher_names_the_choices(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 2)
    with pytest.raises(ConfigError, match=r"TEACHER=.*llava-hf/llava-1.5-7b-hf.*DATA=shapes or DATA=easy-vqa"):
        build_cache(tmp_path / "cache", data=str(path), teacher="", limit=0)


def test_exact_codecs_lose_nothing_against_the_live_teacher(tmp_path: Path, build_cache):
    fidelity = build_cache(tmp_path / "cache", fidelity_samples=4, **EXACT).manifest.fidelity
    assert fidelity["samples"] == 4
    assert fidelity["kept_mass"] == pytest.approx(1, abs=1e-5)
    assert fidelity["logits_gradient_error"] < 1e-4
    assert fidelity["answer_attention_gradient_cosine"] > 0.9999
    assert fidelity["control_logits_gradient_error"] == 0


def test_the_failure_limit_holds_across_resumed_runs(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 12)
    for index in (0, 4, 8):
        (tmp_path / "data" / f"{index}.png").unlink()
    for _ in range(4):
        with pytest.raises(DataError, match="of 12 samples cannot be used"):
            build_cache(tmp_path / "cache", data=str(path), limit=0, max_failed_share=0.1)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_failures_of_another_processs_shards_count_before_sealing(tmp_path: Path, build_cache, monkeypatch):
    path = write_llava_json(tmp_path / "data", 12)
    for index in (0, 4, 8):
        (tmp_path / "data" / f"{index}.png").unlink()
    options = {"data": str(path), "limit": 0}
    other = []

    def raced(*arguments, **keywords):
        if not other:  # another, more tolerant process takes all shards as soon as ours has begun
            other.append(True)
            build_cache(tmp_path / "cache", max_failed_share=0.5, **options)
            (tmp_path / "cache" / "manifest.json").unlink()
        return encode_shards(*arguments, **keywords)

    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.extract.encode_shards", raced)
    with pytest.raises(DataError, match="3 of 12 samples cannot be used"):
        build_cache(tmp_path / "cache", max_failed_share=0.1, **options)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_reasons_that_quote_invalid_text_are_recorded(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 6)
    entries = json.loads(path.read_text())
    entries[1]["image"] = "\ud83d.png"
    entries[2]["conversations"][1]["value"] = "red \ud83d"
    path.write_text(json.dumps(entries))
    build_cache(tmp_path / "cache", data=str(path), limit=0, max_failed_share=0.5)
    failed = open_cache(tmp_path / "cache").failed
    assert "\\ud83d.png cannot be read" in failed["s1"]
    assert "turn 1 holds a lone surrogate" in failed["s2"]


@pytest.mark.parametrize("part", ["logits", "attention"])
def test_a_sample_with_a_non_finite_output_is_a_recorded_failure(tmp_path: Path, build_cache, monkeypatch, part: str):
    run = Build.run

    def poisoned(self, batch, inputs=None):
        output = {name: found.clone() for name, found in run(self, batch, inputs).items()}
        for index, sample_id in enumerate(batch.sample_ids):
            if sample_id == "s2":
                if part == "logits":
                    output["logits"][(batch.labels[:index] != IGNORE_INDEX).sum()] = float("nan")
                else:
                    output["answer_attention"][index, 0, 0, 0] = float("nan")
        return output

    monkeypatch.setattr(Build, "run", poisoned)
    path = write_llava_json(tmp_path / "data", 6)
    build_cache(tmp_path / "cache", data=str(path), limit=0, max_failed_share=0.2, fidelity_samples=0)
    cache = open_cache(tmp_path / "cache")
    assert set(cache.failed) == {"s2"}
    assert cache.failed["s2"].startswith("teacher: ")
    assert len(cache) == 5


@pytest.mark.slow
def test_a_shard_that_another_process_finished_meanwhile_is_skipped(tmp_path: Path, build_cache, monkeypatch):
    build_cache(tmp_path / "whole")
    finish, other = pipeline.finish_shard, []

    def raced(writer, failed=()):
        sidecar = finish(writer, failed)
        if not other:  # after our first shard a second process builds the whole cache
            other.append(True)
            build_cache(tmp_path / "raced")
        return sidecar

    monkeypatch.setattr(pipeline, "finish_shard", raced)
    build_cache(tmp_path / "raced")
    assert tree(tmp_path / "raced") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", ["projector.safetensors", "processor/tokenizer.json", "vision_tower.json"])
@pytest.mark.slow
def test_a_lost_or_damaged_file_beside_the_shards_is_written_again(tmp_path: Path, build_cache, name: str):
    build_cache(tmp_path / "cache")
    before = tree(tmp_path / "cache")
    (tmp_path / "cache" / name).unlink()
    build_cache(tmp_path / "cache")
    assert tree(tmp_path / "cache") == before
    (tmp_path / "cache" / name).write_bytes(b"damaged")
    build_cache(tmp_path / "cache")
    assert tree(tmp_path / "cache") == before


def test_another_folder_name_of_the_same_teacher_is_the_same_teacher(tmp_path: Path, build_cache, tiny_llava):
    build_cache(tmp_path / "cache")
    shutil.copytree(tiny_llava, tmp_path / "renamed")
    assert build_cache(tmp_path / "cache", teacher=str(tmp_path / "renamed")).built == 0


def test_another_file_name_of_the_same_data_is_the_same_data(tmp_path: Path, build_cache, tiny_llava: Path):
    path = write_llava_json(tmp_path / "data", 4)
    build_cache(tmp_path / "cache", data=str(path), limit=3)
    before = tree(tmp_path / "cache")
    renamed = path.rename(path.with_name("renamed.json"))
    assert build_cache(tmp_path / "cache", data=str(renamed), limit=3).built == 0
    options = {"teacher": str(tiny_llava), "template": "short", "shard_size": 4, "batch_size": 3}
    config = BuildConfig(cache=str(tmp_path / "cache"), data=str(renamed), limit=3, **options)
    recompute_fidelity(config, samples=2)
    assert tree(tmp_path / "cache") == before  # the card keeps the name that the plan has


def test_a_complete_cache_is_never_written_to(tmp_path: Path, build_cache, monkeypatch):
    build_cache(tmp_path / "cache")

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    def refuse_writing(path, flags, *arguments, really=os.open, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse()
        return really(path, flags, *arguments, **options)

    monkeypatch.setattr("vlm_distill_cache.common.files.atomic.os.open", refuse_writing)
    monkeypatch.setattr("vlm_distill_cache.common.files.atomic.os.replace", refuse)
    assert build_cache(tmp_path / "cache").built == 0


def test_visual_columns_average_over_rows_that_carry_image():
    tiles = (Tile(4, 4, (0.0, -0.5, 1.0, 1.5)),)  # the middle two rows of tokens see the picture
    keys = torch.full((3, 20), -1)
    keys[0, :16], keys[2] = torch.arange(16), torch.arange(20)
    batch = SimpleNamespace(tiles=[tiles, (), (Tile(4, 5, (0.0, 0.0, 1.0, 1.0)),)])
    expected = torch.zeros(3, 20)
    expected[0, 4:12], expected[2] = 1 / 8, 1 / 20
    torch.testing.assert_close(image_weights(batch, keys)[:, 0], expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["projector.safetensors", "processor/preprocessor_config.json"])
def test_damage_beside_the_shards_is_noticed_and_never_sealed_in(tmp_path: Path, build_cache, name: str):
    build_cache(tmp_path / "cache")
    path = tmp_path / "cache" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for use in (lambda folder: open_cache(folder).check_side_files(), seal):
        with pytest.raises(CacheFormatError, match="damaged: expected"):
            use(tmp_path / "cache")


def test_measuring_the_fidelity_again_keeps_the_caches_identity(tmp_path: Path, build_cache, tiny_llava: Path):
    before = build_cache(tmp_path / "cache").manifest
    options = {"teacher": str(tiny_llava), "template": "short", "limit": 10, "shard_size": 4, "batch_size": 3}
    after = recompute_fidelity(BuildConfig(cache=str(tmp_path / "cache"), **options), samples=5)
    assert after.fidelity["samples"] == 5 != before.fidelity["samples"]
    assert after.hash == before.hash
