"""Losses of a student that feeds some visual tokens are those on the cells that it sees, the others taken away."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from loss_checks import make_objective
from test_equal_student import GROUPS, TERMS, TEXT_ROWS, TOKENS, Scene, make_maps

from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.models.tokens.fewer_tokens import FewerTokens
from vlm_distill_cache.common.models.tokens.token_settings import Settings
from vlm_distill_cache.stage2_student.batches.signals import collate_samples
from vlm_distill_cache.stage2_student.losses.attention import (
    all_attention_loss,
    answer_attention_loss,
    visual_columns_loss,
    visual_map_loss,
)
from vlm_distill_cache.stage2_student.losses.fed_tokens import fed_shares, refuse_fewer_tokens
from vlm_distill_cache.stage2_student.losses.objective import Shares

SAMPLES = 2


class Student:
    """Says what it is told, and feeds some tokens."""

    def __init__(self, stands_for, logits):
        selector = FewerTokens.__new__(FewerTokens)
        selector.settings = Settings(keep=0.5, by="random")
        selector.decoder = SimpleNamespace(wrappers=(selector,), stands_for=stands_for)
        self.selector, self.logits = selector, logits

    def modules(self):
        return [self.selector.decoder]

    def __call__(self, **_):
        return SimpleNamespace(logits=self.logits)


class Capture:
    """Records the same maps whatever runs."""

    def __init__(self, maps):
        self.maps = maps

    @contextmanager
    def record(self, requests):
        assert all(request.row_weights is None for request in requests.values())
        yield self.maps | {"columns": self.maps["visual"]}


@pytest.mark.parametrize(("answer_kind", "map_kind"), [("kl", "sink_filtered"), ("cosine", "kl"), ("relative", "mse")])
def test_losses_are_those_of_the_cells_that_are_seen(answer_kind, map_kind):
    scene = Scene("square", [(72, 72)] * SAMPLES)
    batch = collate_samples(scene.samples, TERMS, pad_token_id=0)
    fed = torch.rand(SAMPLES, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.6
    stands = torch.arange(batch.inputs.input_ids.shape[1]).repeat(SAMPLES, 1)
    stands.scatter_(1, batch.keys, torch.where(fed, batch.keys, -1))
    maps = make_maps(SAMPLES, scene.rows, seed=9)
    objective = make_objective(
        dict.fromkeys(TERMS, 1.0), groups=((0,),) * GROUPS, answer_kind=answer_kind, visual_map_kind=map_kind
    )
    found = objective(Student(stands, scene.logits), Capture(maps), batch, Shares()).terms

    def answers(name, rows):
        """Of one sample, on the cells that it sees: losses of its rows are means over the batch's."""
        total, count = 0.0, 0
        for b in range(SAMPLES):
            student, teacher = (
                side[name][b][:, :, fed[b]].transpose(0, 1) for side in (maps, scene.maps)
            )  # [R, G, cells]
            target = RowAttention(teacher, teacher.sum(-1))
            total += float(answer_attention_loss(student, target, kind=answer_kind)) * rows
            count += rows
        return total / count

    means = {"visual_columns": 0.0, "visual_map": 0.0, "all_attention": 0.0}
    for b in range(SAMPLES):
        pick = fed[b]
        student, teacher = (side["visual"][b : b + 1][:, :, pick][..., pick] for side in (maps, scene.maps))
        # The teacher's half of the sink filter is that of its whole map, as it was cached.
        whole = TeacherMap.from_maps(scene.maps["visual"][b : b + 1])
        target = TeacherMap(teacher, whole.kept[:, :, pick][..., pick])
        reduction = "sum" if map_kind == "sink_filtered" else "mean"
        columns = scene.maps["visual"][b : b + 1].mean(2)[..., pick]  # cached: the mean over all rows
        means["visual_columns"] += float(visual_columns_loss(student.mean(2), columns)) / SAMPLES
        means["visual_map"] += float(visual_map_loss(student, target, kind=map_kind, reduction=reduction)) / SAMPLES
        texts = [side["text"][b].transpose(0, 1)[..., pick] for side in (maps, scene.maps)]
        means["all_attention"] += float(
            all_attention_loss(
                student, texts[0], teacher, texts[1], row_weights=torch.ones(1, int(pick.sum())),
                text_sample=torch.zeros(TEXT_ROWS, dtype=torch.int64),
            )
        ) / SAMPLES  # fmt: skip
    expected = means | {
        "answer_attention": answers("answer", scene.rows),
        "text_attention": answers("text", TEXT_ROWS),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=2e-4), name


class WeightedCapture(Capture):
    """Records sums where they are asked for."""

    @contextmanager
    def record(self, requests):
        weights = requests["columns"].row_weights
        yield self.maps | {"columns": (self.maps["visual"] * weights[:, None, :, None]).sum(dim=2, keepdim=True)}


def test_losses_of_a_student_that_keeps_all_are_those_of_the_plain_one_bit_for_bit():
    scene = Scene("square", [(72, 72)] * SAMPLES)
    batch = collate_samples(scene.samples, TERMS, pad_token_id=0)
    objective = make_objective(dict.fromkeys(TERMS, 1.0), groups=((0,),) * GROUPS)
    maps, student = make_maps(SAMPLES, scene.rows, seed=9), Student(None, scene.logits)
    found = []
    for settings in (Settings(keep=TOKENS, by="random"), None):
        student.selector.settings = settings
        found.append(objective(student, WeightedCapture(maps), batch, Shares()))
    assert torch.equal(found[0].total, found[1].total)
    assert all(torch.equal(value, found[1].terms[name]) for name, value in found[0].terms.items())


def test_a_pooled_token_has_the_mean_of_what_it_stands_for_and_others_have_nothing():
    stands = torch.tensor([[0, 1, 1, -1, 4, 5]])
    student = Student(stands, None)
    shares = fed_shares(student, torch.tensor([[1, 2, 3, 4, -1]]))
    expected = torch.zeros(5, 5)
    expected[0, :2] = 0.5
    expected[3, 3] = 1
    assert torch.equal(shares[0], expected)
    student.selector.decoder.stands_for = None
    assert fed_shares(student, torch.tensor([[1, 2, -1]])) is None
    student.selector.settings = None
    assert fed_shares(student, torch.tensor([[1]])) is None


def test_losses_at_every_visual_token_are_refused():
    refuse_fewer_tokens(["lm", "logits", "hidden", "answer_attention", "visual_map"], "here")
    for name in ("visual_hidden", "projector_output", "visual_logits"):
        with pytest.raises(ConfigError, match=rf"here: the loss {name} compares every .* PHASE.losses.{name}=0"):
            refuse_fewer_tokens(["lm", name], "here")
