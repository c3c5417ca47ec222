"""A batch for which memory does not suffice runs in halves, and the cache says so: on a CPU, by a pass that pretends."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vlm_distill_cache.stage1_teacher.loop.answers as answers
from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.inspect import describe_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.config import SIGNALS, BuildConfig
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.signals import encode_records
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard
from vlm_distill_cache.stage1_teacher.planning.open import open_build

COUNT = 10


@pytest.fixture
def work(tmp_path: Path, tiny_llava: Path) -> Build:
    options = {"teacher": str(tiny_llava), "template": "short", "limit": COUNT, "signals": SIGNALS, "threads": 1}
    return open_build(BuildConfig(cache=str(tmp_path / "none"), batch_size=1, **options))


def encoded(work: Build) -> EncodedShard:
    return EncodedShard(index=0, samples=[work.encoder(work.dataset[index]) for index in range(COUNT)])


def records_of(work: Build, done) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for batch, signals in done:
        found |= zip(batch.sample_ids, encode_records(signals, batch, work.codecs), strict=True)
    return found


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


class Cramped:
    """A teacher's pass on a device with room for so many samples at once; sizes of the passes that were tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.tried: list[int] = []
        run = Build.run

        def limited(work, batch, inputs=None):
            self.tried.append(len(batch))
            if len(batch) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return run(work, batch, inputs)

        monkeypatch.setattr(Build, "run", limited)


def test_a_batch_that_memory_does_not_suffice_for_runs_in_halves_and_the_next_one_is_tried_whole(
    work: Build, monkeypatch, caplog
):
    expected = records_of(work, list(run_shard(work, encoded(work), 6)))
    cramped, shard = Cramped(monkeypatch, room=2), encoded(work)
    done = list(run_shard(work, shard, 6))
    assert sorted(cramped.tried) == sorted([6, 3, 1, 2, 3, 1, 2, 4, 2, 2])  # of six samples, and of the last four
    assert shard.divided == [6, 3, 3, 4]
    assert (shard.failed, len(shard.samples)) == ([], COUNT)
    found = records_of(work, done)
    assert list(found) == list(expected)  # in the order of the whole batches
    for name, record in expected.items():
        np.testing.assert_array_equal(found[name]["labels"], record["labels"])
        np.testing.assert_array_equal(found[name]["token_ids"][:4], record["token_ids"][:4])
    assert "out of memory with 6 samples" in caplog.text
    assert "batch_size=3" in caplog.text


def test_records_of_a_divided_batch_are_those_of_its_parts(work: Build, monkeypatch):
    expected = records_of(work, list(run_shard(work, encoded(work), 1)))
    Cramped(monkeypatch, room=1)
    found = records_of(work, list(run_shard(work, encoded(work), 4)))
    for name, record in expected.items():
        for field, array in record.items():
            np.testing.assert_array_equal(found[name][field], array)


def test_a_sample_that_memory_does_not_suffice_for_ends_the_build_with_the_remedies(work: Build, monkeypatch):
    Cramped(monkeypatch, room=0)
    with pytest.raises(ModelError, match=r"memory does not suffice for its \d+ tokens.*device_map=auto.*max_length"):
        list(run_shard(work, encoded(work), 3))


def test_the_cache_says_which_shards_have_divided_batches_and_keeps_it_through_conversion(
    tmp_path: Path, build_cache, monkeypatch
):
    build_cache(tmp_path / "whole", signals=("logits",))
    assert "divided" not in (tmp_path / "whole" / "shards" / "00000.json").read_text()
    Cramped(monkeypatch, room=2)
    build_cache(tmp_path / "cache", signals=("logits",))  # batches of 3 and 1 a shard of 4; the last shard has 2
    assert [read_sidecar(tmp_path / "cache", shard).divided for shard in range(3)] == [1, 1, 0]
    words = "2 batches ran in parts, for lack of memory"
    assert words in (tmp_path / "cache" / CARD).read_text()
    assert words in describe_cache(tmp_path / "cache")
    assert verify(tmp_path / "cache", deep=True) == []
    whole, divided = open_cache(tmp_path / "whole"), open_cache(tmp_path / "cache")
    assert divided.plan == whole.plan
    assert divided.sample_ids == whole.sample_ids
    convert(tmp_path / "cache", tmp_path / "there", "webdataset")
    convert(tmp_path / "there", tmp_path / "back", "zarr")
    assert tree(tmp_path / "back") == tree(tmp_path / "cache")


def test_answers_of_a_batch_that_memory_does_not_suffice_for_are_written_in_halves(tmp_path: Path, monkeypatch):
    options = {"data": "shapes:images=6", "answers": "generate", "max_new_tokens": 40, "batch_size": 4, "threads": 1}
    work = open_build(BuildConfig(cache=str(tmp_path / "none"), limit=4, **options))
    expected = answers.answer_shard(work, range(4), index=0, batch_size=4)
    generate, sizes = answers._generate, []

    def cramped(work, codec, prompts, seed):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return generate(work, codec, prompts, seed)

    monkeypatch.setattr(answers, "_generate", cramped)
    found = answers.answer_shard(work, range(4), index=0, batch_size=4)
    assert sizes[:3] == [4, 2, 2]
    assert found.divided[0] == 4
    assert not expected.divided
    assert (found.answers, found.failed) == (expected.answers, expected.failed)
