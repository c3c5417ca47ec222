"""Losses that leave the teacher's sinks out: against slow references, without sinks the plain ones, and as a run has them."""

import math

import numpy as np
import pytest
import torch
from tiny_cache import build_tiny_cache
from torch import Tensor
from train_runs import make_config

from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.codecs.live import RowAttention
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.sinks import read_sinks, sink_map
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.batches.sinks import needed_sinks, sinks_for
from vlm_distill_cache.stage2_student.config import describe
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.attention import answer_attention_loss, visual_columns_loss
from vlm_distill_cache.stage2_student.training.preparation import prepare

KIND = "sink_suppressed"


def rows_of(rows: int, groups: int, cells: int, seed: int) -> Tensor:
    values = torch.rand(rows, groups, cells, generator=torch.Generator().manual_seed(seed)) ** 2
    return values / values.sum(dim=-1, keepdim=True) * 0.6


def slow_answers(student: Tensor, teacher: Tensor, sinks: Tensor, content: Tensor) -> Tensor:
    """Row by row and cell by cell."""
    rows = []
    for a in range(len(teacher)):
        if not bool((teacher[a] * content).any()):
            continue
        layers = []
        for g in range(teacher.shape[1]):
            cells = [c for c in range(teacher.shape[2]) if content[c]]
            t = [float(teacher[a, g, c]) * (1 - float(sinks[a, c])) for c in cells]
            s = [student[a, g, c] * (1 - float(sinks[a, c])) for c in cells]
            total, seen = sum(t), sum(s)
            loss = student.new_zeros(())
            for ours, theirs in zip(s, t, strict=True):
                if theirs > 0:
                    loss = loss + theirs / total * (math.log(theirs / total) - (ours / seen).log())
            layers.append(total * loss)
        rows.append(torch.stack(layers).mean())
    return torch.stack(rows).mean()


def test_rows_are_compared_after_both_sides_lost_what_lies_on_sinks():
    teacher, sinks = rows_of(4, 2, 6, seed=0), torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    teacher[2] = 0.0  # a row that looks at no picture
    sinks[0, 1] = 1.0
    content = torch.tensor([True, True, False, True, True, True])
    values, gradients = [], []
    for loss in (
        lambda s: answer_attention_loss(s, RowAttention.from_cells(teacher), kind=KIND, sinks=sinks, cell_mask=content),
        lambda s: slow_answers(s, teacher, sinks, content),
    ):
        student = rows_of(4, 2, 6, seed=1).requires_grad_()
        value = loss(student)
        value.backward()
        values.append(value.detach())
        gradients.append(student.grad)
    torch.testing.assert_close(*values, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)
    assert not bool(gradients[0][0, :, 1].any())  # a whole sink teaches nothing


def test_columns_are_compared_after_both_sides_lost_what_sinks_receive():
    teacher, student = rows_of(3, 2, 5, seed=3), rows_of(3, 2, 5, seed=4)
    sinks = torch.rand(3, 5, generator=torch.Generator().manual_seed(5))
    expected = []
    for b in range(3):
        for g in range(2):
            left, right = (side[b, g].double() * (1 - sinks[b].double()) for side in (student, teacher))
            expected.append(float(1 - left @ right / (left.norm() * right.norm())))
    found = visual_columns_loss(student, teacher, kind=KIND, sinks=sinks)
    assert float(found) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    with pytest.raises(ValueError, match="needs the sink scores"):
        visual_columns_loss(student, teacher, kind=KIND)
    # Where all that the teacher's tokens receive lies on whole sinks, there is nothing to learn, as of rows.
    for alone in (torch.ones(5), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])):
        lost = teacher * (alone > 0)
        seen = student.clone().requires_grad_()
        nothing = visual_columns_loss(seen, lost, kind=KIND, sinks=alone)
        nothing.backward()
        assert float(nothing.detach()) == 0
        assert not bool(seen.grad.any())
        answers = RowAttention.from_cells(lost)
        assert float(answer_attention_loss(student, answers, kind=KIND, sinks=alone)) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_without_sinks_they_are_the_plain_losses_bit_for_bit(masked: bool):
    teacher, nothing = rows_of(5, 3, 7, seed=6), torch.zeros(5, 7)
    mask = torch.rand(7, generator=torch.Generator().manual_seed(8)) < 0.7 if masked else None
    answers = RowAttention.from_cells(teacher)
    tokens = None if mask is None else mask.expand(5, 7)
    results = []
    for rows, columns in (("kl", "cosine"), (KIND, KIND)):
        one, other = rows_of(5, 3, 7, seed=7).requires_grad_(), rows_of(5, 3, 7, seed=7).requires_grad_()
        found = (
            answer_attention_loss(one, answers, kind=rows, sinks=nothing, cell_mask=mask),
            visual_columns_loss(other, teacher, kind=columns, sinks=nothing, token_mask=tokens),
        )
        sum(found).backward()
        results.append((*found, one.grad, other.grad))
    assert all(torch.equal(plain, suppressed) for plain, suppressed in zip(*results, strict=True))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cache"
    build_tiny_cache(path, signals=("logits", "answer_attention", "visual_columns"))
    return path


