"""Several pictures: every family reads, says and sees exactly what the library's processor and eager pass do, one by one."""

from functools import partial

import numpy as np
import pytest
import torch
from several_pictures import SHOWN, Talk, TinyFamily, open_tiny
from tiny_families import LAYERS, TINY

from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.tiles import views_of
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.sample import Sample
from vlm_distill_cache.data.text.collate import Batch, collate, supervised_rows, visual_keys
from vlm_distill_cache.data.text.generation import generate_answers

# The library's InternVL processor, up to 5.17.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
# MobileVLM's two versions read their inputs alike, so do LLaVA's own checkpoints and the library's, PaliGemma 1 and 2.
FAMILIES = [name for name in TINY if name not in ("llava_original", "mobilevlm_v1", "paligemma2")]
TWO = Talk(((f"{SHOWN}{SHOWN}Which is red?", "The first"),), (0, 1))
OTHER = Talk(((f"{SHOWN}{SHOWN}Is one of them blue?", "No"),), (0, 1))
FIVE = Talk(((f"Is {SHOWN} like {SHOWN},{SHOWN} or {SHOWN}? Not {SHOWN}.", "A bit"),), (4, 3, 2, 1, 0))
LATER = Talk(((f"{SHOWN}What is it?", "A cat"), (f"And in {SHOWN} here?", "Two")), (2, 3))
ONE = Talk(((f"{SHOWN}Count.", "3"),), (1,))
NONE = Talk((("Is water wet?", "Yes"),), ())
GROUPS = tuple((layer,) for layer in range(LAYERS))


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request) -> TinyFamily:
    return open_tiny(request.param)


def encode(tiny: TinyFamily, talk: Talk, **options):
    return tiny.encoder(talk.sample(str(talk)), **options)


@torch.no_grad()
def run(tiny: TinyFamily, batch: Batch):
    """Logits ``[A, V]`` of supervised rows, and attention on visual tokens ``[B, layers, R, N]`` of them and of themselves."""
    keys = visual_keys(batch)
    wanted = {
        name: AttentionRequest(rows, keys, GROUPS)
        for name, rows in {"answers": supervised_rows(batch), "visual": keys}.items()
    }
    inputs = tiny.family.model_inputs(tiny.config, batch, dtype=torch.float32)
    with tiny.capture.record(wanted) as found:
        logits = row_logits(tiny.model, inputs, batch.labels != IGNORE_INDEX)
    return logits, found["answers"], found["visual"]


def close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def test_a_mixed_batch_gives_what_the_library_gives_one_by_one(tiny: TinyFamily):
    talks = [TWO, FIVE, ONE] if tiny.name == "paligemma" else [TWO, FIVE, LATER, ONE, NONE]
    samples = [encode(tiny, talk) for talk in talks]
    logits, answers, visual = run(tiny, collate(samples, 0))
    done = 0
    for index, (sample, talk) in enumerate(zip(samples, talks, strict=True)):
        inputs = tiny.library_inputs(talk)
        assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()
        assert len(views_of(sample.tiles)) == len(sample.image_hashes) == len(talk.pictures)
        if talk.pictures:
            expected = np.asarray(inputs["pixel_values"])
            if expected.ndim > 4:  # padded to the sample's fullest picture's number of tiles
                expected = expected.reshape(-1, *expected.shape[-3:])
                expected = expected[expected.any(axis=(1, 2, 3))]
            np.testing.assert_array_equal(sample.image_inputs["pixel_values"], expected)
        said, seen = tiny.library_output(inputs)
        rows, keys = sample.supervised_rows, np.flatnonzero(sample.visual_mask)
        close(logits[done : done + len(rows)], said[rows], 2e-4)
        close(answers[index, :, : len(rows), : len(keys)], seen[:, rows][:, :, keys], 1e-5)
        close(visual[index, :, : len(keys), : len(keys)], seen[:, keys][:, :, keys], 1e-5)
        done += len(rows)
    assert logits.std() > 0.1


def test_conversations_packed_behind_two_pictures_give_what_each_gives_alone(tiny: TinyFamily):
    if not tiny.family.packs:
        pytest.skip("visual tokens see the question, so that nothing can be packed")
    alone = [TWO.sample("s"), OTHER.sample("s")]
    turns = tuple(turn for sample in alone for turn in sample.placed())
    turns = (turns[0], *(type(turn)(question=turn.question, answer=turn.answer) for turn in turns[1:]))
    packed = tiny.encoder(Sample(sample_id="p", images=alone[0].images, turns=turns, independent_turns=True))
    assert packed.is_packed
    logits, answers, visual = run(tiny, collate([packed, encode(tiny, FIVE)], 0))
    done = 0
    for talk in (TWO, OTHER):
        sample = encode(tiny, talk)
        said, seen = tiny.library_output(tiny.library_inputs(talk))
        rows, keys = sample.supervised_rows, np.flatnonzero(sample.visual_mask)
        close(logits[done : done + len(rows)], said[rows], 2e-4)
        close(answers[0, :, done : done + len(rows), : len(keys)], seen[:, rows][:, :, keys], 1e-5)
        close(visual[0, :, : len(keys), : len(keys)], seen[:, keys][:, :, keys], 1e-5)
        done += len(rows)
    said, _ = tiny.library_output(tiny.library_inputs(FIVE))
    close(logits[done:], said[encode(tiny, FIVE).supervised_rows], 2e-4)


def test_what_is_generated_is_what_the_library_generates(tiny: TinyFamily):
    prompts = [encode(tiny, talk, prompt_only=True) for talk in (TWO, FIVE, ONE)]
    inputs = partial(tiny.family.generation_inputs, tiny.config, dtype=torch.float32)
    made = generate_answers(tiny.model, tiny.encoder, prompts, max_new_tokens=3, inputs=inputs)
    for number, talk in enumerate((TWO, FIVE)):
        asked = tiny.library_inputs(talk, asks=True)
        said, _ = tiny.library_output(asked)
        close(made.first_logits[number], said[-1], 2e-4)
        ends = {"pad_token_id": 0, "eos_token_id": tiny.encoder.end_token_ids}
        written = tiny.eager.generate(**asked, **ends, max_new_tokens=3, do_sample=False)
        new = written[0, asked["input_ids"].shape[1] :]
        assert made.texts[number] == tiny.encoder.tokenizer.decode(new, skip_special_tokens=True).strip()
