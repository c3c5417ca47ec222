"""The join of data and cache: the teacher's rows meet exactly the samples they were made from."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from image_array import ImageArray
from tiny_cache import DATA, build_tiny_cache, make_teacher

from vlm_distill_cache.common.attention.layers import student_groups
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Sample, Turn, fingerprint_samples
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset, SampleMemory, join_cache
from vlm_distill_cache.stage2_student.batches.layers import match_groups
from vlm_distill_cache.stage2_student.losses.objective import units_of
from vlm_distill_cache.stage2_student.losses.terms import choose_terms

SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map")


class ListDataset:
    """Samples in a list."""

    name = "list"

    def __init__(self, samples):
        self.samples = list(samples)
        self.sample_ids = [sample.sample_id for sample in self.samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def fingerprint(self):
        return fingerprint_samples(self)


def open_joined(path, *, dataset=None, signals=SIGNALS, grid=(3, 3), **options):
    encoder = make_teacher().encoder.with_grid(grid)
    dataset = open_dataset(DATA) if dataset is None else dataset
    return CachedDataset(dataset, encoder, open_cache(path), terms=choose_terms(signals), pad_token_id=0, **options)


def test_a_batch_holds_the_teachers_rows_in_the_order_of_its_own(tiny_cache):
    path, teacher = tiny_cache
    dataset, positions = open_dataset(DATA), [3, 0, 11]
    batch = open_joined(path).batch(positions)
    live = [teacher.signals(dataset[position]) for position in positions]
    log_probs = torch.cat([logits for logits, *_ in live]).float().log_softmax(-1)
    kept = batch.targets["logits"].entry_mask
    found = torch.where(kept, batch.targets["logits"].log_probs, 0)
    expected = torch.where(kept, log_probs.gather(1, batch.targets["logits"].token_ids), 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(batch.labels, torch.cat([b.labels[b.labels != IGNORE_INDEX] for *_, b in live]))
    assert batch.row_count == len(batch.labels) == len(batch.targets["logits"])
    assert units_of(batch) == (batch.row_count, batch.row_count, batch.row_count, 3, 3, 0, 0, 0, 0, 0, 0)


def test_attention_is_pooled_to_the_students_grid_keys_by_sum_and_queries_by_mean(tiny_cache):
    path, teacher = tiny_cache
    dataset, positions = open_dataset(DATA), [2, 7]
    batch = open_joined(path).batch(positions)

    def pool(cells):  # [..., 36] -> [..., 9], an exact 2x2 pool
        return cells.reshape(*cells.shape[:-1], 3, 2, 3, 2).sum((-3, -1)).flatten(-2)

    live = [teacher.signals(dataset[position]) for position in positions]
    answers = torch.cat([pool(answer) for _, answer, *_ in live])  # [A, G, 9]
    maps = torch.stack([pool(pool(visual).transpose(1, 2)).transpose(1, 2) / 4 for _, _, visual, _ in live])
    columns = torch.stack([pool(visual.mean(1)) for _, _, visual, _ in live])
    torch.testing.assert_close(batch.targets["answer_attention"].teacher, answers)
    torch.testing.assert_close(batch.targets["answer_attention"].image_mass, answers.sum(-1))
    torch.testing.assert_close(batch.targets["visual_map"].teacher, maps)
    torch.testing.assert_close(batch.targets["visual_columns"].teacher, columns)
    identity = torch.eye(9).expand(2, 9, 9)
    assert torch.equal(batch.targets["visual_map"].student_pool, identity)
    assert batch.targets["visual_map"].content is None


def test_the_coarser_side_decides_the_grid(tiny_cache):
    batch = open_joined(tiny_cache[0], grid=(12, 12)).batch([0])
    target = batch.targets["answer_attention"]
    assert target.student_pool.shape == (1, 144, 36)
    torch.testing.assert_close(target.student_pool.sum(-1), torch.ones(1, 144))
    assert target.teacher.shape[-1] == 36


def test_only_the_wanted_signals_are_read(tiny_cache):
    batch = open_joined(tiny_cache[0], signals=("logits",)).batch([0, 1])
    assert batch.targets.keys() == {"logits"}
    plain = open_joined(tiny_cache[0], signals=()).batch([0, 1])
    assert plain.targets == {}
    assert torch.equal(plain.labels, batch.labels)


def test_the_order_is_the_caches_shards_and_a_limit_cuts_it(tiny_cache):
    joined = open_joined(tiny_cache[0])
    assert [len(shard) for shard in joined.shards] == [6, 6, 6, 2]
    assert joined.sample_ids == list(open_dataset(DATA).sample_ids)
    limited = open_joined(tiny_cache[0], limit=8)
    assert [len(shard) for shard in limited.shards] == [6, 2, 0, 0]
    assert len(limited) == 8


def test_samples_that_failed_in_stage_one_are_left_out_and_counted(tmp_path):
    ids = open_dataset("shapes:images=5,seed=5").sample_ids
    build_tiny_cache(tmp_path / "c", data="shapes:images=5,seed=5", failed=(ids[1], ids[4]), shard_size=2)
    joined = open_joined(tmp_path / "c", dataset=open_dataset("shapes:images=5,seed=5"))
    assert joined.sample_ids == [ids[0], ids[2], ids[3]]
    assert joined.failed == 2
    assert sorted(np.concatenate(joined.shards).tolist()) == [0, 1, 2]


def test_kept_samples_are_the_same_objects_and_memory_is_bounded(tiny_cache):
    memory = SampleMemory(2**30)
    joined = open_joined(tiny_cache[0], memory=memory)
    other = open_joined(tiny_cache[0], memory=memory, signals=("logits",))
    assert joined.load(0).encoded is joined.load(0).encoded is other.load(0).encoded
    assert joined.load(0).targets is joined.load(0).targets
    assert other.load(0).targets is not joined.load(0).targets
    small = open_joined(tiny_cache[0], memory=SampleMemory(10))
    assert small.load(0).encoded is not small.load(0).encoded


def test_other_words_are_refused_naming_sample_labels_and_remedy(tiny_cache):
    dataset = ListDataset(open_dataset(DATA))
    first = dataset.samples[0]
    turns = (dataclasses.replace(first.turns[0], answer="blue"), *first.turns[1:])
    dataset.samples[0] = dataclasses.replace(first, turns=turns)
    with pytest.raises(CacheMismatchError, match=rf"{first.sample_id}.*cached labels are \[.*build the cache again"):
        open_joined(tiny_cache[0], dataset=dataset).load(0)


def test_another_picture_is_refused_naming_sample_hashes_and_remedy(tiny_cache):
    dataset = ListDataset(open_dataset(DATA))
    first = dataset.samples[0]
    black = ImageArray(np.zeros((72, 72, 3), dtype=np.uint8), "black")
    dataset.samples[0] = dataclasses.replace(first, images=(black,))
    with pytest.raises(CacheMismatchError, match=rf"{first.sample_id}.*picture's hash was [0-9a-f]+ .*Restore it"):
        open_joined(tiny_cache[0], dataset=dataset).load(0)


def test_missing_samples_are_refused_with_their_number(tiny_cache):
    dataset = ListDataset(open_dataset(DATA)[index] for index in range(18))
    with pytest.raises(CacheMismatchError, match=r"2 of the 20 samples.*teacher-cache build --data"):
        open_joined(tiny_cache[0], dataset=dataset)


def test_text_only_samples_have_rows_but_no_attention(tmp_path):
    scenes = open_dataset("shapes:images=2,seed=5")
    text = Sample(sample_id="text", images=(), turns=(Turn(question="what color ?", answer="red"),))
    dataset = ListDataset([scenes[0], text, scenes[1]])
    build_tiny_cache(tmp_path / "c", dataset=dataset)
    joined = open_joined(tmp_path / "c", dataset=dataset)
    batch = joined.batch([0, 1, 2])
    assert batch.has_image.tolist() == [0, 2]
    assert units_of(batch) == (batch.row_count, batch.row_count, batch.row_count - 2, 2, 2, 0, 0, 0, 0, 0, 0)
    assert len(batch.targets["answer_attention"].teacher) == batch.row_count - 2
    assert batch.targets["visual_map"].teacher.shape[0] == 2
    alone = joined.batch([1])
    assert alone.targets.keys() == {"logits"}
    assert units_of(alone) == (alone.row_count, alone.row_count, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_the_control_takes_attention_from_another_image_and_logits_from_its_own(tiny_cache):
    right, wrong = (
        open_joined(tiny_cache[0], shuffle_teacher_images=shuffled).batch([0, 1]) for shuffled in (False, True)
    )
    assert torch.equal(right.targets["logits"].log_probs, wrong.targets["logits"].log_probs)
    for signal in ("answer_attention", "visual_columns", "visual_map"):
        assert right.targets[signal].teacher.shape == wrong.targets[signal].teacher.shape
        assert not torch.equal(right.targets[signal].teacher, wrong.targets[signal].teacher)


def test_joining_reads_no_sidecar_and_keeps_the_data_sets_own_ids(tiny_cache, tmp_path):
    """A million ids are neither read from the cache nor held twice."""
    folder = tmp_path / "c"
    shutil.copytree(tiny_cache[0], folder)
    for path in (folder / "shards").glob("*.json"):
        path.unlink()
    dataset = ListDataset(open_dataset(DATA))
    joined = open_joined(folder, dataset=dataset)
    assert all(a is b for a, b in zip(joined.sample_ids, dataset.sample_ids, strict=True))


def test_data_in_another_order_join_by_id(tiny_cache):
    straight = open_joined(tiny_cache[0])
    dataset = ListDataset(reversed(list(ListDataset(open_dataset(DATA)).samples)))
    turned = open_joined(tiny_cache[0], dataset=dataset)
    assert turned.sample_ids == straight.sample_ids
    for position in (0, 7, 19):
        assert turned.load(position).encoded.image_hash == straight.load(position).encoded.image_hash


def test_of_a_merged_cache_the_samples_of_this_data_set_are_used(tiny_cache):
    dataset = ListDataset(open_dataset(DATA)[index] for index in (3, 9, 19))
    cache = open_cache(tiny_cache[0])
    parts = [{"fingerprint": "a"}, {"fingerprint": dataset.fingerprint()}]
    cache.plan = dataclasses.replace(cache.plan, data=cache.plan.data | {"parts": parts})
    join = join_cache(cache, dataset)
    assert join.sample_ids == list(dataset.sample_ids)
    assert join.places.tolist() == [0, 1, 2]
    assert [shard.tolist() for shard in join.shards] == [[0], [1], [], [2]]
    assert join_cache(cache, dataset, limit=2).sample_ids == list(dataset.sample_ids)[:2]
    with pytest.raises(CacheMismatchError, match="20 of the 20 samples"):
        join_cache(cache, open_dataset("easy-vqa"))


def test_student_layers_are_chosen_as_the_caches_were(tiny_cache):
    plan = open_cache(tiny_cache[0]).plan
    chosen = dataclasses.replace(plan, teacher=plan.teacher | {"layer_choice": "all"})
    assert match_groups(plan, 6).student == open_joined(tiny_cache[0]).student_groups(6) == student_groups(6, 1)
    assert match_groups(chosen, 6).student == ((0, 1, 2, 3, 4, 5),)


def test_samples_longer_than_the_students_positions_are_left_out_and_said(tiny_cache, caplog):
    """Against the slow way: every sample encoded, and its longest conversation measured."""
    whole, encoder = open_joined(tiny_cache[0]), make_teacher().encoder.with_grid((3, 3))
    lengths = [int(whole.load(position).encoded.position_ids.max()) + 1 for position in range(len(whole))]
    limit = sorted(lengths)[len(lengths) // 2]
    kept = [name for name, length in zip(whole.sample_ids, lengths, strict=True) if length <= limit]
    assert 0 < len(kept) < len(whole)
    short = dataclasses.replace(encoder, positions=limit)
    found = CachedDataset(
        open_dataset(DATA), short, open_cache(tiny_cache[0]), terms=choose_terms(SIGNALS), pad_token_id=0
    )
    assert found.sample_ids == kept
    assert sorted(found.left_out) == sorted(set(whole.sample_ids) - set(kept))
    assert all(f"longer than the {limit} positions" in reason for reason in found.left_out.values())
    assert f"{len(found.left_out)} of {len(whole)} samples" in caplog.text
    names = [[found.sample_ids[place] for place in shard] for shard in found.shards]
    assert names == [[whole.sample_ids[place] for place in shard if lengths[place] <= limit] for shard in whole.shards]
    for position, name in enumerate(kept):
        other = whole.load(whole.sample_ids.index(name)).encoded
        assert found.load(position).encoded.image_hash == other.image_hash
    with pytest.raises(CacheMismatchError, match=r"all samples .* longer than the 12 positions"):
        CachedDataset(
            open_dataset(DATA), dataclasses.replace(encoder, positions=12), open_cache(tiny_cache[0]),
            terms=choose_terms(SIGNALS), pad_token_id=0,
        )  # fmt: skip
