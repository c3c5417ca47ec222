"""Labels sit where the position convention says, packing changes no token, and boxes lie on the pixels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_array import ImageArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.processors import tokenizer_fingerprint
from vlm_distill_cache.data.text.templates import PromptTemplate, get_template

CORPUS = [
    "USER: what color is the red circle? ASSISTANT: red",
    "USER: where is the blue square? ASSISTANT: c2 r4",
    "a chat between a curious user and an assistant. is it left of the 12 triangles? yes, no",
]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]


def _wrap(tokenizer, *, bos):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def word_level(corpus=CORPUS, *, bos=True):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(corpus, trainers.WordLevelTrainer(special_tokens=SPECIALS))
    return _wrap(tokenizer, bos=bos)


def byte_level(corpus=CORPUS):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIALS, initial_alphabet=alphabet, vocab_size=400, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return _wrap(tokenizer, bos=False)


def metaspace(corpus=CORPUS):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(special_tokens=SPECIALS, vocab_size=150, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    # As converted Llama tokenizers do: merges were learnt within words, text is encoded whole.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return _wrap(tokenizer, bos=True)


TOKENIZERS = {"word": word_level(), "byte": byte_level(), "metaspace": metaspace()}


def square_processor(side=24):
    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)


def make_encoder(tokenizer, template="short", *, image_token_id=4, max_length=2048, grid=(2, 3)):
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder.from_processor(square_processor(), grid),
        template=get_template(template, tokenizer) if isinstance(template, str) else template,
        image_token_id=image_token_id,
        max_length=max_length,
    )


PICTURE = ImageArray(np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3), "drawn")


def make_sample(*turns, image=True, independent=False):
    return Sample(
        sample_id="s1",
        images=(PICTURE,) if image else (),
        turns=tuple(Turn(question=question, answer=answer) for question, answer in turns),
        independent_turns=independent,
    )


def test_six_token_example_by_hand():
    """<s> Q what A yes </s>: row 3 predicts "yes", row 4 predicts "</s>", nothing else is supervised."""
    tokenizer = word_level(["Q what A yes"])
    template = PromptTemplate(name="six", before_question="Q ", before_answer=" A")
    encoded = make_encoder(tokenizer, template)(make_sample(("what", "yes"), image=False))
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert words == ["<s>", "Q", "what", "A", "yes", "</s>"]
    yes, end = (int(i) for i in encoded.input_ids[4:])
    assert encoded.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, yes, end, IGNORE_INDEX]
    assert encoded.supervised_rows.tolist() == [3, 4]
    assert encoded.position_ids.tolist() == list(range(6))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["short", "vicuna_v1"])
def test_labels_decode_to_the_answers_and_nothing_else(name, template):
    tokenizer = TOKENIZERS[name]
    encoder = make_encoder(tokenizer, template)
    encoded = encoder(make_sample(("what color is it?", "red circle"), ("where?", "c2 r4")))
    targets = encoded.labels[encoded.supervised_rows].tolist()
    assert tokenizer.decode(targets).replace(" ", "") == "redcircle</s>c2r4</s>"
    assert (encoded.input_ids[encoded.supervised_rows + 1] == targets).all()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["short", "vicuna_v1", "plain"])
def test_tokens_equal_those_of_the_text_with_n_image_tokens(name, template):
    """The model library's LLaVA processor writes the image token N times and tokenises once."""
    tokenizer = TOKENIZERS[name]
    encoder = make_encoder(tokenizer, template)
    turns = (Turn(question="what color?", answer="red"),)
    text = encoder.template.render(turns, tokenizer, has_image=True).text
    expected = tokenizer(text.replace("<image>", "<image>" * 6))["input_ids"]
    encoded = encoder(make_sample(("what color?", "red")))
    assert encoded.input_ids.tolist() == expected
    assert encoded.visual_mask.sum() == 6
    assert (encoded.input_ids[encoded.visual_mask] == 4).all()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_unknown_image_token_splits_the_text_around_the_image(name):
    tokenizer = TOKENIZERS[name]
    encoder = make_encoder(tokenizer, image_token_id=len(tokenizer) + 7)
    encoded = encoder(make_sample(("what color?", "red circle")))
    ids = encoded.input_ids.tolist()
    at = ids.index(len(tokenizer) + 7)
    leading = [1] if name != "byte" else []
    assert ids[:at] == leading + tokenizer("USER: ", add_special_tokens=False)["input_ids"]
    after = "\nwhat color? ASSISTANT: red circle</s>"
    assert ids[at + 6 :] == tokenizer(after, add_special_tokens=False)["input_ids"]
    targets = encoded.labels[encoded.supervised_rows].tolist()
    assert tokenizer.decode(targets).replace(" ", "") == "redcircle</s>"


