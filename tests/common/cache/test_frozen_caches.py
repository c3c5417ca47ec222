"""Caches of format version 1 that were written once and never again: old caches stay readable.

Three samples (two pictures of 6 x 6 visual tokens, one without a picture) and one that failed, with all four
signals in their default codecs, from a random teacher of 4 layers in 2 groups. If a test fails here, the
format changed: raise its version, keep reading the old one, and add a fixture of the new one beside these.
"""

from pathlib import Path

import pytest
import torch

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