def test_a_run_takes_the_maps_from_its_cache_pooled_to_the_cells_of_the_loss(cached, tmp_path):
    losses = {"answer_attention": 1.0, "visual_columns": 1.0, "answer_kind": KIND, "visual_columns_kind": KIND}
    dft = {"steps": 2, "batch_size": 4, "losses": losses}
    run = prepare(make_config(cached, tmp_path / "run", phases=("dft",), dft=dft))
    dataset, cache = run.phases[0].dataset, open_cache(cached)
    assert isinstance(dataset, CachedDataset)
    place = dataset.first_picture()
    targets = dataset.load(place).targets
    record = cache.read(dataset.sample_ids[place])
    teacher, student = tiles_from_array(record["tiles"]), dataset._encoded(place).tiles
    assert [(tile.rows, tile.cols) for tile in (*teacher, *student)] == [(6, 6), (3, 3)]
    for term, part in (("answer_attention", "language_model"), ("visual_columns", "visual_rows")):
        fine = np.array(sink_map(cache, part, teacher)).reshape(3, 2, 3, 2)
        np.testing.assert_allclose(targets[term].sinks, fine.mean(axis=(1, 3)).ravel(), atol=1e-5)
        np.testing.assert_allclose(sink_map(cache, part, student), fine.mean(axis=(1, 3)).ravel(), atol=1e-5)
    batch = dataset.batch([place, (place + 1) % len(dataset)])
    assert batch.targets["answer_attention"].sinks.shape == (len(batch.has_image), 9)
    plain = prepare(
        make_config(cached, tmp_path / "plain", phases=("dft",), dft=dft | {"losses": {"answer_attention": 1.0}})
    )
    assert plain.phases[0].dataset.load(place).targets["answer_attention"].sinks is None
    assert run.fingerprint != plain.fingerprint


def test_the_fingerprints_of_runs_from_before_stay(cached):
    plain = make_config(cached, "out", dft={"losses": {"visual_columns": 1.0}})
    described = describe(plain, {})["dft"]["losses"]
    assert "visual_columns_kind" not in described
    other = make_config(cached, "out", dft={"losses": {"visual_columns": 1.0, "visual_columns_kind": KIND}})
    assert describe(other, {})["dft"]["losses"]["visual_columns_kind"] == KIND


def test_only_losses_with_a_weight_ask_for_sinks_and_a_cache_without_any_is_refused_with_a_remedy(tmp_path):
    assert needed_sinks(LossWeights(answer_kind=KIND, visual_columns_kind=KIND)) == ()
    assert needed_sinks(LossWeights(text_attention=0.5, answer_kind=KIND)) == ("language_model",)
    assert needed_sinks(LossWeights(visual_columns=0.5, visual_columns_kind=KIND)) == ("visual_rows",)
    build_tiny_cache(tmp_path / "words", signals=("logits",), data="shapes:images=1,seed=5")
    cache = open_cache(tmp_path / "words")
    assert read_sinks(cache).maps == {}
    assert sinks_for(cache, LossWeights(logits=1.0), where="phase dft") == {}
    with pytest.raises(
        CacheMismatchError,
        match=r"phase dft: answer_kind=sink_suppressed: .*words: no sinks .*language model.*found in answer_attention or "
        r"text_attention, and the cache holds logits; add it with `teacher-cache extend CACHE .*--signals answer_attention`",
    ):
        sinks_for(cache, LossWeights(answer_attention=1.0, answer_kind=KIND), where="phase dft")
