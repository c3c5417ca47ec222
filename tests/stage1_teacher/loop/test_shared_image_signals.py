"""A cache with many conversations an image holds each image's maps once, and trains exactly as if it did not."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_distill_cache.stage1_teacher.loop.writer as pipeline
import vlm_distill_cache.stage1_teacher.planning.plan
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.batches.batch import arrays_of
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.losses.terms import choose_terms

SIGNALS = ("logits", "visual_columns", "visual_map")
COLORS = ("red", "green", "blue", "black")


def write_data(folder: Path, images: int, conversations: int, *, seed: int = 0, prefix: str = "p") -> Path:
    """A LLaVA file whose conversations about one image are scattered over it, of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for image in range(images):
        Image.new("RGB", (40 + image, 30), (60 * image, 80, 90)).save(folder / f"{prefix}{image}.png")
        for number in range(conversations):
            words = "is it big and " * (number % 3)
            entries.append(
                {
                    "id": f"s{image}-{number}",
                    "image": f"{prefix}{image}.png",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{words}what color is it ?"},
                        {"from": "gpt", "value": COLORS[number % 4]},
                    ],
                }
            )
    random.Random(seed).shuffle(entries)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def build(build_cache):
    def run(target: Path, data: Path, **options):
        settings = {"signals": SIGNALS, "logits": "exact", "attention_dtype": "f4", "shard_size": 100,
                    "batch_size": 4, "limit": 0, "fidelity_samples": 0} | options  # fmt: skip
        build_cache(target, data=str(data), **settings)
        return open_cache(target)

    return run


def without_sharing(cache, target: Path):
    """The same numbers in a cache in which every record holds its arrays itself."""
    fields = {
        name: tuple(field for field in group if field != VISUAL_SOURCE) for name, group in cache.plan.fields.items()
    }
    plan = replace(cache.plan, fields=fields)
    write_plan(target, plan)
    for index in range(plan.shard_count):
        writer = open_writer(plan.store, target, index, plan.all_fields)
        for sample_id in cache.shard_sample_ids(index):
            record = cache.read(sample_id)
            writer.append(sample_id, {field.name: record[field.name] for field in plan.all_fields})
        finish_shard(writer)
    seal(target)
    return open_cache(target)


def image_bytes(cache) -> dict[str, int]:
    """Bytes of the fields that depend on the image alone, over all shards."""
    sidecars = [read_sidecar(cache.path, index) for index in range(cache.plan.shard_count)]
    return {name: sum(s.field_bytes[name] for s in sidecars) for name in ("visual_columns", "visual_map")}


