"""Text rows behind the image: which they are, whatever the padding, the packing and the template."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from image_array import ImageArray

from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate, image_key, supervised_rows, text_row_count, text_rows
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template


@pytest.fixture(scope="module", params=["short", "vicuna_v1"])
def encoder(request):
    tokenizer = load_tokenizer()
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder.from_processor(load_image_processor(), (6, 6)),
        template=get_template(request.param),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=512,
    )


def picture(value):
    return ImageArray(np.full((72, 72, 3), value, np.uint8), f"picture {value}")


def make_samples():
    turns = (
        Turn(question="what color is it ?", answer="red"),
        Turn(question="is it big ?", answer="no , it is small"),
    )
    return [
        Sample(sample_id="long", images=(picture(10),), turns=turns),
        Sample(sample_id="packed", images=(picture(10),), turns=turns, independent_turns=True),
        Sample(sample_id="words", images=(), turns=turns),
        Sample(sample_id="short", images=(picture(20),), turns=turns[:1]),
    ]


def test_they_are_all_tokens_behind_the_last_visual_one_and_no_padding(encoder):
    encoded = [encoder(sample) for sample in make_samples()]
    batch = collate(encoded, 0)
    rows = text_rows(batch)
    for index, sample in enumerate(encoded):
        expected = []
        if sample.visual_mask.any():
            last = max(position for position in range(len(sample)) if sample.visual_mask[position])
            expected = list(range(last + 1, len(sample)))
        assert rows[index][rows[index] >= 0].tolist() == expected
        assert text_row_count(sample) == len(expected)
        assert bool((rows[index][len(expected) :] == -1).all())


def test_of_several_pictures_they_begin_behind_the_first_and_the_shared_prefix_ends_with_the_last(encoder):
    turns = (
        Turn(question="what is it ? and this ?", answer="red", places=(0, 12)),
        Turn(question="and here ?", answer="no , it is small", places=(0,)),
    )
    sample = Sample(sample_id="three", images=(picture(10), picture(20), picture(30)), turns=turns)
    several, one = replace(encoder, most_pictures=None)(sample), encoder(make_samples()[0])
    batch = collate([several, one, encoder(make_samples()[2])], 0)
    visual = np.flatnonzero(several.visual_mask)
    expected = [place for place in range(visual[35] + 1, len(several)) if place not in visual]
    rows = text_rows(batch)
    assert rows[0][rows[0] >= 0].tolist() == expected
    assert text_row_count(several) == len(expected)
    assert (rows[1] >= 0).sum() == text_row_count(one)
    assert (rows[2] == -1).all()
    assert supervised_rows(batch)[0][supervised_rows(batch)[0] >= 0].tolist() == several.supervised_rows.tolist()
    later = replace(several, input_ids=several.input_ids.copy())
    later.input_ids[visual[-1] + 1] += 1
    assert image_key(later) == image_key(several)
    later.input_ids[visual[36] - 1] += 1  # between the first two
    assert image_key(later) != image_key(several)
    swapped = replace(several, image_hashes=several.image_hashes[::-1])
    assert image_key(swapped) != image_key(several)
    clip = ((-1, np.nan), (1, 0.0), (1, 0.5))
    assert image_key(replace(several, frame_times=clip)) != image_key(several)


def test_every_one_sees_the_whole_image_and_answer_rows_are_among_them(encoder):
    batch = collate([encoder(sample) for sample in make_samples()], 0)
    assert batch.attention_mask.ndim == 4
    rows, answers = text_rows(batch), supervised_rows(batch)
    for index in (0, 1, 3):
        mine = rows[index][rows[index] >= 0]
        visual = batch.visual_mask[index].nonzero()[:, 0]
        assert bool(batch.attention_mask[index, 0][mine][:, visual].all())
        assert set(answers[index][answers[index] >= 0].tolist()) <= set(mine.tolist())


def test_a_batch_of_words_alone_has_none(encoder):
    batch = collate([encoder(make_samples()[2])], 0)
    assert torch.equal(text_rows(batch), torch.zeros(1, 0, dtype=torch.int64))
    assert image_key(encoder(make_samples()[2])) is None


def test_the_key_of_an_image_is_that_of_all_that_its_visual_rows_see(encoder):
    long, packed, _, short = (encoder(sample) for sample in make_samples())
    assert image_key(long) == image_key(packed)  # other turns, packed or not: behind the image
    assert image_key(long) != image_key(short)  # another picture
    moved = encoder(Sample(sample_id="x", images=(picture(10),), turns=(Turn(question="", answer="a red ball"),)))
    prefix = long.input_ids[: int(np.flatnonzero(long.visual_mask)[-1]) + 1]
    same_prefix = np.array_equal(prefix, moved.input_ids[: len(prefix)])
    assert (image_key(long) == image_key(moved)) == same_prefix


def test_another_prefix_is_another_key():
    tokenizer = load_tokenizer()
    keys = set()
    for name in ("short", "vicuna_v1"):
        encoder = SampleEncoder(
            tokenizer=tokenizer,
            image_encoder=ImageEncoder.from_processor(load_image_processor(), (6, 6)),
            template=get_template(name),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            max_length=512,
        )
        keys.add(image_key(encoder(make_samples()[0])))
    assert len(keys) == 2
