"""Padded vocabularies: teacher and student have rows that no word of their tokenizer belongs to, each its own number."""

import json

import numpy as np
import pytest
import torch
from train_runs import make_config
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage2_student.losses.objective import Shares
from vlm_distill_cache.stage2_student.run import load_run_config, run
from vlm_distill_cache.stage2_student.students.build import find_student
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.training.preparation import prepare

WORDS = len(load_tokenizer())
TEACHER_EXTRA = 200  # together more than the 255 entries that a cached row holds at most
POSITIONS = (0, 3, 5)


def save_padded(source, extra, folder, *, scale=1.0):
    """A LLaVA with `extra` rows more than its tokenizer has words; the larger their scale, the oftener they are said."""
    model = LlavaForConditionalGeneration.from_pretrained(source)
    model.resize_token_embeddings(WORDS + extra, mean_resizing=False)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        noise = torch.randn(extra, rows.shape[1], generator=torch.Generator().manual_seed(extra))
        rows[WORDS:] = scale * rows[:WORDS].std() * noise
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    load_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def padded(tiny_llava, tmp_path_factory):
    """A teacher that often says tokens that do not exist."""
    return save_padded(tiny_llava, TEACHER_EXTRA, tmp_path_factory.mktemp("padded") / "teacher", scale=1.5)


@pytest.fixture
def cache(padded, build_cache, tmp_path):
    build_cache(tmp_path / "cache", teacher=str(padded), limit=6, logits="exact")
    return tmp_path / "cache"


def save_student(kind, extra, tiny_llava, cache, folder):
    """A student with `extra` rows more than its tokenizer has words."""
    if kind == "llava":
        return save_padded(tiny_llava, extra, folder)
    image_token_id = load_tokenizer().convert_tokens_to_ids("<image>")
    student = find_student(
        "mobilevlm", cache_dir=cache, vocab_size=WORDS + extra, size="tiny", image_token_id=image_token_id
    ).load()
    student.save_pretrained(folder)
    return folder


def dense_rows(model, encoder, dataset):
    """Any model's own logits `[A, V]` of the supervised rows, sample by sample, the whole vocabulary."""
    for position in POSITIONS:
        batch = collate([encoder(dataset.sample(position))], 0)
        yield model(**model_inputs_of(model, batch)).logits[batch.labels != IGNORE_INDEX]


def kept_tokens(cache, sample_ids):
    """The token ids that a cache lists in each row, without the padding of rows."""
    opened = open_cache(cache)
    for sample_id in sample_ids:
        record = opened.read(sample_id)
        yield from np.split(record["token_ids"], np.cumsum(record["entry_count"].astype(int))[:-1])


def dense_loss(teacher, student, kept):
    """Forward KL over the listed tokens that the student has, and one bucket for all else: row by row."""
    losses = []
    for p, log_q, ids in zip(teacher.softmax(-1), student.log_softmax(-1), kept, strict=True):
        known = [int(token) for token in ids if token < len(log_q)]
        others = np.setdiff1d(np.arange(len(log_q)), known)
        p_rest = p[np.setdiff1d(np.arange(len(p)), known)].sum()
        listed = p[known] * (p[known].log() - log_q[known])
        losses.append(listed.sum() + p_rest * (p_rest.log() - log_q[others].logsumexp(0)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("extra", [0, 17, 300])  # the teacher has 200
@pytest.mark.parametrize("kind", ["mobilevlm", "llava"])
@pytest.mark.slow
def test_the_loss_is_that_of_the_dense_teacher_whatever_the_padding_of_both(
    kind, extra, padded, tiny_llava, cache, tmp_path
):
    folder = save_student(kind, extra, tiny_llava, cache, tmp_path / "student")
    config = make_config(
        cache, tmp_path / "run", student=str(folder), data=None, device="cpu", phases=("dft",),
        dft={"steps": 1, "batch_size": 4, "losses": {"logits": 1.0}},
    )  # fmt: skip
    prepared = prepare(config)
    phase, student = prepared.phases[0], prepared.student.eval()
    assert student.get_output_embeddings().weight.shape[0] == WORDS + extra
    model = LlavaForConditionalGeneration.from_pretrained(padded).eval()
    with torch.no_grad():
        teacher = torch.cat(list(dense_rows(model, prepared.encoder.with_grid((6, 6)), phase.dataset)))
        found = phase.objective(student, None, phase.dataset.batch(POSITIONS), Shares()).terms["logits"]
        own = torch.cat(list(dense_rows(student, prepared.encoder, phase.dataset)))
    kept = list(kept_tokens(cache, [phase.dataset.sample_ids[position] for position in POSITIONS]))
    beyond = sum(int((ids >= WORDS + extra).sum()) for ids in kept)
    assert (beyond > 0) == (extra < TEACHER_EXTRA)
    torch.testing.assert_close(found.double(), dense_loss(teacher.double(), own.double(), kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mobilevlm", "llava"])
@pytest.mark.slow
def test_a_student_of_another_padding_is_distilled_scored_and_keeps_its_rows(kind, tiny_llava, cache, tmp_path):
    folder = save_student(kind, 17, tiny_llava, cache, tmp_path / "student")
    options = [
        f"student='{folder}'", f"output='{tmp_path / 'run'}'", "phases=[dft]", "dft.steps=2", "dft.batch_size=4",
        "evaluation.limit=2", "evaluation.agreement_samples=4", "evaluation.overlays=1", "device=cpu",
    ]  # fmt: skip
    summary = run(load_run_config(None, options, cache=cache))
    assert "questions, exact match" in summary.table
    assert "top-1 agrees with teacher" in summary.table
    final = tmp_path / "run" / "distilled" / "final"
    stored = json.loads((final / "config.json").read_text())
    assert stored["text_config"]["vocab_size"] == WORDS + 17
    assert json.loads((final / "distillation.json").read_text())["vocabulary"]["entries_beyond"] > 0
    assert "tokens beyond the student" in summary.report.read_text()
