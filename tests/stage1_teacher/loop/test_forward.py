import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import vlm_distill_cache.stage1_teacher.loop.forward as forward
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX, check_record
from vlm_distill_cache.common.codecs.live import RowAttention, _top_by_lowest_id, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.errors import ModelError, SampleError
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.text.collate import collate, length_buckets
from vlm_distill_cache.stage1_teacher.config import SIGNALS, BuildConfig
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.signals import (
    check_finite,
    copies_done,
    encode_records,
    reduce_output,
    to_cpu,
)
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, run_ahead
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

COUNT = 10


@pytest.fixture
def work(tmp_path: Path, tiny_llava: Path) -> Build:
    return open_build(
        BuildConfig(
            cache=str(tmp_path / "none"), teacher=str(tiny_llava), template="short", limit=COUNT, signals=SIGNALS,
            batch_size=3, threads=1,
        )
    )  # fmt: skip


def encoded(work: Build) -> EncodedShard:
    return EncodedShard(index=0, samples=[work.encoder(work.dataset[index]) for index in range(COUNT)])


def one_after_the_other(work: Build, shard: EncodedShard) -> list:
    """The slow, obvious loop: collate, run, reduce, copy, check, one batch at a time."""
    done = []
    for bucket in length_buckets([len(sample) for sample in shard.samples], 3):
        batch = collate([shard.samples[index] for index in bucket], work.teacher.pad_token_id)
        signals = to_cpu(reduce_output(work.run(batch), batch, work.codecs))
        check_finite(signals)
        done.append((batch, signals))
    return done


def test_as_many_batches_wait_as_gpus_hold_the_teacher_and_nothing_else_changes(work: Build, monkeypatch):
    expected = records_of(work, list(run_shard(work, encoded(work), 2)))
    counts, queue, finish = [0], forward._queue, forward._finish

    def counted_queue(*arguments):
        counts.append(counts[-1] + 1)
        return queue(*arguments)

    def counted_finish(*arguments):
        counts.append(counts[-1] - 1)
        yield from finish(*arguments)

    monkeypatch.setattr(forward, "_queue", counted_queue)
    monkeypatch.setattr(forward, "_finish", counted_finish)
    for gpus, most in ((0, 2), (1, 2), (3, 4)):
        work.teacher.gpus = tuple(torch.device("cuda", number) for number in range(gpus))
        del counts[1:]
        found = records_of(work, list(run_shard(work, encoded(work), 2)))
        assert max(counts) == most, gpus
        assert list(found) == list(expected)
        for name, record in expected.items():
            for field, array in record.items():
                np.testing.assert_array_equal(array, found[name][field])


def records_of(work: Build, done) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for batch, signals in done:
        found |= zip(batch.sample_ids, encode_records(signals, batch, work.codecs), strict=True)
    return found


def test_the_overlapped_loop_gives_the_bytes_of_one_batch_after_the_other_in_its_order(work: Build):
    shard = encoded(work)
    expected, found = one_after_the_other(work, shard), list(run_shard(work, shard, 3))
    assert [batch.sample_ids for batch, _ in found] == [batch.sample_ids for batch, _ in expected]
    theirs, ours = records_of(work, expected), records_of(work, found)
    assert list(theirs) == list(ours)
    for name, record in theirs.items():
        assert record.keys() == ours[name].keys()
        for field, array in record.items():
            np.testing.assert_array_equal(array, ours[name][field])
    assert len(shard.samples) == COUNT


def test_a_records_arrays_are_those_of_its_sample_alone(work: Build):
    shard = encoded(work)
    batch = collate(shard.samples, work.teacher.pad_token_id)
    signals = to_cpu(reduce_output(work.run(batch), batch, work.codecs))
    records = encode_records(signals, batch, work.codecs)
    assert len(records) == len(batch) == COUNT
    for index, record in enumerate(records):
        rows, visual = (
            slice(int(mask[:index].sum()), int(mask[: index + 1].sum()))
            for mask in (batch.labels != IGNORE_INDEX, batch.visual_mask)
        )
        alone = {"labels": batch.labels[batch.labels != IGNORE_INDEX][rows].numpy()}
        alone |= work.codecs["logits"].encode(signals["logits"].rows(rows))
        alone |= work.codecs["visual_logits"].encode(signals["visual_logits"].rows(visual))
        for name in ("answer_attention", "text_attention"):
            alone |= work.codecs[name].encode(RowAttention.from_cells(signals[name][index]))
        for name, array in alone.items():
            np.testing.assert_array_equal(record[name], array)
        # Where one picture's signals are stored once, the writer adds which record has them.
        check_record(record, [field for field in work.plan.all_fields if field.name != "visual_source"])


