"""Builds of samples with several pictures and clips: records of format version 2, against the teacher's own eager pass."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import zarr
from image_array import ImageArray

import vlm_distill_cache.stage1_teacher.planning.open as opening
from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, tile_boxes
from vlm_distill_cache.common.attention.tiles import of_view, tiles_of, views_of
from vlm_distill_cache.common.cache.schema import SEVERAL_PICTURES
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.sample import Dataset, Frame, Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.live import LiveTeacher
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS
from vlm_distill_cache.stage1_teacher.planning.batch_size import automatic_batch_size, longest_input
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

SIGNALS = ("logits", "answer_attention", "text_attention", "visual_columns", "visual_map", "hidden", "visual_hidden",
           "projector_output", "visual_logits", "tower_attention")  # fmt: skip
RED, GREEN, BLUE = (
    ImageArray(np.full((30, 40, 3), colour, np.uint8), name)
    for name, colour in (("red", (200, 0, 0)), ("green", (0, 200, 0)), ("blue", (0, 0, 200)))
)


@dataclass(frozen=True)
class Clip:
    """A video of plain frames."""

    times: tuple[float, ...]
    name: str = "clip"

    def frames(self, sampling):
        return [
            Frame(image=PIL.Image.new("RGB", (30, 30), (int(50 * time), 9, 9)), time=time)
            for time in self.times[: sampling.most]
        ]


def sample_of(sample_id, images, *turns):
    turns = tuple(Turn(question=q, answer=a, places=at) for q, a, at in turns)
    return Sample(sample_id=sample_id, images=tuple(images), turns=turns)


TWO = sample_of("two", (RED, GREEN), ("what color is  ?", "red", (0, 14)))
SAMPLES = (
    TWO,
    replace(TWO, sample_id="again", turns=(replace(TWO.turns[0], question="what color is  or big ?", answer="green"),)),
    sample_of("one", (BLUE,), ("what color is it ?", "blue", ())),
    sample_of("text", (), ("is it big ?", "yes", ())),
    sample_of("clip", (RED, Clip((0.0, 0.5, 1.0, 4.0))), ("and then  ?", "no", (0, 9))),
    sample_of("turns", (GREEN, BLUE), ("is it  ?", "yes", (6,)), ("and  ?", "no", (4,))),
)


class Samples(Dataset):
    """Samples in memory."""

    def __init__(self, samples, name="several"):
        self.samples, self.name, self.looks = tuple(samples), name, 0
        self.sample_ids = [sample.sample_id for sample in samples]

    def __getitem__(self, index):
        self.looks += 1
        return self.samples[index]


def build(teacher: Path, target: Path, samples=SAMPLES, **options):
    """Build a cache of samples in memory."""
    settings = {"data": "several", "signals": SIGNALS, "fidelity_samples": 0, "attention_dtype": "f4", "hidden_dtype": "f4",
                "shard_size": 100, "batch_size": 3, "max_unknown_share": 1.0, "frame_grid": 2, "template": "short"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "open_dataset", lambda *_, **__: Samples(samples))
        extract(BuildConfig(cache=str(target), teacher=str(teacher), **settings | options))
    return open_cache(target)


@pytest.fixture(scope="module")
def cache(tiny_llava, tmp_path_factory):
    return build(tiny_llava, tmp_path_factory.mktemp("several") / "cache", fidelity_samples=2)


def eager_maps(teacher, encoder, sample, groups):
    """Head means of all rows and keys of one sample, mean over the layers of each group, ``[G, T, T]``; by the library."""
    batch = collate([encoder(sample)], teacher.pad_token_id)
    teacher.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        out = teacher.model(
            **teacher.family.model_inputs(teacher.config, batch, dtype=torch.float32), output_attentions=True
        )
    maps = torch.stack([one[0].mean(dim=0) for one in out.attentions])  # [L, T, T]
    return torch.stack([maps[list(group)].mean(dim=0) for group in groups])


def test_records_say_what_the_teachers_own_eager_pass_says_of_each_view(cache, tiny_llava):
    assert cache.plan.format_version == cache.manifest.format_version == SEVERAL_PICTURES
    assert read_sidecar(cache.path, 0).format_version == SEVERAL_PICTURES
    assert cache.plan.extra["frames"] == {"fps": 1.0, "most": 32}
    assert verify(cache.path, deep=True) == []
    card = (cache.path / "README.md").read_text()
    assert "- Pictures: 5 of 6 samples with a picture, 12 pictures and frames of videos in all" in card
    teacher = Teacher(tiny_llava, device="cpu")
    encoder = build_encoder(teacher, template="short", max_length=2048)
    codec = cache.codec("answer_attention")
    for sample in SAMPLES:
        record, encoded = cache.read(sample.sample_id), encoder(sample)
        assert tiles_of(record) == tuple(
            replace(tile, region=tuple(np.float32(tile.region).tolist())) for tile in encoded.tiles
        )
        assert record["image_hash"].tobytes() == b"".join(encoded.image_hashes)
        np.testing.assert_array_equal(record["frame_times"], np.array(encoded.frame_times).reshape(-1, 2))
        maps = eager_maps(teacher, encoder, sample, cache.plan.teacher["groups"])
        keys, rows = np.flatnonzero(encoded.visual_mask), encoded.supervised_rows
        pool = overlap_matrix(
            tile_boxes(encoded.tiles), tile_boxes(codec.cells_of(encoded.tiles))
        )  # blocks by themselves
        found = cache.decode("answer_attention", record)
        expected = (maps[:, rows][:, :, keys] @ pool).transpose(0, 1)
        np.testing.assert_allclose(found.cells, expected, atol=1e-6)
        np.testing.assert_allclose(found.image_mass, expected.sum(dim=2), atol=1e-6)
        first = sum(tile.token_count for tile in encoded.tiles if tile.span[0] == 0)  # of the first view
        behind = np.flatnonzero(
            ~encoded.visual_mask & (np.arange(len(encoded)) > (keys[first - 1] if first else len(encoded)))
        )
        expected = (maps[:, behind][:, :, keys] @ pool).transpose(0, 1)
        np.testing.assert_allclose(cache.decode("text_attention", record).cells, expected, atol=1e-6)
        views, place, columns = views_of(encoded.tiles), 0, []
        decoded = cache.decode("visual_map", record)
        assert isinstance(decoded, tuple) == (len(views) > 1)
        for number, view in enumerate(views):
            tiles = of_view(encoded.tiles, view)
            own = keys[place : place + sum(tile.token_count for tile in tiles)]
            place += len(own)
            block, content = maps[:, own][:, :, own], content_mask(tile_boxes(tiles))
            map_of_view = decoded[number] if len(views) > 1 else decoded
            np.testing.assert_allclose(map_of_view.values, block, atol=1e-6)
            columns.append(block[:, content].mean(dim=1))
        if views:
            np.testing.assert_allclose(cache.decode("visual_columns", record), torch.cat(columns, dim=1), atol=1e-6)
        for name in ("visual_hidden", "projector_output", "tower_attention"):
            assert len(cache.decode(name, record)) == len(keys)


def test_signals_of_pictures_are_stored_once_where_the_prefix_is_the_same(cache):
    order = {name: position for position, name in enumerate(cache.sample_ids)}
    assert int(cache.read("again")["visual_source"][0]) == order["two"]
    assert not len(cache.read_stored("again")["visual_columns"])
    for name in ("visual_columns", "visual_map", "tower_attention"):
        np.testing.assert_array_equal(cache.read("again")[name], cache.read("two")[name])
    assert len(cache.read_stored("again")["answer_attention"]) == 2 * len(cache.read("again")["labels"])


def test_zarr_alone_finds_plain_arrays(cache):
    group = zarr.open_group(cache.path / "shards" / "00000.zarr", mode="r")
    assert group.attrs["format_version"] == 2
    ids = bytes(group["sample_ids"][...])
    bounds = group["sample_ids_offsets"][...]
    names = [ids[a:b].decode() for a, b in pairwise(bounds)]
    clip = names.index("clip")

    def of_clip(name):
        bounds = group[f"{name}_offsets"][...]
        return group[name][bounds[clip] : bounds[clip + 1]]

    assert of_clip("image_hash").shape == (5, 16)
    assert of_clip("tile_pictures").tolist() == [[number, 1] for number in range(5)]
    assert of_clip("frame_times")[1:].tolist() == [[1, 0], [1, 0.5], [1, 1], [1, 4]]
    rows = len(of_clip("labels"))
    assert len(of_clip("answer_attention")) == rows
    assert of_clip("answer_frames").shape == (4 * rows, 1, 4)


def test_a_live_teacher_says_what_the_cache_holds(cache, tiny_llava, monkeypatch):
    monkeypatch.setattr(opening, "open_dataset", lambda *_, **__: Samples(SAMPLES))
    signals = ("answer_attention", "visual_columns", "visual_map")
    config = BuildConfig(teacher=str(tiny_llava), data="several", template="short", signals=signals, frame_grid=2)
    live = LiveTeacher(config)(SAMPLES[2:5])
    for sample, record in zip(SAMPLES[2:5], live, strict=True):
        there = cache.read(sample.sample_id)
        assert tiles_of(record) == tiles_of(there)
        cached = cache.decode("answer_attention", there).cells
        np.testing.assert_allclose(record["answer_attention"].cells, cached, atol=1e-5)
        np.testing.assert_allclose(record["visual_columns"], cache.decode("visual_columns", there), atol=1e-5)
        assert isinstance(record["visual_map"], tuple) == (len(views_of(tiles_of(there))) > 1)


def test_fidelity_is_that_of_each_view(cache):
    """Float32 keeps what the teacher says, up to the sums of another batch."""
    for name in ("answer_attention", "text_attention", "visual_columns", "visual_map"):
        assert cache.manifest.fidelity[f"{name}_gradient_cosine"] > 0.999, name


def test_what_is_left_of_a_killed_build_is_built_to_the_same_bytes(tiny_llava, tmp_path):
    options = {"signals": ("logits", "answer_attention"), "attention_dtype": "u1", "shard_size": 4}
    whole = build(tiny_llava, tmp_path / "cache", **options)
    before = {path: path.read_bytes() for path in whole.path.rglob("*") if path.is_file()}
    for name in ("shards/00001.json", "manifest.json", "index.bin", "README.md"):
        (whole.path / name).unlink()
    build(tiny_llava, tmp_path / "cache", **options)
    assert {path: path.read_bytes() for path in whole.path.rglob("*") if path.is_file()} == before


def test_a_batch_has_room_for_the_sample_with_the_most_pictures(tiny_llava, monkeypatch):
    monkeypatch.setattr(opening, "open_dataset", lambda *_, **__: Samples(SAMPLES))
    options = {"data": "several", "signals": ("logits", "visual_map"), "template": "short", "teacher": str(tiny_llava)}
    work = opening.open_build(BuildConfig(**options))
    one, clip = work.teacher.image_encoder.token_count, work.encoder(SAMPLES[4])
    assert longest_input(work, "clip").visual_mask.sum() == clip.visual_mask.sum() == 5 * one
    seen = []
    monkeypatch.setattr(type(EXTRACTORS["visual_map"]), "held_bytes", lambda *_, visual, **__: seen.append(visual) or 0)
    assert automatic_batch_size(work, "clip") == automatic_batch_size(work) == 16
    assert seen == [5 * one, one]


def test_the_data_are_looked_at_once():
    data = Samples(SAMPLES)
    survey = data.survey()
    assert (survey.most_pictures, survey.videos, data.looks) == (2, 1, len(SAMPLES))
    assert data.fingerprint() == survey.fingerprint
    assert survey.several
    assert survey.fullest == "clip"
    assert Samples([SAMPLES[2], SAMPLES[5], TWO]).survey().fullest == "turns"
    assert Samples([SAMPLES[3]]).survey().fullest == ""
    assert not Samples(SAMPLES[2:4]).survey().several
    assert Samples([replace(SAMPLES[4], images=SAMPLES[4].images[1:])]).survey().several