text = st.text(st.sampled_from("ab red?.1 中é\U0001f642\n"), max_size=12)
answers = text.filter(lambda value: value.strip())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    turns=st.lists(st.tuples(text, answers), min_size=2, max_size=5),
    image=st.booleans(),
    known=st.booleans(),
)
def test_packed_conversations_keep_the_tokens_they_have_alone(name, turns, image, known):
    tokenizer = TOKENIZERS[name]
    encoder = make_encoder(tokenizer, image_token_id=4 if known else len(tokenizer))
    packed = encoder(make_sample(*turns, image=image, independent=True))
    assert packed.is_packed
    assert packed.visual_mask.sum() == (6 if image else 0)
    for number, turn in enumerate(turns, start=1):
        alone = encoder(make_sample(turn, image=image))
        kept = (packed.segment_ids == 0) | (packed.segment_ids == number)
        np.testing.assert_array_equal(packed.input_ids[kept], alone.input_ids)
        np.testing.assert_array_equal(packed.labels[kept], alone.labels)
        np.testing.assert_array_equal(packed.position_ids[kept], alone.position_ids)
        np.testing.assert_array_equal(packed.visual_mask[kept], alone.visual_mask)
        assert not alone.is_packed


def test_equal_questions_do_not_share_the_row_of_the_first_answer_token():
    encoder = make_encoder(TOKENIZERS["word"])
    packed = encoder(make_sample(("", "red circle"), ("", "red square"), independent=True))
    assert (packed.labels[packed.segment_ids == 0] == IGNORE_INDEX).all()
    assert len(packed.supervised_rows) == 6


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["short", "vicuna_v1", "plain"])
@pytest.mark.parametrize("image", [True, False])
def test_generation_prompt_is_what_precedes_the_first_answer(name, template, image):
    encoder = make_encoder(TOKENIZERS[name], template)
    if template == "plain" and name == "byte" and not image:
        pytest.skip("no token at all stands in front of the caption")
    full = encoder(make_sample(("what color?", "red"), image=image))
    prompt = build_prompt(encoder, PICTURE if image else None, "what color?")
    first = full.supervised_rows[0] + 1
    np.testing.assert_array_equal(prompt.input_ids, full.input_ids[:first])
    assert (prompt.labels == IGNORE_INDEX).all()
    assert bool(prompt.image_inputs) == image


def test_text_only_sample_has_no_pixels_tiles_or_hash():
    encoded = make_encoder(TOKENIZERS["byte"])(make_sample(("hi", "yes"), image=False))
    assert encoded.image_inputs == {}
    assert encoded.tiles == ()
    assert encoded.image_hash == bytes(16)
    assert not encoded.visual_mask.any()


def test_dtypes_and_hash_are_those_of_the_record():
    encoded = make_encoder(TOKENIZERS["word"])(make_sample(("hi", "yes"), ("hi", "no"), independent=True))
    for field in (encoded.input_ids, encoded.labels, encoded.position_ids, encoded.segment_ids):
        assert field.dtype == np.int64
        assert field.shape == (len(encoded),)
    assert encoded.visual_mask.dtype == bool
    assert encoded.image_inputs["pixel_values"].dtype == np.float32
    assert encoded.image_hash == image_hash(PICTURE.load())


