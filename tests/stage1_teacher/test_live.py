"""A live teacher in stage two's loop: it says what its cache holds, and a model that is given is its own best student."""

from dataclasses import replace

import pytest
import torch
from family_caches import build
from tiny_families import TINY
from transformers import AutoModelForImageTextToText

import vlm_distill_cache as vdc
from vlm_distill_cache.data.families.models import open_family_model

WEIGHTS = {"logits": 1.0, "answer_attention": 1.0, "visual_columns": 1.0}
SHOWN = ("qwen2_5_vl", "smolvlm", "paligemma")  # positions, tiles and masks of their own


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for name in sorted(value) for tensor in tensors_of(value[name])]
    return tensors_of(vars(value)) if hasattr(value, "__dataclass_fields__") else []


@pytest.mark.parametrize("name", SHOWN)
def test_a_model_that_is_given_meets_itself_cached_and_live(name, family_cache, family_data):
    cache = family_cache(name)
    folder = cache.path.parent / "teacher"
    opened = open_family_model(folder)
    before = {key: value.clone() for key, value in opened.model.state_dict().items()}
    dataset = vdc.DistillationDataset(
        cache.path, opened.model, vdc.LossWeights(lm=1.0, **WEIGHTS), data=family_data,
        processor=(opened.tokenizer, opened.processor),
    )  # fmt: skip
    loss = vdc.DistillationLoss(dataset)
    positions = range(len(dataset))
    cached = loss(dataset.student, dataset.collate([dataset[place] for place in positions]))
    options = {"signals": tuple(cache.signals), "dtype": "float32", "fidelity_samples": 0}
    teacher = vdc.LiveTeacher(vdc.BuildConfig(teacher=folder, data=family_data, cache=cache.path, **options))
    live = loss(dataset.student, dataset.live_batch(positions, teacher))

    assert dataset.student is opened.model
    assert all(torch.equal(value, before[key]) for key, value in dataset.student.state_dict().items())
    assert live.terms["lm"].item() == cached.terms["lm"].item() > 0.1
    for term in WEIGHTS:  # a model and itself: what is left is what the codecs lose, and rounding
        assert abs(cached.terms[term].item()) < 3e-3, term
        assert abs(live.terms[term].item()) < 1e-5, term
    live.total.backward()  # through what was made without gradients


def test_of_a_family_that_is_not_listed_logits_are_learnt(unlisted_teacher, family_data, tmp_path):
    cache = build(unlisted_teacher, family_data, tmp_path / "cache", signals=("logits",), fidelity_samples=0)
    model = AutoModelForImageTextToText.from_pretrained(unlisted_teacher)
    dataset = vdc.DistillationDataset(
        cache, model, vdc.LossWeights(logits=1.0), data=family_data, processor=unlisted_teacher
    )
    config = vdc.BuildConfig(teacher=unlisted_teacher, data=family_data, cache=cache.path, signals=("logits",))
    live = dataset.live_batch(range(len(dataset)), vdc.LiveTeacher(config))
    for batch in (live, dataset.collate([dataset[place] for place in range(len(dataset))])):
        losses = vdc.DistillationLoss(dataset)(model, batch)
        assert abs(losses.terms["logits"].item()) < 1e-4
        losses.total.backward()


@pytest.mark.slow
def test_live_signals_are_of_the_types_of_cached_ones_and_near_them(build_cache, tiny_llava, tmp_path):
    signals = tuple(TERMS_OF_SIGNALS)
    build_cache(tmp_path / "cache", signals=signals, hidden_layers=(0, 2, -1))
    dataset = vdc.DistillationDataset(
        tmp_path / "cache", tiny_llava, vdc.LossWeights(**{TERMS_OF_SIGNALS[name]: 1.0 for name in signals})
    )
    teacher = vdc.LiveTeacher(
        vdc.BuildConfig(
            teacher=tiny_llava,
            template="short",
            limit=10,
            cache=tmp_path / "cache",
            signals=signals,
            hidden_layers=(0, 2, -1),
        )
    )
    live = dataset.live_batch(dataset.sample_ids[:6], teacher)
    cached = dataset.collate([dataset[name] for name in dataset.sample_ids[:6]])
    assert live.targets.keys() == cached.targets.keys() == set(TERMS_OF_SIGNALS.values())
    for name, target in cached.targets.items():
        assert type(live.targets[name]) is type(target)
        for now, then in zip(tensors_of(live.targets[name]), tensors_of(target), strict=True):
            assert (now.shape, now.dtype) == (then.shape, then.dtype), name
            if not now.is_floating_point():  # tokens, and which entries and pairs are kept
                assert torch.equal(now, then), name
                continue
            assert torch.equal(now.isfinite(), then.isfinite()), name
            torch.testing.assert_close(now[now.isfinite()], then[now.isfinite()], atol=0.03, rtol=0.06, msg=name)
    now, then = (vdc.DistillationLoss(dataset)(dataset.student, batch) for batch in (live, cached))
    torch.testing.assert_close(now.total, then.total, atol=2e-3, rtol=0.02)


TERMS_OF_SIGNALS = {
    "logits": "logits", "answer_attention": "answer_attention", "text_attention": "text_attention",
    "visual_columns": "visual_columns", "visual_map": "visual_map", "hidden": "hidden", "visual_hidden": "visual_hidden",
    "projector_output": "projector_output", "visual_logits": "visual_logits",
}  # fmt: skip


def test_another_teacher_than_the_caches_is_refused_by_the_sample(build_cache, tiny_llava, tmp_path):
    build_cache(tmp_path / "cache", signals=("logits", "answer_attention"))
    config = vdc.BuildConfig(
        teacher=tiny_llava, template="short", limit=10, cache=tmp_path / "cache", signals=("logits", "answer_attention")
    )
    dataset = vdc.DistillationDataset(tmp_path / "cache", tiny_llava, vdc.LossWeights(logits=1.0, answer_attention=1.0))
    first = dataset.sample_ids[0]
    with pytest.raises(vdc.CacheMismatchError, match="the live teacher has template"):
        dataset.live_batch([0], vdc.LiveTeacher(replace(config, template="vicuna_v1")))
    with pytest.raises(vdc.CacheMismatchError, match=rf"(?s){first}.*says nothing of answer_attention"):
        dataset.live_batch([0], vdc.LiveTeacher(replace(config, signals=("logits",))))
    with pytest.raises(vdc.CacheMismatchError, match="grid"):
        dataset.live_batch([0], vdc.LiveTeacher(replace(config, grid=3)))


assert set(SHOWN) <= set(TINY)
