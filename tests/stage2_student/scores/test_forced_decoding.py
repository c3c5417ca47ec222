"""Answers that are dictated token by token: as they were decoded, by beams that swap their visual tokens, too."""

import pytest
import torch
from decoding_models import NEW, decode, open_with_prompts

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.stage2_student.scores.evaluate import answer_log_probs
from vlm_distill_cache.stage2_student.scores.forced import forced_decoding, prompt_and_answer


@pytest.mark.parametrize("name", ["mobilevlm_v2", "qwen2_vl"])
@pytest.mark.slow(quick=("qwen2_vl",))
def test_dictated_answers_are_as_likely_as_when_they_were_found(name, tmp_path):
    opened = open_with_prompts(name, tmp_path / name)
    change_model(opened.model, opened.parts, decoding_tokens={"keep": 2, "by": "shift", "shift_threshold": 1.0})
    prompt = opened.inputs["input_ids"].shape[1]

    def dictate(answers):
        return forced_decoding(opened.model, opened.encoder, opened.prompts, answers, inputs=opened.inputs_of)

    greedy = decode(opened.model, opened.inputs)
    answers = greedy.sequences[:, prompt:]
    found = dictate(answers.tolist())
    logits = torch.stack(greedy.logits, dim=1)
    expected = logits.log_softmax(-1).gather(2, answers[:, :, None])[:, :, 0]
    torch.testing.assert_close(found.log_probs, expected)
    assert torch.equal(found.best, logits.argmax(-1))
    assert found.events.any(dim=1).tolist() == [True, True, False]
    assert torch.equal(found.events, found.swapped > 0)

    short = dictate([answers[0, :1].tolist(), answers[1].tolist(), answers[2, :3].tolist()])
    assert short.real.sum(1).tolist() == [1, NEW, 3]
    assert torch.equal(short.log_probs, found.log_probs * short.real)
    torch.testing.assert_close(short.means[2], expected[2, :3].mean())
    assert short.best[0, 1:].tolist() == [-1] * (NEW - 1)
    assert short.agreement(short).tolist() == [1.0, 1.0, 1.0]

    change_model(opened.model, opened.parts, decoding_tokens={"keep": 2, "by": "shift", "shift_threshold": 0.9})
    beams = decode(opened.model, opened.inputs, num_beams=3, output_scores=True)
    assert beams.beam_indices.diff(dim=1).any()  # some go on from others
    found = dictate(beams.sequences[:, prompt:].tolist())
    torch.testing.assert_close(found.log_probs.sum(1), beams.sequences_scores * NEW, atol=1e-4, rtol=1e-4)
    assert found.events.any()

    change_model(opened.model, opened.parts, decoding_tokens=None)
    full = dictate(answers.tolist())
    assert full.agreement(dictate(answers.tolist())).min() == 1
    assert not full.events.any()
    torch.testing.assert_close(full.log_probs[2], expected[2])
    assert not torch.allclose(full.log_probs[:2], expected[:2], atol=1e-3)
    with pytest.raises(ModelError, match="3 prompts and answers of \\[1, 0, 1\\] tokens"):
        dictate([[5], [], [5]])


@torch.no_grad()
def test_with_all_tokens_dictated_answers_are_as_likely_as_in_one_pass(tmp_path):
    opened = open_with_prompts("llava", tmp_path / "llava")
    samples = [
        Sample(
            sample_id="talk",
            images=(),
            turns=(Turn(question="Hi", answer="ho"), Turn(question="And?", answer="no more")),
        ),
        Sample(sample_id="word", images=(), turns=(Turn(question="Is it?", answer="yes"),)),
    ]
    prompts, answers = zip(*(prompt_and_answer(opened.encoder, sample) for sample in samples), strict=True)
    assert opened.encoder.tokenizer.decode(answers[0]).endswith(" no more</s>")
    found = forced_decoding(opened.model, opened.encoder, prompts, answers, inputs=opened.inputs_of)
    whole = answer_log_probs(opened.model, [opened.encoder(sample) for sample in samples], 0)
    for row, (log_probs, _) in enumerate(whole):
        count = len(answers[row])
        torch.testing.assert_close(
            found.log_probs[row, :count].double(), torch.tensor(log_probs[-count:]), atol=1e-4, rtol=1e-4
        )
    with pytest.raises(ModelError, match="'talk' has 2 independent turns"):
        prompt_and_answer(
            opened.encoder, Sample(sample_id="talk", images=(), turns=samples[0].turns, independent_turns=True)
        )
