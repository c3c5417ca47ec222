"""All rows in one loss, from cache to gradient: equal to a live teacher, whatever the split of a step."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from loss_checks import make_objective
from test_cached_dataset import ListDataset, open_joined
from test_equal_student import FixedCapture
from test_objective import gradients, make_student, pool
from tiny_cache import build_tiny_cache

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate, text_rows, visual_keys
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.objective import Shares, step_shares, units_of
from vlm_distill_cache.stage2_student.losses.terms import TERMS
from vlm_distill_cache.stage2_student.training.checks import check_signals

GROUPS = ((0,), (1,))
SIGNALS = ("visual_map", "text_attention")


@pytest.fixture(scope="module")
def scenes():
    """Two pictures and a conversation without one."""
    drawn = open_dataset("shapes:images=2,seed=5")
    text = Sample(sample_id="text", images=(), turns=(Turn(question="what color ?", answer="red"),))
    return ListDataset([drawn[0], text, drawn[1]])


@pytest.fixture(scope="module")
def cached(tmp_path_factory, scenes):
    path = tmp_path_factory.mktemp("all") / "cache"
    return path, build_tiny_cache(path, dataset=scenes, signals=SIGNALS, groups=2)


def reference(student, teacher, scenes):
    """1 - mean over layers of cos(A[:, :N_v]) of a live teacher, pooled by hand, and the student's own maps."""
    encoder = teacher.encoder.with_grid(student.image_grid)
    losses = []
    for position in (0, 2):
        sample = scenes[position]
        _, _, visual, _ = teacher.signals(sample)
        text = teacher.text_rows(sample)  # [X, G, 36]
        batch = collate([encoder(sample)], 0)
        rows = torch.cat([visual_keys(batch), text_rows(batch)], dim=1)
        capture = AttentionCapture(student.language_model)
        with capture.record({"all": AttentionRequest(rows, visual_keys(batch), GROUPS)}) as maps:
            student(**batch.model_inputs())
        for group in range(2):
            target = torch.cat([pool(pool(visual[group]).T).T / 4, pool(text[:, group])])  # [N_v + X, N_v]
            own = maps["all"][0, group]
            assert own.shape == target.shape
            losses.append(1 - F.cosine_similarity(own.flatten(), target.flatten(), dim=0))
    return torch.stack(losses).mean()


def test_the_cached_loss_and_its_gradient_equal_the_papers_formula_with_a_live_teacher(cached, scenes):
    path, teacher = cached
    student = make_student(path, teacher.encoder)
    joined = open_joined(path, dataset=scenes, signals=("all_attention",))
    batch = joined.batch([0, 1, 2])
    assert list(batch.targets) == ["all_attention"]
    objective = make_objective({"all_attention": 1.0}, groups=GROUPS)
    terms = objective(student, AttentionCapture(student.language_model), batch, Shares())
    found = gradients(student, terms.total)
    expected = reference(student, teacher, scenes)
    wanted = gradients(student, expected)
    torch.testing.assert_close(terms.named()["all_attention"], expected, atol=1e-5, rtol=1e-4)
    compared = 0
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        if scale > 1e-6:
            torch.testing.assert_close(found[name], gradient, atol=2e-4 * scale + 1e-7, rtol=1e-3)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("kind", ["sink_filtered", "cosine", "kl", "mse"])
@pytest.mark.parametrize("splits", [[(0,), (1, 2)], [(1,), (2, 0)], [(0,), (1,), (2,)]])
@pytest.mark.slow(quick=2)
def test_losses_and_measures_of_a_step_do_not_depend_on_its_split(cached, scenes, splits, kind):
    path, teacher = cached
    student = make_student(path, teacher.encoder)
    capture = AttentionCapture(student.language_model)
    terms = ("visual_map", "text_attention", "all_attention")
    joined = open_joined(path, dataset=scenes, signals=terms)
    objective = make_objective(
        dict.fromkeys(terms, 1.0),
        groups=GROUPS,
        visual_map_kind=kind,
        answer_kind="kl_with_rest",
    )

    def run(parts):
        batches = [joined.batch(part) for part in parts]
        totals = [sum(counts) for counts in zip(*(units_of(b) for b in batches), strict=True)]
        named = [
            objective(student, capture, batch, share).named()
            for batch, share in zip(batches, step_shares(batches, totals), strict=True)
        ]
        assert len({tuple(values) for values in named}) == 1  # the log has the same columns for all
        summed = {name: sum(values[name] for values in named) for name in named[0]}
        return {name: float(value.detach()) for name, value in summed.items()}, gradients(student, summed["total"])

    whole, whole_gradients = run([(0, 1, 2)])
    split, split_gradients = run(splits)
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-6)
    for name, value in whole_gradients.items():
        torch.testing.assert_close(split_gradients[name], value, atol=1e-4, rtol=1e-3)
    measured = {name for name in whole if name.startswith("sink_")}
    assert measured == ({"sink_pairs", "sink_mass"} if kind == "sink_filtered" else set())
    assert all(0 < whole[name] < 1 for name in measured)


def test_a_map_of_means_reports_the_share_of_pairs_alone(cached, scenes):
    path, teacher = cached
    student = make_student(path, teacher.encoder)
    batch = open_joined(path, dataset=scenes, signals=("visual_map",)).batch([0])
    objective = make_objective({"visual_map": 1.0}, groups=GROUPS, complete=False)
    terms = objective(student, AttentionCapture(student.language_model), batch, Shares())
    assert list(terms.measures) == ["sink_pairs"]
    assert not any(value.requires_grad for value in terms.measures.values())


