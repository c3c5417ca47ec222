"""A cache of single layers trains a student like a cache of the very groups would, for every signal."""

import numpy as np
import pytest
import torch
from loss_checks import make_objective
from test_cached_dataset import open_joined
from test_objective import GROUPS, gradients, make_student
from tiny_cache import build_tiny_cache

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.attention.layers import GroupMatch
from vlm_distill_cache.common.codecs.live import TeacherMap
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.batches.dataset import SampleMemory
from vlm_distill_cache.stage2_student.batches.layers import match_groups, regroup, regroup_map
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.objective import Shares
from vlm_distill_cache.stage2_student.losses.terms import TERMS as ALL_TERMS

DATA = "shapes:images=2,seed=5"
TERMS = ("answer_attention", "text_attention", "visual_columns", "visual_map", "all_attention")
SIGNALS = TERMS[:-1]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """The same teacher of four layers, cached layer by layer, and as the mean over its middle span."""
    folder = tmp_path_factory.mktemp("matching")
    build_tiny_cache(folder / "single", data=DATA, signals=SIGNALS, groups=4, layers="all")
    teacher = build_tiny_cache(folder / "middle", data=DATA, signals=SIGNALS, groups=1)
    return folder, teacher


def test_weights_over_single_layers_give_the_losses_of_the_cached_means(caches):
    folder, teacher = caches
    middle = teacher.groups[0]
    weights = tuple(1 / len(middle) if layer in middle else 0.0 for layer in range(4))
    match = GroupMatch((weights,), GROUPS, teacher.groups)
    student = make_student(folder / "middle", teacher.encoder)
    found = []
    for name, chosen in (("single", match), ("middle", None)):
        dataset = open_joined(folder / name, dataset=open_dataset(DATA), signals=TERMS, match=chosen)
        objective = make_objective(dict.fromkeys(TERMS, 1.0), groups=GROUPS)
        terms = objective(student, AttentionCapture(student.language_model), dataset.batch([0, 1]), Shares())
        values = {key: float(value.detach()) for key, value in terms.named().items()}
        found.append((values, gradients(student, terms.total)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-6)
    for key, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][key], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("matching", ["group", "simple", "adaptive"])
@pytest.mark.parametrize("layers", [None, "early", "middle", "late", "all"])
def test_every_matching_of_a_cache_of_single_layers_trains(caches, matching, layers):
    folder, teacher = caches
    student = make_student(folder / "single", teacher.encoder)
    plan = open_cache(folder / "single").plan
    match = match_groups(plan, student.language_model.config.num_hidden_layers, matching=matching, layers=layers)
    batch = open_joined(folder / "single", dataset=open_dataset(DATA), signals=TERMS, match=match).batch([0])
    groups = {len(target.teacher[0]) for target in batch.targets.values()}
    assert groups == {len(match.student)}
    objective = make_objective(dict.fromkeys(TERMS, 1.0), groups=match.student)
    terms = objective(student, AttentionCapture(student.language_model), batch, Shares())
    assert bool(torch.isfinite(terms.total))
    assert all(float(terms.named()[name].detach()) > 0 for name in TERMS)


def test_phases_of_other_matchings_share_a_memory_and_not_their_samples(caches):
    plan, memory, found = open_cache(caches[0] / "single").plan, SampleMemory(2**30), []
    for matching in ("simple", "adaptive", "simple"):
        match = match_groups(plan, 3, matching=matching, layers="middle")
        dataset = open_joined(
            caches[0] / "single",
            dataset=open_dataset(DATA),
            signals=("visual_columns",),
            match=match,
            memory=memory,
        )
        found.append(dataset.batch([0]).targets["visual_columns"].teacher)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_cache_of_one_mean_refuses_other_matchings(caches):
    plan = open_cache(caches[0] / "middle").plan
    assert match_groups(plan, 3).is_identity
    with pytest.raises(CacheMismatchError, match="build a cache of single layers"):
        match_groups(plan, 3, matching="simple")
    with pytest.raises(CacheMismatchError, match="late layers"):
        match_groups(plan, 3, layers="late")


def test_regrouping_is_a_weighted_sum_over_the_axis_of_groups():
    values = torch.from_numpy(np.random.default_rng(0).random((5, 3, 2), dtype=np.float32))
    match = GroupMatch(((0.5, 0.5, 0.0), (0.0, 0.0, 1.0)), ((0,), (1,)), ((0, 1), (2,)))
    expected = torch.stack([(values[:, 0] + values[:, 1]) / 2, values[:, 2]], dim=1)
    torch.testing.assert_close(regroup(values, match, axis=1), expected)
    assert regroup(values, None, axis=1) is values


def test_chosen_groups_keep_their_exact_mask_and_new_means_get_one_of_their_own():
    maps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)).tril()
    whole = TeacherMap.from_maps(maps)
    odd = TeacherMap(whole.values, ~whole.kept, complete=False)  # a mask that no values would give
    chosen = GroupMatch(((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)), ((0,), (1,)), ((2,), (0,)))
    found = regroup_map(odd, chosen, content=None, wanted_by="sample 'a'")
    assert torch.equal(found.kept, ~whole.kept[[2, 0]])
    assert torch.equal(found.values, whole.values[[2, 0]])
    assert not found.complete
    mean = GroupMatch(((0.5, 0.5, 0.0),), ((0,),), ((0, 1),))
    found = regroup_map(whole, mean, content=None, wanted_by="sample 'a'")
    expected = TeacherMap.from_maps((maps[:1] + maps[1:2]) / 2)
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.kept, expected.kept)
    with pytest.raises(CacheMismatchError, match="sample 'a': a mean over layers"):
        regroup_map(odd, mean, content=None, wanted_by="sample 'a'")
    plan = {"visual_map": {"codec": "visual_map", "groups": 3, "preset": "compact"}}
    check, losses = ALL_TERMS["visual_map"].check_cache, LossWeights(visual_map=1.0)
    check(plan, losses, "phase dft", chosen)
    with pytest.raises(CacheMismatchError, match="phase dft: a mean over layers"):
        check(plan, losses, "phase dft", mean)