def test_a_batch_is_queued_before_the_one_before_it_is_looked_at(work: Build, monkeypatch):
    events = []
    queue, finish = forward._queue, forward._Queued.finish

    def note_queue(work, ready):
        events.append(("queue", ready.batch.sample_ids))
        return queue(work, ready)

    def note_finish(queued):
        events.append(("finish", queued.batch.sample_ids))
        return finish(queued)

    monkeypatch.setattr(forward, "_queue", note_queue)
    monkeypatch.setattr(forward._Queued, "finish", note_finish)
    ids = [batch.sample_ids for batch, _ in run_shard(work, encoded(work), 3)]
    expected = [("queue", ids[0])]
    for before, after in pairwise(ids):
        expected += [("queue", after), ("finish", before)]
    assert events == [*expected, ("finish", ids[-1])]


def test_batches_are_collated_on_another_thread_and_one_ahead_at_most(work: Build, monkeypatch):
    threads, ahead = [], []
    running = []

    def note(samples, pad):
        threads.append(threading.current_thread().name)
        ahead.append(len(threads) - len(running))
        return collate(samples, pad)

    def run(self, batch, inputs=None, run=Build.run):
        running.append(batch)
        return run(self, batch, inputs)

    monkeypatch.setattr(forward, "collate", note)
    monkeypatch.setattr(Build, "run", run)
    list(run_shard(work, encoded(work), 3))
    assert all(name.startswith("collate") for name in threads)
    assert max(ahead) <= 2


@pytest.mark.parametrize("bad", [(0,), (4,), (COUNT - 1,), (2, 3, 7), tuple(range(COUNT))])
@pytest.mark.parametrize("what", ["nan", "infinite", "nothing"])
@pytest.mark.slow(quick=1)
def test_samples_that_fail_are_named_and_all_others_keep_their_order(
    work: Build, monkeypatch, bad: tuple[int, ...], what: str
):
    run = Build.run
    names = [work.dataset.sample_ids[index] for index in bad]

    def poisoned(self, batch, inputs=None):
        output = run(self, batch, inputs)
        output["logits"] = output["logits"].clone()
        for index, sample_id in enumerate(batch.sample_ids):
            if sample_id in names:
                row = output["logits"][(batch.labels[:index] != IGNORE_INDEX).sum()]
                row.fill_(-torch.inf) if what == "nothing" else row[3:4].fill_(
                    torch.nan if what == "nan" else torch.inf
                )
        return output

    monkeypatch.setattr(Build, "run", poisoned)
    shard = encoded(work)
    samples = list(shard.samples)
    order = [i for bucket in length_buckets([len(sample) for sample in samples], 3) for i in bucket]
    found = [name for batch, _ in run_shard(work, shard, 3) for name in batch.sample_ids]
    assert found == [samples[i].sample_id for i in order if i not in bad]
    assert [name for name, _ in shard.failed] == [samples[i].sample_id for i in order if i in bad]
    assert all("teacher: row 0 of" in reason or "teacher: row 0:" in reason for _, reason in shard.failed)
    assert [sample.sample_id for sample in shard.samples] == [
        s.sample_id for i, s in enumerate(samples) if i not in bad
    ]


def test_a_label_outside_the_vocabulary_fails_its_sample_alone(work: Build):
    shard = encoded(work)
    wrong = shard.samples[4]
    labels = wrong.labels.copy()
    labels[np.flatnonzero(labels != IGNORE_INDEX)[0]] = 10**6
    shard.samples[4] = replace(wrong, labels=labels)
    found = [name for batch, _ in run_shard(work, shard, 3) for name in batch.sample_ids]
    assert len(found) == COUNT - 1
    ((name, reason),) = shard.failed
    assert name == wrong.sample_id
    assert "label 1000000 is not in the teacher's vocabulary" in reason


def test_an_error_inside_the_model_is_one_about_its_files_wherever_it_comes_from(work: Build, monkeypatch):
    def broken(*_, **__):
        raise ValueError("sizes differ")

    for name in ("prepare", "run"):
        with monkeypatch.context() as patch:
            patch.setattr(Teacher, name, broken)
            with pytest.raises(ModelError, match=r"sizes differ; model, tokenizer and .* of one checkpoint"):
                list(run_shard(work, encoded(work), 3))


