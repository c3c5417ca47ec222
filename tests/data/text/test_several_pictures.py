"""Several pictures and videos in one sequence: each stands where its question shows it, and is cut off whole."""

from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import pytest
from image_array import ImageArray
from test_encoding import PICTURE, TOKENIZERS, make_encoder

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.data.sample import Frame, FrameSampling, Sample, Turn
from vlm_distill_cache.data.text.templates import PromptTemplate

OTHER = ImageArray(np.full((24, 24, 3), 200, np.uint8), "grey")
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Clip:
    """A video of plain frames."""

    times: tuple[float, ...]
    name: str = "clip"

    def frames(self, sampling):
        return [
            Frame(image=PIL.Image.new("RGB", (24, 24), (int(9 * time), 0, 0)), time=time)
            for time in self.times[: sampling.most]
        ]


def sample_of(*turns, images):
    return Sample(
        sample_id="s", images=tuple(images), turns=tuple(Turn(question=q, answer=a, places=at) for q, a, at in turns)
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["short", "vicuna_v1", "chat"])
@pytest.mark.parametrize("known", [True, False])
def test_pictures_stand_where_questions_show_them(name, template, known):
    """Against one call of the tokenizer on the text with the image token written out."""
    tokenizer = TOKENIZERS[name]
    if template == "chat":
        template = PromptTemplate(name="chat", chat_template=CHAT)
    if not known and isinstance(template, str) and name == "metaspace":
        pytest.skip("a text that is split around its pictures begins with a blank of its own")
    encoder = replace(make_encoder(tokenizer, template), most_pictures=None)
    turns = (("  and of  , is it left?", "yes", (6, 9)), ("where is the blue square?", "c2 r4", (0,)))
    encoded = encoder(sample_of(*turns, images=(PICTURE, OTHER, PICTURE)))
    rendered = encoder.template.render(
        tuple(Turn(question=q, answer=a, places=at) for q, a, at in turns), tokenizer, markers=_markers(3)
    ).text
    assert rendered.count("<image>") == 3
    assert "and <image>of <image> , is it left?" in rendered
    assert "<image>where is" in rendered.replace("\n", "")
    ids = tokenizer(rendered.replace("<image>", "<image>" * 6))["input_ids"]
    assert encoded.input_ids.tolist() == ids
    assert encoded.visual_mask.tolist() == [one == 4 for one in ids]
    assert [tile.span for tile in encoded.tiles] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    assert encoded.image_hashes == tuple(image_hash(one.load()) for one in (PICTURE, OTHER, PICTURE))
    assert encoded.image_inputs["pixel_values"].shape == (3, 3, 24, 24)
    assert encoded.frame_times == ()


def _markers(count):
    from vlm_distill_cache.data.text.chat import Marker

    return (Marker("<image>"),) * count


def test_without_places_all_stand_in_front():
    encoder = replace(make_encoder(TOKENIZERS["word"]), most_pictures=None)
    one = encoder(sample_of(("where?", "c2", ()), images=(PICTURE, OTHER)))
    other = encoder(sample_of(("\n where?", "c2", (0, 1)), images=(PICTURE, OTHER)))
    assert one.input_ids.tolist() == other.input_ids.tolist()


def test_frames_of_a_video_are_pictures_of_a_family_without_videos():
    encoder = replace(make_encoder(TOKENIZERS["word"]), most_pictures=None, sampling=FrameSampling(fps=1, most=3))
    encoded = encoder(sample_of(("then ?", "yes", (0, 5)), images=(PICTURE, Clip((0.0, 0.5, 1.5, 9.0)))))
    assert [tile.is_frame for tile in encoded.tiles] == [False, True, True, True]
    assert [tile.span for tile in encoded.tiles] == [(float(n), n + 1.0) for n in range(4)]
    assert encoded.frame_times[1:] == ((1, 0.0), (1, 0.5), (1, 1.5))
    assert encoded.frame_times[0][0] == -1
    assert len(encoded.image_hashes) == 4
    words = TOKENIZERS["word"].convert_ids_to_tokens(encoded.input_ids.tolist())
    first = words.index("<image>")
    assert words[first : first + 6 + 1 + 18] == ["<image>"] * 6 + ["<unk>"] + ["<image>"] * 18
    with pytest.raises(SampleError, match=r"video clip: videos are not read; set frames\.fps"):
        replace(encoder, sampling=None)(sample_of(("then ?", "yes", ()), images=(Clip((0.0,)),)))


def test_what_is_cut_off_loses_its_pictures_whole():
    encoder = replace(make_encoder(TOKENIZERS["word"]), most_pictures=None)
    turns = (("where is the blue square?", "c2 r4", (0,)), ("and ?", "no", (4,)))
    whole = encoder(sample_of(*turns, images=(PICTURE, OTHER)))
    first = encoder(sample_of(turns[0], images=(PICTURE,)))
    rows = len(first.supervised_rows)
    cut = encoder(sample_of(*turns, images=(PICTURE, OTHER)), rows=rows)
    assert cut.tiles == first.tiles
    assert cut.image_hashes == first.image_hashes
    np.testing.assert_array_equal(cut.image_inputs["pixel_values"], first.image_inputs["pixel_values"])
    assert encoder(sample_of(*turns, images=(PICTURE, OTHER)), rows=rows + 1).tiles == whole.tiles


def test_as_many_places_as_pictures_and_inside_the_question():
    encoder = replace(make_encoder(TOKENIZERS["word"]), most_pictures=None)
    with pytest.raises(SampleError, match="show 1 pictures, but it has 2; give one for each marker"):
        encoder(sample_of(("where?", "c2", (0,)), images=(PICTURE, OTHER)))
    with pytest.raises(SampleError, match=r"turn 1 shows pictures at \(7,\), outside of its question"):
        encoder(sample_of(("where?", "c2", (7,)), images=(PICTURE,)))
