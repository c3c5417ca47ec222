"""Caches that were written once and never again: old caches stay readable.

Of format version 1: three samples (two pictures of 6 x 6 visual tokens, one without a picture) and one that failed, with all four
signals in their default codecs, from a random teacher of 4 layers in 2 groups. If a test fails here, the
format changed: raise its version, keep reading the old one, and add a fixture of the new one beside these.

Of version 2: six samples and one that failed, of text, of one picture, of two in two turns (twice), of four frames in pairs,
and of two frames behind a picture, made of numbers by ``tests/common/several_factory.py``.
"""

from pathlib import Path

import pytest
import torch

from vlm_distill_cache.common.attention.tiles import tiles_of
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.files.hashing import checksum
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify

FIXTURES = Path(__file__).parents[1] / "fixtures"
HASHES = {"zarr": "2a64719fb48fbd7f6bed7d73897bbb7d", "webdataset": "0d7f0c78be1c2a95be08a244d971d6b7"}
RECORDS = {  # of all fields' bytes, in the plan's order
    "a": "1c9d344311728430d9f5aac8e15871b6",
    "b": "10296a21b6782a7d546659fc2c0d3540",
    "words": "f2a5572ba9a92b1665bbb9fb613f59fa",
}


@pytest.fixture(params=sorted(HASHES))
def store(request):
    return request.param


@pytest.fixture
def cache(store):
    return open_cache(FIXTURES / f"cache-v1-{store}")


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=5e-5, rtol=0)


def test_records_and_identity_are_the_pinned_ones(cache, store):
    assert cache.manifest_hash == HASHES[store]
    assert cache.manifest.fidelity == {"samples": 2, "kl": 0.25}
    assert cache.sample_ids == tuple(RECORDS)
    assert cache.failed == {"broken": "truncated image"}
    for sample_id, expected in RECORDS.items():
        record = cache.read(sample_id)
        assert checksum(b"".join(record[field.name].tobytes() for field in cache.fields)) == expected
    assert verify(cache.path, deep=True) == []


def test_decoded_signals_are_the_pinned_ones(cache):
    record = cache.read("b")
    assert record["labels"].tolist() == [16, 70, 74, 2]  # a blue circle </s>
    decoded = {name: as_tensors(codec_from_dict(stored).decode(record)) for name, stored in cache.plan.signals.items()}
    assert decoded.keys() == {"logits", "answer_attention", "visual_columns", "visual_map"}

    logits = decoded["logits"]
    assert logits.temperatures == (1.0, 2.0)
    assert logits.entry_mask.sum(dim=1).tolist() == [64, 64, 64, 64]
    assert logits.token_ids[0, :3].tolist() == [41, 60, 46]
    close(logits.log_probs[0, :3], [-1.3262, -2.3479, -2.5202])
    close(logits.tail_log_mass[0], [-3.5137, -1.8418])

    attention = decoded["answer_attention"]
    assert attention.cells.shape == (4, 2, 36)
    close(attention.cells[1, 0, :4], [0.0383, 0.0317, 0.0102, 0.0018])
    close(attention.image_mass[1], [0.3979, 0.5322])

    assert decoded["visual_columns"].shape == (2, 36)
    close(decoded["visual_columns"][1, :3], [0.0480, 0.0404, 0.0659])
    assert decoded["visual_map"].values.shape == (2, 36, 36)
    close(decoded["visual_map"].values[1, 5, :7], [0.0429, 0.0355, 0.1175, 0.0457, 0.0756, 0.2837, 0.0])


def test_a_sample_without_a_picture_has_empty_visual_signals(cache):
    record = cache.read("words")
    for name in ("tiles", "visual_columns", "visual_map"):
        assert len(record[name]) == 0
    assert record["image_hash"].any() == 0