@pytest.mark.parametrize("reduction", ["published", "sum", "mean"])
def test_published_sums_the_released_loss_over_layers_and_averages_the_others(cached, scenes, reduction):
    path, teacher = cached
    student = make_student(path, teacher.encoder)
    terms = ("text_attention", "visual_map", "all_attention")
    batch = open_joined(path, dataset=scenes, signals=terms).batch([0, 2])

    def losses(chosen, kind):
        objective = make_objective(
            dict.fromkeys(terms, 1.0),
            groups=GROUPS,
            visual_map_kind=kind,
            attention_reduction=chosen,
        )
        capture = AttentionCapture(student.language_model)
        named = objective(student, capture, batch, Shares()).named()
        return {name: float(named[name].detach()) for name in terms}

    for kind in ("sink_filtered", "mse"):
        means, found = losses("mean", kind), losses(reduction, kind)
        for name, value in found.items():
            summed = reduction == "sum" or (
                reduction == "published" and (name, kind) == ("visual_map", "sink_filtered")
            )
            assert value == pytest.approx((2 if summed else 1) * means[name], rel=1e-5)


def test_text_rows_on_a_coarser_grid_than_the_students_tokens_pull_the_map_there(tmp_path, scenes):
    """A 3 x 3 grid of text rows and a student of 6 x 6 tokens: all rows meet on 9 cells, by hand."""
    teacher = build_tiny_cache(tmp_path / "c", dataset=scenes, signals=SIGNALS, grid=3)
    batch = open_joined(tmp_path / "c", dataset=scenes, signals=("all_attention",), grid=(6, 6)).batch([0])
    target = batch.targets["all_attention"]
    _, _, visual, _ = teacher.signals(scenes[0])
    torch.testing.assert_close(target.teacher[0, 0], pool(pool(visual[0]).T).T / 4, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target.text[:, 0], pool(teacher.text_rows(scenes[0])[:, 0]), atol=1e-6, rtol=1e-5)
    assert target.student_pool.sum(dim=1).flatten().tolist() == pytest.approx([4.0] * 9)


def test_a_students_rows_weigh_as_many_tokens_as_the_common_cells_hold(tmp_path, scenes):
    """36 tokens of a student meet 9 cells: each cell's row counts four times, beside text rows that count once."""
    build_tiny_cache(tmp_path / "c", dataset=scenes, signals=SIGNALS, grid=3)
    batch = open_joined(tmp_path / "c", dataset=scenes, signals=("all_attention",), grid=(6, 6)).batch([0])
    target = batch.targets["all_attention"]
    generator = torch.Generator().manual_seed(0)
    visual = torch.rand(1, 1, 36, 36, generator=generator)
    text = torch.rand(1, 1, len(target.text), 36, generator=generator)
    logits = torch.zeros(batch.row_count, 200)
    found = make_objective({"all_attention": 1.0}, groups=((1,),))(
        lambda **_: SimpleNamespace(logits=logits),
        FixedCapture({"visual": visual, "text": text}),
        batch,
        Shares(),
    )
    own = torch.cat([pool(pool(visual[0, 0]).T).T / 4] * 4 + [pool(text[0, 0])])
    teachers = torch.cat([target.teacher[0, 0]] * 4 + [target.text[:, 0]])
    expected = 1 - F.cosine_similarity(own.flatten(), teachers.flatten(), dim=0)
    torch.testing.assert_close(found.total, expected)


def test_the_control_experiment_takes_all_rows_of_another_picture(cached, scenes):
    """Map and text rows come from the other picture; there are as many text rows as the sample has."""
    path, _ = cached
    own, foreign = (
        open_joined(path, dataset=scenes, signals=("all_attention",), shuffle_teacher_images=shuffled)
        for shuffled in (False, True)
    )
    first, other = (joined.batch([0]).targets["all_attention"] for joined in (own, foreign))
    second = own.batch([2]).targets["all_attention"]
    assert torch.equal(other.teacher, second.teacher)
    assert other.text.shape == first.text.shape
    rows = min(len(first.text), len(second.text))
    assert torch.equal(other.text[:rows], second.text[:rows])


def test_all_rows_need_both_signals_and_single_values():
    both = {
        "visual_map": {"codec": "visual_map", "groups": 1, "preset": "blocks"},
        "text_attention": {},
    }
    with pytest.raises(CacheMismatchError, match="phase dft: the loss all_attention needs the value of each pair"):
        TERMS["all_attention"].check_cache(both, LossWeights(all_attention=1.0), "phase dft", None)
    for lacking in both:
        held = {name: codec for name, codec in both.items() if name != lacking}
        cache = SimpleNamespace(plan=SimpleNamespace(teacher={}, signals=held), path="cache", place="cache")
        with pytest.raises(CacheMismatchError, match=f"needs a signal that cache does not hold: {lacking}"):
            check_signals(cache, LossWeights(all_attention=1.0), phase="dft")  # type: ignore[arg-type]


def test_all_that_a_cache_lacks_is_asked_for_at_once():
    cache = SimpleNamespace(plan=SimpleNamespace(teacher={}, signals={"logits": {}}), path="cache", place="cache")
    losses = LossWeights(visual_columns=1.0, all_attention=1.0)
    with pytest.raises(CacheMismatchError) as refused:
        check_signals(cache, losses, phase="dft")  # type: ignore[arg-type]
    build = str(refused.value).rpartition("--signals ")[2].split(",")
    assert set(build) - {"...)"} == {"visual_columns", "visual_map", "text_attention"}