def test_another_grid_changes_visual_tokens_only():
    encoder = make_encoder(TOKENIZERS["word"])
    sample = make_sample(("what color?", "red"))
    small, large = encoder.with_grid((1, 1))(sample), encoder(sample)
    np.testing.assert_array_equal(small.input_ids[~small.visual_mask], large.input_ids[~large.visual_mask])
    np.testing.assert_array_equal(small.labels[small.supervised_rows], large.labels[large.supervised_rows])
    np.testing.assert_array_equal(small.image_inputs["pixel_values"], large.image_inputs["pixel_values"])
    assert small.visual_mask.sum() == 1
    assert (small.tiles[0].rows, small.tiles[0].region) == (1, large.tiles[0].region)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (make_sample(("hi", " \n")), "answer of turn 1 is empty"),
        (make_sample(("hi", "yes \ud83d")), "turn 1 holds a lone surrogate"),
        (make_sample(("hi", "yes"), ("<image> and this?", "no")), "contains '<image>'"),
        (make_sample(("hi", "yes </s> no")), "contains '</s>'"),
        (make_sample(("<s>struck</s>", "yes")), "contains '<s>'"),
        (
            replace(
                make_sample(("hi", "yes")), images=(PICTURE,), turns=(Turn(question="hi", answer="yes", places=(0, 0)),)
            ),
            "show 2 pictures, but it has 1",
        ),
        (replace(make_sample(("hi", "yes")), images=(PICTURE, PICTURE)), "2 pictures, but at most 1 a sample is taken"),
        (replace(make_sample(("hi", "yes")), turns=()), "no turns"),
        (make_sample(("hi " * 3000, "yes")), r"tokens \(6 visual, \d+ of text\) exceed max_length=2048"),
    ],
)
def test_unusable_samples_are_refused_by_name(sample, message):
    with pytest.raises(SampleError, match=rf"sample 's1': .*{message}"):
        make_encoder(TOKENIZERS["byte"])(sample)


def test_unreadable_image_error_names_file_and_sample(tmp_path):
    from vlm_distill_cache.data.images.load import ImageFile

    sample = replace(make_sample(("hi", "yes")), images=(ImageFile(tmp_path / "gone.png"),))
    with pytest.raises(SampleError, match=r"sample 's1': image .*gone.png cannot be read"):
        make_encoder(TOKENIZERS["byte"])(sample)


def test_picture_that_cannot_be_laid_out_names_file_and_sample():
    processor = LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_pad=True)
    images = ImageEncoder.from_processor(processor, (2, 3))
    strip = ImageArray(np.zeros((1, 60_000, 3), dtype=np.uint8), "strip.png")
    encoder = replace(make_encoder(TOKENIZERS["byte"]), image_encoder=images)
    with pytest.raises(SampleError, match=r"sample 's1': image strip\.png: .*crop it first"):
        encoder(replace(make_sample(("hi", "yes")), images=(strip,)))


def test_sequence_of_exactly_max_length_is_kept_and_one_token_less_refused():
    encoder, sample = make_encoder(TOKENIZERS["word"]), make_sample(("what color?", "red"))
    length = len(encoder(sample))
    assert len(replace(encoder, max_length=length)(sample)) == length
    with pytest.raises(SampleError, match=f"{length} tokens .* exceed max_length={length - 1}"):
        replace(encoder, max_length=length - 1)(sample)


def test_captions_cannot_be_packed_where_the_image_row_predicts_them():
    encoder = make_encoder(TOKENIZERS["word"], "plain")
    with pytest.raises(SampleError, match="packed conversations must share"):
        encoder(make_sample(("", "red circle"), ("", "blue square"), independent=True))


def test_answer_that_no_row_predicts_is_refused():
    encoder = make_encoder(TOKENIZERS["byte"], "plain")
    with pytest.raises(SampleError, match="begins with the first token"):
        encoder(make_sample(("", "red circle"), image=False))


def test_bad_encoders_are_refused_when_built():
    tokenizer = TOKENIZERS["word"]
    with pytest.raises(ConfigError, match="ordinary token"):
        make_encoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("red"))
    with pytest.raises(ConfigError, match="max_length=6 leaves no room"):
        make_encoder(tokenizer, max_length=6)
    with pytest.raises(ConfigError, match="no character offsets"):
        make_encoder(object(), get_template("short"))


def test_trailing_special_tokens_of_a_tokenizer_are_not_learnt():
    backend = Tokenizer.from_str(TOKENIZERS["word"].backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = _wrap(backend, bos=False)
    sample = make_sample(("what color?", "red"))
    np.testing.assert_array_equal(
        make_encoder(tokenizer)(sample).input_ids, make_encoder(TOKENIZERS["word"])(sample).input_ids
    )


def test_tokenizer_fingerprint_ignores_added_tokens_and_sees_behaviour():
    backend = Tokenizer.from_str(TOKENIZERS["byte"].backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("<extra>", special=True)])
    same = tokenizer_fingerprint(TOKENIZERS["byte"])
    assert tokenizer_fingerprint(_wrap(backend, bos=False)) == same
    assert tokenizer_fingerprint(_wrap(backend, bos=True)) != same
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in TOKENIZERS.values()}) == 3
