"""Requests are answered as each would be alone, whatever is packed or batched with it."""

import numpy as np
import PIL.Image
import pytest
import torch
from test_library_student import PICTURES, encoder_of
from tiny_families import save_tiny

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ModelError, SampleError
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.stage2_student.students.library import open_library_student
from vlm_distill_cache.stage2_student.students.model import packs_conversations
from vlm_distill_cache.stage2_student.suite import ask as asking
from vlm_distill_cache.stage2_student.suite.ask import ask
from vlm_distill_cache.stage2_student.suite.requests import LEAST, Generate, Weigh

CAPTIONS = ("a red circle", "two", "a blue square left of it")


class WithoutWidth:
    """A picture that no processor can resize."""

    name = "none"

    def load(self) -> PIL.Image.Image:
        return PIL.Image.new("RGB", (0, 9))


# Of each way of packing one: all behind the picture, none because the picture sees the question.
@pytest.fixture(scope="module", params=["llava", "paligemma"])
def student(request, tmp_path_factory):
    opened = open_library_student(save_tiny(request.param, tmp_path_factory.mktemp("asked") / request.param))
    return opened.model.eval(), encoder_of(opened)


@torch.no_grad()
def alone(model, encoder, request: Weigh) -> list[list[float]]:
    """One sequence at a time through the library's own forward pass, one row after another."""
    found = []
    for answer in request.answers:
        images = () if request.image is None else (request.image,)
        turn = Turn(question=request.question, answer=answer)
        batch = collate([encoder(Sample(sample_id="s", images=images, turns=(turn,)))], 0)
        logits = model.model(**model.model_inputs(batch), use_cache=False).logits[0].double()
        rows = [row for row in range(len(logits)) if int(batch.labels[0, row]) != IGNORE_INDEX]
        found.append([sum(float(logits[row].log_softmax(0)[batch.labels[0, row]]) for row in rows), len(rows)])
    return found


@torch.no_grad()
def generated(model, encoder, request: Generate) -> str:
    prompt = build_prompt(encoder, request.image, request.question)
    inputs = model.generation_inputs([prompt], 0, torch.device("cpu"))
    made = model.generate(
        **inputs, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=encoder.end_token_ids, pad_token_id=0
    )
    return encoder.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True).strip()


def test_each_result_is_that_of_its_request_alone(student, tmp_path, monkeypatch):
    model, encoder = student
    monkeypatch.setattr(asking, "MOST_SEQUENCES", 3)
    monkeypatch.setattr(asking, "MOST_PACKED", 4)
    first, second, third = PICTURES
    missing = ImageFile(tmp_path / "nowhere.png")
    requests = [
        Weigh(image=first, question="", answers=CAPTIONS),
        Generate(image=second, question="what is it ?", max_tokens=3),
        Weigh(image=second, question="is it red ?", answers=("yes", "no")),
        Generate(image=missing, question="what ?"),
        Weigh(image=first, question="is it red ?", answers=("no", "yes")),
        Weigh(image=missing, question="", answers=("one",)),
        Generate(image=first, question="how many red circles are there ?", max_tokens=5),
        Weigh(image=third, question="", answers=("a circle", "")),
        Generate(image=third, question="where ?", max_tokens=3),
        Weigh(image=third, question="", answers=("a circle",)),
        Weigh(image=missing, question="is it red ?", answers=("yes", "no"), optional=True),
        Weigh(image=WithoutWidth(), question="", answers=("one", "two")),
        Generate(image=WithoutWidth(), question="what ?"),
    ]
    found = ask(model, encoder, requests)
    faults = {3: "nowhere.png", 5: "nowhere.png", 7: "answer of turn 1 is empty", 11: "shown", 12: "shown"}
    for place, (request, result) in enumerate(zip(requests, found, strict=True)):
        if isinstance(request, Weigh) and request.optional:
            assert result == []
        elif place in faults:
            assert isinstance(result, SampleError)
            assert faults[place] in str(result)
        elif isinstance(request, Weigh):
            np.testing.assert_allclose(result, alone(model, encoder, request), atol=1e-3, rtol=1e-4)
        else:
            assert result == generated(model, encoder, request)
    assert ask(model, encoder, requests)[0] == found[0]  # the same requests, the same numbers


def test_captions_of_one_picture_go_through_the_model_at_once(student, monkeypatch):
    model, encoder = student
    lengths = []

    def count(model, samples, pad_id):
        lengths.extend(len(np.unique(sample.segment_ids)) for sample in samples)
        return log_probs(model, samples, pad_id)

    log_probs = asking.answer_log_probs
    monkeypatch.setattr(asking, "answer_log_probs", count)
    ask(model, encoder, [Weigh(image=PICTURES[0], question=text, answers=CAPTIONS[:2]) for text in ("", "what ?")])
    assert lengths == ([5] if packs_conversations(model) else [1] * 4)  # the shared prefix, and each conversation


def test_what_is_too_long_together_is_asked_apart(student, monkeypatch):
    model, encoder = student
    request = Weigh(image=PICTURES[0], question="", answers=CAPTIONS)
    sample = Sample(sample_id="s", images=(PICTURES[0],), turns=(Turn(question="", answer=CAPTIONS[2]),))
    monkeypatch.setitem(vars(encoder), "max_length", len(encoder(sample)))
    np.testing.assert_allclose(ask(model, encoder, [request])[0], alone(model, encoder, request), atol=1e-3, rtol=1e-4)


def test_a_model_of_no_numbers_is_no_score(student, monkeypatch):
    model, encoder = student
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        kept = weight.clone()
        weight.fill_(float("nan"))
    try:
        for request in (
            Weigh(image=PICTURES[0], question="", answers=("one",)),
            Generate(image=PICTURES[0], question="what ?", max_tokens=2),
        ):
            with pytest.raises(ModelError, match="not numbers"):
                ask(model, encoder, [request])
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_what_cannot_be_said_at_all_has_a_number(student, monkeypatch):
    """JSON has no infinity."""
    model, encoder = student
    monkeypatch.setattr(
        asking, "answer_log_probs", lambda model, samples, pad: [(np.array([-np.inf]), np.array([0])) for _ in samples]
    )
    assert ask(model, encoder, [Weigh(image=None, question="what ?", answers=("one",))]) == [[[LEAST, 1]]]
