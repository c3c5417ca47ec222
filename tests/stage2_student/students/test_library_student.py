"""A model of any family as a student: the library's own numbers, on the rows that losses need, and no others trained."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.families.table import submodule, unlisted_family
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import generate_answers, pad_token_id
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.scores.evaluate import supervised_logits
from vlm_distill_cache.stage2_student.students.library import LibraryStudent, OpenedStudent, open_library_student
from vlm_distill_cache.stage2_student.students.model import generation_inputs_of, model_inputs_of, vocabulary_rows

# Of one rotated and one plain position scheme each; the others differ from these in their pictures only.
TRAINED = ("llava_next", "qwen2_5_vl", "smolvlm", "paligemma", "gemma3", "compodistill", "mobilevlm_v1")


@dataclass(frozen=True)
class Picture:
    """A drawn picture as an image source."""

    width: int
    height: int
    name: str = "drawn"

    def load(self) -> PIL.Image.Image:
        rng = np.random.default_rng(self.width)
        return PIL.Image.fromarray(rng.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8))


PICTURES = (Picture(40, 60), Picture(64, 32), Picture(30, 30))
QUESTIONS = ("what is it ?", "how many red circles are there ?", "where ?")


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """Opens each family once; called with its name."""
    found: dict[str, OpenedStudent] = {}

    def open_one(name: str) -> tuple[OpenedStudent, SampleEncoder]:
        if name not in found:
            found[name] = open_library_student(save_tiny(name, tmp_path_factory.mktemp("families") / name))
        student = found[name]
        student.model.eval().requires_grad_(True)
        return student, encoder_of(student)

    return open_one


def encoder_of(student: OpenedStudent) -> SampleEncoder:
    return SampleEncoder(
        tokenizer=student.tokenizer,
        image_encoder=student.image_encoder,
        template=get_template(student.model.family.template, student.tokenizer),
        image_token_id=student.model.image_token_id,
        max_length=1000,
    )


def make_batch(encoder: SampleEncoder, *, answers: Sequence[str] = ("a red circle", "2", "left of it")):
    samples = [
        Sample(sample_id=str(index), images=(picture,), turns=(Turn(question=question, answer=answer),))
        for index, (picture, question, answer) in enumerate(zip(PICTURES, QUESTIONS, answers, strict=True))
    ]
    return collate([encoder(sample) for sample in samples], pad_token_id(encoder))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.slow(quick=("smolvlm", "compodistill", "llava_onevision"))
def test_supervised_rows_and_their_gradients_are_the_librarys_own(opened, name):
    student, encoder = opened(name)
    batch = make_batch(encoder)
    supervised = batch.labels != IGNORE_INDEX
    inputs = student.model.model_inputs(batch)
    weights = torch.randn(int(supervised.sum()), vocabulary_rows(student.model), generator=torch.Generator())
    results = []
    for logits in (
        student.model(**inputs, supervised=supervised, use_cache=False).logits,
        student.model.model(**inputs, use_cache=False).logits[supervised],
    ):
        student.model.zero_grad()
        (logits * weights).sum().backward()
        gradient = [p.grad.clone() for p in student.model.language_model.parameters() if p.grad is not None]
        results.append((logits.detach(), gradient))
    (rows, gradients), (expected, expected_gradients) = results
    student.model.zero_grad()
    assert rows.shape == expected.shape == weights.shape
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4 * float(wanted.abs().max()) + 1e-6, rtol=1e-3)
    torch.testing.assert_close(supervised_logits(student.model, inputs, supervised).detach(), rows)


@pytest.mark.parametrize("name", TRAINED)
def test_in_bf16_the_supervised_rows_are_the_librarys_own(opened, name):
    student, encoder = opened(name)
    batch = make_batch(encoder)
    supervised = batch.labels != IGNORE_INDEX
    model = copy.deepcopy(student.model).to(torch.bfloat16)
    inputs = model.model_inputs(batch)
    floats = [t.dtype for t in inputs.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    with torch.no_grad():
        rows = model(**inputs, supervised=supervised, use_cache=False).logits
        expected = model.model(**inputs, use_cache=False).logits[supervised]
    assert set(floats) == {torch.bfloat16}
    torch.testing.assert_close(rows, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.slow(quick=("llava", "qwen2_5_vl", "paligemma"))
def test_generation_from_a_left_padded_batch_is_that_of_full_passes_over_each_prompt_alone(opened, name):
    """The reference knows nothing of caches, padding or the library's positions for generation."""
    student, encoder = opened(name)
    prompts = [build_prompt(encoder, p, q) for p, q in zip(PICTURES, QUESTIONS, strict=True)]
    assert len({len(prompt) for prompt in prompts}) > 1, "nothing to pad"
    steps = 3
    inputs, image = generation_inputs_of(student.model), student.model.image_token_id
    rows = vocabulary_rows(student.model)
    with torch.no_grad():
        made = student.model.generate(
            **inputs(prompts, pad_token_id(encoder), torch.device("cpu")),
            max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=pad_token_id(encoder),
            # a random model may say it, and a full pass would look for its picture
            suppress_tokens=[image] if image < rows else None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        for row, prompt in enumerate(prompts):
            batch = collate([prompt], pad_token_id(encoder))
            length = batch.input_ids.shape[1]
            for step in range(steps):
                expected = student.model(**_continued(student.model, batch, length)).logits[0, -1]
                torch.testing.assert_close(made.logits[step][row], expected, atol=2e-4, rtol=1e-3)
                expected[image : image + 1] = -torch.inf
                chosen = made.sequences[row, made.sequences.shape[1] - steps + step]
                assert float(expected[chosen]) >= float(expected.max()) - 1e-3
                batch = _append(batch, int(chosen))
    answers = generate_answers(student.model, encoder, prompts, max_new_tokens=steps, inputs=inputs)
    torch.testing.assert_close(answers.first_logits, made.logits[0])


def _append(batch, token: int):
    """One more token behind a batch of one sequence."""

    def grow(rows, value):
        return torch.cat([rows, torch.tensor([[value]], dtype=rows.dtype)], dim=1)

    length = batch.input_ids.shape[1]
    return replace(
        batch,
        input_ids=grow(batch.input_ids, token), labels=grow(batch.labels, IGNORE_INDEX),
        attention_mask=grow(batch.attention_mask, True), position_ids=grow(batch.position_ids, length),
        visual_mask=grow(batch.visual_mask, False), lengths=(length + 1,),
    )  # fmt: skip


def _continued(student: LibraryStudent, batch, prompt_length: int):
    """Arguments of a full pass over prompt and generated tokens; these are no part of a bidirectional prefix."""
    inputs = dict(student.model_inputs(batch))
    if student.family.visual_rows == "prefix":
        inputs["token_type_ids"] = (torch.arange(batch.input_ids.shape[1])[None] >= prompt_length).long()
    return inputs


@pytest.mark.parametrize("name", TINY)
def test_each_phase_trains_its_parts_and_never_the_tower(opened, name):
    student, _ = opened(name)
    family, model = student.model.family, student.model
    projector = {id(p) for p in submodule(model.model, family.projector).parameters()}
    tower = {id(p) for p in submodule(model.model, family.vision_tower).parameters()} - projector
    text = {id(p) for p in model.language_model.parameters()} - projector - tower  # ours holds both inside
    dpt = {id(p) for p in model.trainable_parameters("dpt")}
    assert projector <= dpt
    assert not dpt & (tower | text)
    for phase in ("dft", "sft"):
        trained = {id(p) for p in model.trainable_parameters(phase)}
        assert dpt | text | {id(model.get_output_embeddings().weight)} == trained
    assert tower | dpt | text | {id(model.get_output_embeddings().weight)} == {id(p) for p in model.parameters()}
    with pytest.raises(ModelError, match="phase: got 'nap'; choose one of dpt, dft, sft"):
        model.trainable_parameters("nap")


@pytest.mark.parametrize("name", TRAINED)
def test_a_student_that_was_saved_is_the_same_student(opened, name, tmp_path):
    student, encoder = opened(name)
    student.model.save_pretrained(tmp_path)
    student.tokenizer.save_pretrained(tmp_path)
    student.image_processor.save_pretrained(tmp_path)
    again = open_library_student(tmp_path)
    assert again.image_encoder.to_dict() == student.image_encoder.to_dict()
    batch, copy = make_batch(encoder), make_batch(encoder_of(again))
    with torch.no_grad():
        logits = [m(**model_inputs_of(m, b)).logits for m, b in ((student.model, batch), (again.model, copy))]
    torch.testing.assert_close(*logits, atol=0, rtol=0)


def test_a_family_that_nobody_described_trains_whole_and_gives_no_attention(opened):
    student, _ = opened("llava")
    unlisted = LibraryStudent(student.model.model, unlisted_family())
    assert len(unlisted.trainable_parameters("dft")) == len(list(unlisted.parameters()))
    with pytest.raises(ModelError, match=r"'llava': its language model's place is not known.*set the weights"):
        unlisted.language_model  # noqa: B018
    with pytest.raises(ModelError, match="place is not known"):
        unlisted.trainable_parameters("dpt")
