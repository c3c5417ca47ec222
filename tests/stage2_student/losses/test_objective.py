"""The wiring of losses: equal to a slow reference with a live teacher and eager attention in the loop."""

import gc

import pytest
import torch
import torch.nn.functional as F
from loss_checks import make_objective
from test_cached_dataset import ListDataset, open_joined
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage2_student.losses.logits import tail_bucket_loss
from vlm_distill_cache.stage2_student.losses.objective import Shares, step_shares, units_of
from vlm_distill_cache.stage2_student.students.build import find_student

POSITIONS = (4, 9)
GROUPS = ((1,),)  # middle of the tiny student's three layers


def make_student(path, encoder):
    tokenizer = encoder.tokenizer
    student = find_student(
        "mobilevlm",
        cache_dir=path,
        vocab_size=len(tokenizer),
        image_token_id=encoder.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        size="tiny",
    ).load()
    return student.train()


def gradients(student, total):
    student.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def pool(cells):
    """36 tokens to 9, by hand: sums of 2x2 blocks."""
    return cells.reshape(*cells.shape[:-1], 3, 2, 3, 2).sum((-3, -1)).flatten(-2)


def reference_terms(student, teacher, dataset, kind):
    """Each loss by its formula, sample by sample, from a live teacher and the student's eager attention."""
    student.language_model.set_attn_implementation("eager")
    encoder = teacher.encoder.with_grid(student.image_grid)
    rows, terms = [], []
    for position in POSITIONS:
        dense, answer, visual, _ = teacher.signals(dataset[position])
        batch = collate([encoder(dataset[position])], 0)
        output = student(**batch.model_inputs(), output_attentions=True)
        supervised = batch.labels != IGNORE_INDEX
        logits = output.logits[supervised]
        maps = torch.stack([output.attentions[layer].mean(1)[0] for layer in GROUPS[0]]).mean(0)  # [T, T]
        cells = maps[supervised[0]][:, batch.visual_mask[0]]
        seen = maps[batch.visual_mask[0]][:, batch.visual_mask[0]]
        if kind == "lm":
            values = F.cross_entropy(logits, batch.labels[supervised], reduction="none")
        elif kind == "logits":
            values = (dense.softmax(-1) * (dense.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
        elif kind == "answer_attention":
            target = pool(answer[:, 0])
            mass = target.sum(-1, keepdim=True)
            share = target / mass
            values = mass[:, 0] * (share * (share.log() - (cells / cells.sum(-1, keepdim=True)).log())).sum(-1)
        elif kind == "visual_columns":
            values = 1 - F.cosine_similarity(pool(visual[0].mean(0)), seen.mean(0), dim=-1)[None]
        else:
            target = pool(pool(visual[0]).T).T / 4
            values = 1 - F.cosine_similarity(target.flatten(), seen.flatten(), dim=-1)[None]
        terms.append(values.sum())
        rows.append(len(values))
    return sum(terms) / sum(rows)


@pytest.mark.parametrize("kind", ["lm", "logits", "answer_attention", "visual_columns", "visual_map"])
def test_cached_losses_and_gradients_equal_a_live_teacher_in_the_loop(tiny_cache, kind):
    path, teacher = tiny_cache
    signals = () if kind == "lm" else (kind,)
    batch = open_joined(path, signals=signals).batch(POSITIONS)
    student = make_student(path, teacher.encoder)
    objective = make_objective({kind: 1.0}, groups=GROUPS, visual_map_kind="cosine")
    terms = objective(student, AttentionCapture(student.language_model), batch, Shares())
    found = gradients(student, terms.total)
    expected = reference_terms(student, teacher, open_dataset(DATA), kind)
    wanted = gradients(student, expected)
    torch.testing.assert_close(terms.named()[kind], expected, atol=2e-5, rtol=1e-4)
    compared = 0
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        if scale > 1e-6:
            torch.testing.assert_close(found[name], gradient, atol=2e-4 * scale + 1e-7, rtol=1e-3)
            compared += 1
    assert compared > 10


def test_weights_are_flat_and_the_total_is_their_sum(tiny_cache):
    path, teacher = tiny_cache
    batch = open_joined(path).batch(POSITIONS)
    student = make_student(path, teacher.encoder)
    weights = {"lm": 0.5, "logits": 2.0, "answer_attention": 3.0, "visual_columns": 0.25, "visual_map": 0.125}
    objective = make_objective(weights, groups=GROUPS)
    terms = objective(student, AttentionCapture(student.language_model), batch, Shares()).named()
    torch.testing.assert_close(terms["total"], sum(weight * terms[name] for name, weight in weights.items()))
    losses = ["lm", "logits", "answer_attention", "visual_columns", "visual_map"]
    assert list(terms) == ["total", *losses, "sink_pairs", "sink_mass"]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_the_logit_loss_is_of_the_wanted_kind_and_temperature(tiny_cache, kind):
    path, teacher = tiny_cache
    batch = open_joined(path, signals=("logits",)).batch(POSITIONS)
    student = make_student(path, teacher.encoder)
    objective = make_objective({"logits": 1.0}, logit_kind=kind, temperature=2.0)
    found = objective(student, None, batch, Shares()).total
    supervised = batch.inputs.labels != IGNORE_INDEX
    logits = student(**batch.inputs.model_inputs()).logits[supervised]
    expected = tail_bucket_loss(logits, batch.targets["logits"], kind=kind, temperature=2.0)
    torch.testing.assert_close(found, expected)


def test_recording_attention_leaves_the_logits_bit_identical(tiny_cache):
    path, teacher = tiny_cache
    batch = open_joined(path).batch(POSITIONS)
    student = make_student(path, teacher.encoder)
    plain = make_objective({"lm": 1.0, "logits": 1.0})(student, None, batch, Shares())
    objective = make_objective(dict.fromkeys(("lm", "logits", *batch.targets), 1.0), groups=GROUPS)
    captured = objective(student, AttentionCapture(student.language_model), batch, Shares())
    assert torch.equal(plain.terms["lm"], captured.terms["lm"])


@pytest.mark.parametrize("splits", [[(0,), (1, 2, 3)], [(0, 1), (2,), (3,)]])
def test_a_steps_gradient_does_not_depend_on_how_it_is_split(tmp_path, splits):
    scenes = open_dataset("shapes:images=3,seed=5")
    text = Sample(sample_id="text", images=(), turns=(Turn(question="what color ?", answer="red"),))
    dataset = ListDataset([text, *(scenes[index] for index in range(3))])
    teacher = build_tiny_cache(tmp_path / "c", dataset=dataset)
    joined = open_joined(tmp_path / "c", dataset=dataset)
    student = make_student(tmp_path / "c", teacher.encoder)
    capture = AttentionCapture(student.language_model)
    signals = ("lm", "logits", "answer_attention", "visual_columns", "visual_map")
    objective = make_objective(dict.fromkeys(signals, 1.0), groups=GROUPS)

    def run(parts):
        batches = [joined.batch(part) for part in parts]
        totals = [sum(counts) for counts in zip(*(units_of(b) for b in batches), strict=True)]
        terms = [
            objective(student, capture, batch, share)
            for batch, share in zip(batches, step_shares(batches, totals), strict=True)
        ]
        named = {name: sum(term.named()[name] for term in terms) for name in terms[0].named()}
        return named, gradients(student, named["total"])

    whole, whole_gradients = run([(0, 1, 2, 3)])
    split, split_gradients = run(splits)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=1e-5, rtol=1e-5)
    for name, value in whole_gradients.items():
        torch.testing.assert_close(split_gradients[name], value, atol=1e-4, rtol=1e-3)


def test_a_text_only_batch_has_no_attention_loss_and_the_same_log_columns(tmp_path):
    text = Sample(sample_id="text", images=(), turns=(Turn(question="what color ?", answer="red"),))
    scenes = open_dataset("shapes:images=1,seed=5")
    dataset = ListDataset([text, scenes[0]])
    teacher = build_tiny_cache(tmp_path / "c", dataset=dataset)
    student = make_student(tmp_path / "c", teacher.encoder)
    objective = make_objective({"lm": 1.0, "logits": 1.0, "answer_attention": 1.0}, groups=GROUPS)
    joined = open_joined(tmp_path / "c", dataset=dataset, signals=("logits", "answer_attention"))
    terms = objective(student, AttentionCapture(student.language_model), joined.batch([0]), Shares())
    assert terms.named()["answer_attention"] == 0
    torch.testing.assert_close(terms.total, terms.named()["lm"] + terms.named()["logits"])


def test_several_layer_groups_meet_in_order(tmp_path):
    build_tiny_cache(tmp_path / "c", data="shapes:images=2,seed=5", groups=2, signals=("answer_attention",))
    joined = open_joined(tmp_path / "c", dataset=open_dataset("shapes:images=2,seed=5"), signals=("answer_attention",))
    batch = joined.batch([0, 1])
    assert batch.targets["answer_attention"].teacher.shape[1] == 2


@pytest.mark.parametrize("phase", ["dpt", "dft"])
def test_batches_without_images_train_the_projector_by_nothing_and_keep_ddp_in_step(tmp_path, phase):
    texts = [
        Sample(sample_id=f"text{index}", images=(), turns=(Turn(question="what color ?", answer="red"),))
        for index in range(2)
    ]
    dataset = ListDataset([*texts, open_dataset("shapes:images=1,seed=5")[0]])
    teacher = build_tiny_cache(tmp_path / "c", dataset=dataset, signals=("logits",))
    joined = open_joined(tmp_path / "c", dataset=dataset, signals=("logits",))
    student = make_student(tmp_path / "c", teacher.encoder)
    student.trainable_parameters(phase)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        check_gradients_under_ddp(student, joined)
    finally:
        # The wrapper goes first: were its reducer the last to hold the group, it would join gloo's threads with
        # the interpreter's lock held, and now and then wait for ever.
        gc.collect()
        torch.distributed.destroy_process_group()


def check_gradients_under_ddp(student, joined):
    model = torch.nn.parallel.DistributedDataParallel(student)  # as accelerate wraps it
    projector = [p for name, p in student.named_parameters() if "mm_projector" in name]
    for positions in ([0, 1], [0, 1], [1, 2], [0, 1]):
        student.zero_grad()
        objective = make_objective({"lm": 1.0, "logits": 1.0})
        objective(model, None, joined.batch(positions), Shares()).total.backward()
        assert all(bool(p.grad.any()) == (2 in positions) for p in projector), positions


@pytest.mark.parametrize("losses", [{"lm": 1.0}, {"lm": 0.5, "logits": 2.0}, {"logits": 1.0}])
def test_fused_and_whole_logits_give_the_same_terms_and_gradients(tiny_cache, monkeypatch, losses):
    """Both ways through the student: rows handed on inside the pass, and logits that are held."""
    path, teacher = tiny_cache
    batch = open_joined(path).batch(POSITIONS)
    student = make_student(path, teacher.encoder)
    objective = make_objective(losses)
    fused = objective(student, None, batch, Shares())
    gradient = gradients(student, fused.total)
    monkeypatch.setattr(type(student), "fused_settings", None)
    whole = objective(student, None, batch, Shares())
    for name, value in whole.named().items():
        torch.testing.assert_close(fused.named()[name].detach(), value.detach(), atol=1e-6, rtol=1e-5)
    for name, value in gradients(student, whole.total).items():
        torch.testing.assert_close(gradient[name], value, atol=1e-6, rtol=1e-4)
