"""How many pictures, frames and visual tokens of a sample a model reads, where it takes fewer than there are."""

from dataclasses import replace

import pytest
from test_encoding import PICTURE, TOKENIZERS, make_encoder
from test_several_pictures import OTHER, Clip, sample_of

from vlm_distill_cache.common.errors import CacheMismatchError, SampleError
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.data.sample import FrameSampling
from vlm_distill_cache.data.text.media import uniform_frames
from vlm_distill_cache.stage2_student.students.encoder import build_encoder, describe_encoder
from vlm_distill_cache.stage2_student.training.checks import probe_samples

CLIP = Clip(times=tuple(float(second) for second in range(8)))
ENCODER = replace(make_encoder(TOKENIZERS["metaspace"], "vicuna_v1"), most_pictures=None, sampling=FrameSampling())
TOKENS = ENCODER.image_encoder.token_count


class Loaded(list[str]):
    """Data of one sample that shows two pictures."""

    sample_ids = ("pair",)

    def __init__(self, encoder):
        super().__init__(self.sample_ids)
        self.load = lambda _: encoder(asked(PICTURE, OTHER))


def asked(*images, places=()):
    return sample_of(("what is this?", "yes", places), images=images)


def times(encoded):
    return [second for number, second in encoded.frame_times if number >= 0]


def test_pictures_beyond_are_refused_or_left_out_with_their_markers():
    one = replace(ENCODER, most_pictures=1)
    with pytest.raises(SampleError, match=r"2 pictures, but at most 1 a sample is taken.*pictures_beyond=drop"):
        one(asked(PICTURE, OTHER))
    dropping = replace(one, pictures_beyond="drop")
    for places in ((), (0, 4)):
        wanted = one(asked(PICTURE, places=places[:1]))
        found = dropping(asked(PICTURE, OTHER, places=places))
        assert found.input_ids.tolist() == wanted.input_ids.tolist()
        assert found.image_hashes == (image_hash(PICTURE.load()),)


def test_where_frames_are_pictures_a_video_has_as_many_as_are_left():
    assert times(replace(ENCODER, most_pictures=5)(asked(PICTURE, CLIP))) == [1.0, 3.0, 5.0, 7.0]
    assert times(replace(ENCODER, most_pictures=20)(asked(PICTURE, CLIP))) == list(CLIP.times)
    one = replace(ENCODER, most_pictures=1)
    with pytest.raises(SampleError, match="video clip: one picture a sample is taken, and its frames are pictures"):
        one(asked(CLIP))
    assert times(replace(one, pictures_beyond="drop")(asked(CLIP))) == [4.0]


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_frames_are_thinned_until_visual_tokens_fit(frames):
    budget = (1 + frames) * TOKENS + 1
    found = replace(ENCODER, visual_token_budget=budget)(asked(PICTURE, CLIP))
    assert int(found.visual_mask.sum()) == (1 + frames) * TOKENS
    assert times(found) == [frame.time for frame in uniform_frames(CLIP.frames(FrameSampling()), frames)]
    with pytest.raises(SampleError, match=f"{3 * TOKENS} visual tokens exceed visual_token_budget={2 * TOKENS}"):
        replace(ENCODER, visual_token_budget=2 * TOKENS)(asked(PICTURE, OTHER, CLIP))


@pytest.mark.parametrize("limit", [{"most_pictures": 1}, {"visual_token_budget": TOKENS}])
def test_what_is_too_much_for_a_student_is_said_as_such_and_not_as_a_file_that_changed(limit):
    encoder = replace(ENCODER, **limit)
    with pytest.raises(CacheMismatchError, match=r"at most 1 a sample|exceed visual_token_budget") as told:
        probe_samples(Loaded(encoder))
    assert "readable" not in str(told.value)


def test_a_students_description_says_what_it_reads_and_older_ones_say_nothing_of_it():
    encoder = replace(ENCODER, most_pictures=4, pictures_beyond="drop", visual_token_budget=99)
    described = describe_encoder(encoder)
    again = build_encoder(described, encoder.tokenizer, None, image_encoder=encoder.image_encoder)
    names = ("sampling", "video_token_id", "most_pictures", "pictures_beyond", "visual_token_budget")
    assert [getattr(again, name) for name in names] == [getattr(encoder, name) for name in names]
    plain = describe_encoder(replace(ENCODER, most_pictures=1, sampling=None))
    assert set(plain) == {"template", "geometry", "image_token_id", "max_length"}