def test_running_ahead_keeps_the_order_and_passes_errors_on():
    assert list(run_ahead(lambda n: n * n, range(20), count=3, name="squares")) == [n * n for n in range(20)]
    results = run_ahead(lambda n: 1 // n, [1, 1, 0, 1], count=1, name="inverse")
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_unchecked_rows_that_are_no_distribution_come_back_as_nan_and_others_unchanged():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    codec = LogitCodec.from_preset("default")
    expected = select_entries(codec, logits, labels)
    logits[1, 7], logits[3, 9], logits[4] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(SampleError, match="row 1"):
        select_entries(codec, logits, labels)
    found = select_entries(codec, logits, labels, checked=False)
    assert found.log_probs[:, 0].isnan().tolist() == [False, True, False, True, True, False]
    width = expected.log_probs.shape[1]
    for row in (0, 2, 5):
        torch.testing.assert_close(found.log_probs[row, :width], expected.log_probs[row], rtol=0, atol=0)
        torch.testing.assert_close(found.tail_log_mass[row], expected.tail_log_mass[row], rtol=0, atol=0)


def rows_with_ties(kind: str, vocabulary: int) -> torch.Tensor:
    """1,000 rows of logits; float32."""
    random = torch.Generator().manual_seed(len(kind))
    dense = torch.randn(1000, vocabulary, generator=random)
    if kind == "few values":
        dense = torch.randint(0, 9, (1000, vocabulary), generator=random).float()
    elif kind == "rounded":
        dense = (4 * dense).bfloat16().float()
    elif kind == "degenerate":  # all equal, both zeros, all but some impossible, one value apart
        dense[::4], dense[1::4], dense[2::4, 5:], dense[3::4] = 1.5, 0.0, -torch.inf, 0.0
        dense[1::4, ::2], dense[3::4, 7] = -0.0, 2.0
    elif kind == "huge":
        dense = torch.where(dense > 0, 3e38, -3e38)
    return dense


@pytest.mark.parametrize("vocabulary", [40, 333])
@pytest.mark.parametrize("kind", ["random", "few values", "rounded", "degenerate", "huge"])
def test_a_selection_by_blocks_finds_what_sorting_finds(kind: str, vocabulary: int):
    dense = rows_with_ties(kind, vocabulary)
    rows = dense.tolist()
    ranked = [sorted(range(vocabulary), key=lambda token, row=row: (-row[token], token)) for row in rows]
    for count in (1, 5, 9, 39, 40):  # of the larger vocabulary 10 whole blocks of 32 tokens, and 13 tokens
        assert _top_by_lowest_id(dense, count).tolist() == [ids[:count] for ids in ranked]


def test_rows_marked_on_the_cpu_give_the_logits_of_a_whole_pass(work: Build):
    batch = collate(encoded(work).samples[:3], work.teacher.pad_token_id)
    inputs = work.prepare(batch)
    with torch.inference_mode():
        whole = work.teacher.model(**inputs.model_inputs, use_cache=False).logits
        torch.testing.assert_close(row_logits(work.teacher.model, inputs.model_inputs, inputs.rows), whole[inputs.rows])
    output = work.run(batch)
    torch.testing.assert_close(output["logits"], whole[batch.labels != IGNORE_INDEX])
    torch.testing.assert_close(output["visual_logits"], whole[batch.visual_mask])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_around_the_librarys_own_pass_waits_for_a_gpu(tmp_path: Path, tiny_llava: Path):
    work = open_build(
        BuildConfig(
            cache=str(tmp_path / "none"), teacher=str(tiny_llava), template="short", limit=COUNT, signals=SIGNALS,
            batch_size=3, device="cuda", dtype="float32",
        )
    )  # fmt: skip
    shard = encoded(work)
    batch = collate(shard.samples, work.teacher.pad_token_id)
    inputs = work.prepare(batch)
    output = work.run(batch, inputs)
    reduce_output(output, batch, work.codecs)  # fills what is cached by picture layout
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.to(work.teacher.device)
        signals = reduce_output(output, batch, work.codecs, checked=False)
        copied, events = to_cpu(signals, non_blocking=True), copies_done(signals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert events
    for event in events:
        event.synchronize()
    expected = to_cpu(signals)
    for ours, theirs in zip(copied["answer_attention"], expected["answer_attention"], strict=True):
        assert ours.is_pinned()
        assert torch.equal(ours, theirs)
    assert len(list(run_shard(work, shard, 3))) == 4