SEVERAL_HASHES = {"zarr": "4652235fc0db406d91073f231943fcf4", "webdataset": "27afcd5fa16d492ed861186f72cdf737"}
SEVERAL_RECORDS = {  # as RECORDS
    "text": "74e5927dcf038dfeb29f43fbd35951bf",
    "one": "6e1fb1e73fbd1549edd82907ea21ade1",
    "two": "2ba567714fd9e2e5e9d4ea92188d2595",
    "clip": "91ae1087c168980faec9fe9c7945c404",
    "two again": "326be31facb013a1016dacc3d865fe6a",
    "both": "f4edc2020ae8c99a5079892a8a6a9cd2",
}


@pytest.fixture
def of_several(store):
    return open_cache(FIXTURES / f"cache-v2-{store}")


def test_records_of_version_2_are_the_pinned_ones(of_several, store):
    assert of_several.manifest_hash == SEVERAL_HASHES[store]
    assert of_several.plan.format_version == of_several.manifest.format_version == 2
    assert of_several.sample_ids == tuple(SEVERAL_RECORDS)
    assert of_several.failed == {"broken": "image is truncated"}
    for sample_id, expected in SEVERAL_RECORDS.items():
        record = of_several.read(sample_id)
        assert checksum(b"".join(record[field.name].tobytes() for field in of_several.fields)) == expected
    assert verify(of_several.path, deep=True) == []


def test_what_version_2_says_of_pictures_and_frames_is_the_pinned(of_several):
    clip, both, two = (of_several.read(name) for name in ("clip", "both", "two"))
    assert clip["frame_times"].tolist() == [[0, 0], [0, 0.5], [0, 1], [0, 1.5]]
    assert clip["tile_pictures"].tolist() == [[0, 2], [2, 2]]
    assert [(tile.rows, tile.cols, tile.span, tile.is_frame) for tile in tiles_of(both)] == [
        (2, 2, (0, 1), False),
        (1, 2, (1, 2), True),
        (1, 2, (2, 3), True),
    ]
    assert [row.tobytes().hex() for row in two["image_hash"]] == [
        "6daf867e412baafa7f198e9d61a945b6",
        "2f94240ba07abff6c5d05d5327ea4e57",
    ]
    assert of_several.read("text")["image_hash"].shape == (0, 16)
    assert of_several.read("one")["tile_pictures"].shape == (0, 2)


def test_decoded_signals_of_version_2_are_the_pinned_ones(of_several):
    clip, two = of_several.read("clip"), of_several.read("two")
    codecs = {name: codec_from_dict(stored) for name, stored in of_several.plan.signals.items()}
    logits = as_tensors(codecs["logits"].decode(clip))
    assert logits.token_ids[0, :2].tolist() == [80, 81]
    close(logits.log_probs[0, :2], [-0.4944, -2.2792])
    frames = codecs["answer_attention"].decode(clip)
    assert frames.cells.shape == (6, 2, 4)
    close(torch.from_numpy(frames.cells[1, 0]), [0.1034, 0.2203, 0.1381, 0.1381])
    stills = codecs["answer_attention"].decode(two)
    assert stills.cells.shape == (6, 2, 12)
    close(torch.from_numpy(stills.cells[2, 1, :8]), [0.009, 0.0867, 0.021, 0.1327, 0.0541, 0.0266, 0.1629, 0.0039])
    close(torch.from_numpy(stills.image_mass[2]), [0.6, 0.6001])
    text = codecs["text_attention"].decode(two)
    assert text.cells.shape == (8, 1, 4)
    close(torch.from_numpy(text.cells[7, 0]), [0.2481, 0.1408, 0.1866, 0.0245])
    columns = codecs["visual_columns"].decode(two)
    assert columns.shape == (2, 7)
    close(torch.from_numpy(columns[0]), [0.0268, 0.095, 0.3413, 0.5366, 0.6592, 0.0437, 0.2971])
    first, second = codecs["visual_map"].decode(two)
    assert (first.values.shape, second.values.shape) == ((2, 4, 4), (2, 3, 3))
    close(torch.from_numpy(second.values[1]), [[0.0914, 0.0, 0.0], [0.2046, 0.0655, 0.0], [0.249, 0.2507, 0.189]])
