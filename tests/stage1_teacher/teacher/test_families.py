"""Every family's teacher says and sees exactly what the model library's own forward pass does."""

from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from family_references import reference_inputs, reference_output
from image_array import ImageArray
from tiny_families import LAYERS, TINY, save_tiny

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.generation import generate_answers
from vlm_distill_cache.stage1_teacher.loop.signals import requests_of
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

# The library's InternVL processor, up to 5.17.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
SIZES = ((40, 30), (24, 60), (33, 33))
QUESTIONS = ("What is it?", "Is the sky blue, or is it green?", "Count.")
ANSWERS = ("A dog", "Green.", "3")
GROUPS = tuple((layer,) for layer in range(LAYERS))


@pytest.fixture(scope="module", params=list(TINY))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory) -> Path:
    return save_tiny(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher(folder)


@pytest.fixture(scope="module")
def encoder(teacher: Teacher):
    return build_encoder(teacher, template="auto", max_length=1024)


def picture(width: int, height: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def conversation(number: int, *, image: bool = True) -> Sample:
    images = (ImageArray(np.asarray(picture(*SIZES[number])), f"p{number}"),) if image else ()
    return Sample(
        sample_id=f"s{number}",
        images=images,
        turns=(Turn(question=QUESTIONS[number], answer=ANSWERS[number]),),
    )


@pytest.mark.slow(quick=("paligemma", "idefics3"))
def test_logits_and_attention_of_a_padded_batch_are_the_librarys_one_by_one(
    family: str, folder: Path, teacher: Teacher, encoder
):
    samples = [encoder(conversation(0)), encoder(conversation(1)), encoder(conversation(2, image=False))]
    output = run(teacher, samples)
    done = 0
    for number, sample in enumerate(samples):
        shown = None if number == 2 else picture(*SIZES[number])
        inputs, first, last = reference_inputs(family, folder, shown, QUESTIONS[number], ANSWERS[number])
        assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()
        assert np.flatnonzero(sample.labels != IGNORE_INDEX).tolist() == list(range(first, last))
        logits, attention = reference_output(folder, inputs)
        rows = len(sample.supervised_rows)
        torch.testing.assert_close(output["logits"][done : done + rows], logits[first:last], atol=2e-4, rtol=1e-4)
        assert logits[first:last].std() > 0.1
        done += rows
        keys = np.flatnonzero(sample.visual_mask)
        for layer in range(LAYERS):
            found = output["answer_attention"][number, layer, :rows, : len(keys)]
            torch.testing.assert_close(found, attention[layer][first:last][:, keys], atol=1e-5, rtol=1e-4)
            found = output["visual_map"][number, layer, : len(keys), : len(keys)]
            torch.testing.assert_close(found, attention[layer][keys][:, keys], atol=1e-5, rtol=1e-4)


@pytest.mark.slow(quick=("llava_next", "idefics3", "internvl"))
def test_generation_from_left_padded_prompts_begins_with_the_librarys_logits(
    family: str, folder: Path, teacher: Teacher, encoder
):
    prompts = [encoder(conversation(0), prompt_only=True), encoder(conversation(1), prompt_only=True)]
    inputs = partial(teacher.family.generation_inputs, teacher.config, dtype=torch.float32)
    made = generate_answers(teacher.model, encoder, prompts, max_new_tokens=3, inputs=inputs)
    for number in range(2):
        asked, first, _ = reference_inputs(family, folder, picture(*SIZES[number]), QUESTIONS[number], ANSWERS[number])
        logits, _ = reference_output(folder, asked)
        torch.testing.assert_close(made.first_logits[number], logits[first], atol=2e-4, rtol=1e-4)


@pytest.mark.slow(quick=("llava_onevision", "llava_next", "internvl"))
def test_in_sixteen_bits_logits_are_those_of_the_librarys_own_sixteen_bits(family: str, folder: Path, encoder):
    samples = [encoder(conversation(0)), encoder(conversation(1))]
    half = Teacher(folder, dtype="bfloat16")
    output = run(half, samples)
    assert output["logits"].dtype == torch.float32
    done = 0
    for number, sample in enumerate(samples):
        rows = len(sample.supervised_rows)
        inputs, first, last = reference_inputs(
            family, folder, picture(*SIZES[number]), QUESTIONS[number], ANSWERS[number]
        )
        logits, _ = reference_output(folder, inputs, dtype=torch.bfloat16)
        found = output["logits"][done : done + rows]
        torch.testing.assert_close(found, logits[first:last].float(), atol=0.06, rtol=0.02)
        done += rows


@pytest.mark.slow(quick=("llava", "qwen2_5_vl", "paligemma"))
def test_packed_conversations_give_what_each_gives_alone(teacher: Teacher, encoder):
    turns = tuple(Turn(question=q, answer=a) for q, a in zip(QUESTIONS, ANSWERS, strict=True))
    image = conversation(0).images
    packed = Sample(sample_id="packed", images=image, turns=turns, independent_turns=True)
    if teacher.family.visual_rows == "prefix":
        with pytest.raises(ModelError, match="visual tokens see the question"):
            run(teacher, [encoder(packed)])
        return
    alone = [encoder(Sample(sample_id=f"{number}", images=image, turns=(turn,))) for number, turn in enumerate(turns)]
    both = run(teacher, [encoder(packed), encoder(conversation(1))])
    apart = run(teacher, alone)
    count = len(apart["logits"])
    torch.testing.assert_close(both["logits"][:count], apart["logits"], atol=2e-4, rtol=1e-4)
    start, tokens = 0, int(alone[0].visual_mask.sum())
    for number, sample in enumerate(alone):
        rows = len(sample.supervised_rows)
        found = both["answer_attention"][0, :, start : start + rows, :tokens]
        expected = apart["answer_attention"][number, :, :rows, :tokens]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        start += rows


def run(teacher: Teacher, samples):
    batch = collate(samples, teacher.pad_token_id)
    wanted = dict.fromkeys(("logits", "answer_attention", "text_attention", "visual_map"))
    return teacher.run(teacher.prepare(batch, requests_of(batch, wanted, GROUPS)))
