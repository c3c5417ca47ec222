"""Scores of any family are those of one plain sequence at a time, by the library's own forward pass and `generate`."""

import numpy as np
import pytest
import torch
from test_library_student import PICTURES, encoder_of
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.sample import CaptionPair, EvaluationSet, Question, Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.data.text.generation import pad_token_id
from vlm_distill_cache.stage2_student.scores.evaluate import answer_log_probs, encode_pair, evaluate_model
from vlm_distill_cache.stage2_student.students.library import open_library_student
from vlm_distill_cache.stage2_student.students.model import packs_conversations

PAIRS = tuple(
    CaptionPair(item_id=str(index), image=picture, right=right, wrong=wrong, kind="k")
    for index, (picture, right, wrong) in enumerate(
        zip(
            PICTURES,
            ("a red circle", "two", "left of it"),
            ("a blue one", "five squares", "right"),
            strict=True,
        )
    )
)


# Of each scheme of positions and masks one; generation of all families is compared in test_library_student.
GENERATING = ("qwen2_5_vl", "smolvlm", "paligemma")


@pytest.fixture(scope="module", params=list(TINY))
def student(request, tmp_path_factory):
    opened = open_library_student(save_tiny(request.param, tmp_path_factory.mktemp("scored") / request.param))
    opened.model.eval()
    return opened, encoder_of(opened)


@torch.no_grad()
def alone(model, encoder, picture, caption) -> float:
    """Log-probability of a caption: one sequence, one row after the other, dense softmax."""
    sample = Sample(sample_id="s", images=(picture,), turns=(Turn(question="", answer=caption),))
    batch = collate([encoder(sample)], 0)
    logits = model.model(**model.model_inputs(batch), use_cache=False).logits[0].double()
    rows = [row for row in range(len(logits)) if int(batch.labels[0, row]) != IGNORE_INDEX]
    return sum(float(logits[row].log_softmax(0)[batch.labels[0, row]]) for row in rows)


@pytest.mark.slow(quick=("llava", "qwen2_5_vl", "smolvlm"))
def test_captions_that_share_a_picture_score_as_each_alone(student):
    opened, encoder = student
    packed = packs_conversations(opened.model)
    encoded = [sample for pair in PAIRS for sample in encode_pair(encoder, pair, packed=packed)]
    assert len(encoded) == len(PAIRS) * (1 if packed else 2)
    with torch.no_grad():
        scored = answer_log_probs(opened.model, encoded, pad_token_id(encoder))
    found = [
        float(scores[owner == segment].sum()) for scores, owner in scored for segment in sorted(set(owner.tolist()))
    ]
    expected = [
        alone(opened.model, encoder, pair.image, caption) for pair in PAIRS for caption in (pair.right, pair.wrong)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("student", GENERATING, indirect=True)
def test_an_evaluation_matches_its_parts_asked_one_by_one(student, monkeypatch):
    """Greedy answers of the library's `generate` on unpadded prompts are the gold: exact match must be full marks."""
    opened, encoder = student
    model, questions = opened.model, []
    asked = list(zip(PICTURES[:2], ("what ?", "how many of them ?"), strict=True))

    def generate(picture, text, ends):
        prompt = build_prompt(encoder, picture, text)
        inputs = model.generation_inputs([prompt], 0, torch.device("cpu"))
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=ends, pad_token_id=0)
        return made[0, len(prompt) :].tolist()

    # Untrained students never stop: what they say in the fifth place ends their answers from here on.
    ends = encoder.end_token_ids + [generate(*question, encoder.end_token_ids)[:5][-1] for question in asked]
    monkeypatch.setitem(vars(encoder), "end_token_ids", ends)
    for index, (picture, text) in enumerate(asked):
        answer = encoder.tokenizer.decode(generate(picture, text, ends), skip_special_tokens=True).strip()
        questions.append(Question(item_id=str(index), image=picture, question=text, answer=answer, kind="q"))
    report = evaluate_model(
        model, encoder, EvaluationSet(pairs=PAIRS, questions=tuple(questions)), batch_size=2, resamples=10
    )
    likelier = [
        alone(model, encoder, pair.image, pair.right) > alone(model, encoder, pair.image, pair.wrong) for pair in PAIRS
    ]
    assert report.scores["likelihood"].value == pytest.approx(np.mean(likelier))
    assert report.scores["questions"].value == 1.0
    assert 0 <= report.scores["letters/likelihood"].value <= 1