def test_eight_conversations_an_image_cost_its_maps_once(tmp_path, build):
    many = build(tmp_path / "many", write_data(tmp_path / "8", 3, 8))
    one = build(tmp_path / "one", write_data(tmp_path / "1", 3, 1))
    assert len(many) == 24
    assert image_bytes(many) == image_bytes(one)
    assert image_bytes(one)["visual_map"] == 3 * 4 * (36 * 37 // 2)
    whole = without_sharing(many, tmp_path / "whole")
    assert image_bytes(whole)["visual_map"] == 8 * image_bytes(many)["visual_map"]
    stored = [
        sum(entry.size for name, entry in read_sidecar(path, 0).files.items() if "/visual_map/" in name)
        for path in (many.path, one.path)
    ]
    # Batches of other shapes may round a code the other way, which compresses to a few bytes more or less.
    assert stored[0] == pytest.approx(stored[1], rel=0.01)
    assert verify(many.path, deep=True) == []


@pytest.mark.parametrize("preset", ["exact", "blocks", "compact"])
@pytest.mark.parametrize("map_grid", [0, 3])
@pytest.mark.slow(quick=1)
def test_every_way_to_keep_a_map_is_shared_and_found_sound(tmp_path, build, preset, map_grid):
    options = {"attention_dtype": "u1", "map_preset": preset, "map_grid": map_grid}
    cache = build(tmp_path / "cache", write_data(tmp_path / "data", 2, 3), **options)
    codec = codec_from_dict(cache.plan.signals["visual_map"])
    names = [field.name for field in codec.fields()]
    held = [name for name in cache.sample_ids if len(cache.read_stored(name)[names[0]])]
    assert len(held) == 2
    for name in cache.sample_ids:
        holder = next(other for other in held if other.split("-")[0] == name.split("-")[0])
        ours, theirs = (
            as_tensors(codec.decode(cache.read(sample_id, [*names, "tiles"]))) for sample_id in (name, holder)
        )
        assert torch.equal(ours.values, theirs.values)
        assert bool(ours.values.any())
    assert verify(cache.path, deep=True) == []


def test_a_follower_costs_a_tar_little_more_than_its_header(tmp_path, build):
    options = {"store": "webdataset", "signals": ("visual_columns", "visual_map")}
    many = build(tmp_path / "many", write_data(tmp_path / "8", 3, 8), **options)
    one = build(tmp_path / "one", write_data(tmp_path / "1", 3, 1), **options)
    whole = without_sharing(many, tmp_path / "whole")
    least, shared, most = (read_sidecar(cache.path, 0).stored_bytes for cache in (one, many, whole))
    followers = 24 - 3
    assert (shared - least) / followers <= 512 + 512  # a header, and one block of labels, hash and place
    assert (most - least) / followers > 3 * (shared - least) / followers


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_student_is_given_exactly_the_same_signals(tmp_path, build, tiny_llava, store):
    data = write_data(tmp_path / "data", 2, 4)
    shared = build(tmp_path / "shared", data, shard_size=3, store=store)
    whole = without_sharing(shared, tmp_path / "whole")
    encoder = build_encoder(Teacher(tiny_llava), template="short", max_length=2048).with_grid((3, 3))
    batches = []
    for cache in (shared, whole):
        joined = CachedDataset(open_dataset(str(data)), encoder, cache, terms=choose_terms(SIGNALS), pad_token_id=0)
        batches.append(joined.batch(range(8)))
    left, right = (list(arrays_of(batch)) for batch in batches)
    assert len(left) == len(right) > 10
    for ours, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert set(batches[0].targets) == {*SIGNALS}


def test_shared_maps_are_those_of_each_conversation_up_to_rounding(tmp_path, build, monkeypatch):
    data = write_data(tmp_path / "data", 2, 4)
    shared = build(tmp_path / "shared", data)
    monkeypatch.setattr(vlm_distill_cache.stage1_teacher.planning.plan, "with_visual_source", dict)
    own = build(tmp_path / "own", data)
    assert "visual_source" not in own.read("s0-0")
    for sample_id in own.sample_ids:
        ours, theirs = shared.read(sample_id), own.read(sample_id)
        for name, array in theirs.items():
            torch.testing.assert_close(
                torch.from_numpy(ours[name].astype(np.float64)),
                torch.from_numpy(array.astype(np.float64)),
                atol=1e-5 if name in ("log_gap", "top_logprob", "tail_logmass") else 1e-6,
                rtol=1e-4,
            )


def test_an_image_is_held_once_a_shard_and_its_conversations_meet_in_few(tmp_path, build):
    cache = build(tmp_path / "cache", write_data(tmp_path / "data", 3, 4), shard_size=5)
    shards = [[name.split("-")[0] for name in cache.shard_sample_ids(index)] for index in range(3)]
    assert sorted(name for shard in shards for name in shard) == sorted(["s0", "s1", "s2"] * 4)
    holders = [
        [name for name in cache.shard_sample_ids(index) if len(cache.read_stored(name)["visual_map"])]
        for index in range(3)
    ]
    assert [len(found) for found in holders] == [len(set(shard)) for shard in shards]
    # Twelve samples of three images in shards of five: two images lie across a shard's end.
    assert sum(len(found) for found in holders) == 5


def test_the_next_conversation_holds_the_maps_if_the_first_cannot_be_used(tmp_path, build):
    path = write_data(tmp_path / "data", 1, 3)
    entries = json.loads(path.read_text())
    entries[0]["conversations"][0]["value"] += " is it big" * 60
    path.write_text(json.dumps(entries))
    cache = build(tmp_path / "cache", path, max_length=128, max_failed_share=0.5)
    first, *others = (entry["id"] for entry in entries)
    assert set(cache.failed) == {first}
    assert [len(cache.read_stored(name)["visual_map"]) > 0 for name in others] == [True, False]
    np.testing.assert_array_equal(*(cache.read(name)["visual_map"] for name in others))


def test_a_run_that_would_read_in_another_order_is_refused(tmp_path, build):
    data = write_data(tmp_path / "data", 3, 2)
    cache = build(tmp_path / "cache", data)
    assert cache.plan.extra["order"]["by"] == "image"
    assert cache.plan.fingerprints["data"] == open_dataset(str(data)).fingerprint()
    entries = json.loads(data.read_text())
    for entry in entries:  # every sample gets an image file of its own: same words, other neighbours
        name = f"own-{entry['id']}.png"
        (data.parent / name).write_bytes((data.parent / entry["image"]).read_bytes())
        entry["image"] = name
    data.write_text(json.dumps(entries))
    with pytest.raises(CacheMismatchError, match=r"order"):
        build(tmp_path / "cache", data)


def test_a_killed_and_resumed_build_shares_the_same_way_byte_for_byte(tmp_path, build, monkeypatch):
    data = write_data(tmp_path / "data", 3, 4)
    build(tmp_path / "whole", data, shard_size=5)
    finish, calls = pipeline.finish_shard, []

    def killed(writer, failed=()):
        calls.append(writer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(writer, failed)

    monkeypatch.setattr(pipeline, "finish_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "resumed", data, shard_size=5)
    build(tmp_path / "resumed", data, shard_size=5)
    trees = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole", tmp_path / "resumed")
    ]
    assert trees[0] == trees[1]


def test_the_order_stays_the_data_sets_where_no_signal_is_of_the_image_alone(tmp_path, build):
    data = write_data(tmp_path / "data", 2, 3)
    cache = build(tmp_path / "cache", data, signals=("logits", "answer_attention"))
    assert list(cache.sample_ids) == list(open_dataset(str(data)).sample_ids)
    assert "order" not in cache.plan.extra
    assert VISUAL_SOURCE not in cache.plan.all_fields
