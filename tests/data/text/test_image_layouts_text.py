"""Counts and token ids equal those of the library's own processor, in the prompt that its chat template writes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from image_array import ImageArray
from layout_cases import CASES, ROW_COL, byte_tokenizer, framed

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import PromptTemplate, get_template

SIZES = [
    (1, 1),
    (7, 3),
    (1, 190),
    (190, 1),
    (31, 33),
    (64, 48),
    (97, 40),
    (40, 130),
    (300, 200),
    (200, 300),
    (500, 7),
]


def with_roles(tokenizer, **roles):
    """Named special tokens as the published tokenizers have them."""
    for role, token in roles.items():
        setattr(tokenizer, role, token)
        setattr(tokenizer, f"{role}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def unready(processor_class, **attributes):
    """A processor of the library without its video half (which needs torchvision); it still expands images."""
    processor = processor_class.__new__(processor_class)
    for name, value in attributes.items():
        setattr(processor, name, value)
    return processor


LLAVA = byte_tokenizer(["<image>", "</s>"], eos_token="</s>", pad_token="</s>")
QWEN = byte_tokenizer(
    ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>", "<|im_start|>"],
    eos_token="<|im_end|>", pad_token="<|im_end|>",
)  # fmt: skip
SPLIT = byte_tokenizer(
    ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROW_COL],
    eos_token="<end_of_utterance>", pad_token="<end_of_utterance>",
)  # fmt: skip
INTERN = byte_tokenizer(
    ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|im_end|>"
)
GEMMA = with_roles(
    byte_tokenizer(
        ["<bos>", "<eos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
    ),
    boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
)  # fmt: skip

TOKENIZERS = {
    "llava-next": (LLAVA, "<image>"),
    "onevision": (LLAVA, "<image>"),
    "onevision, shrunk": (LLAVA, "<image>"),
    "qwen": (QWEN, "<|image_pad|>"),
    "qwen3": (QWEN, "<|image_pad|>"),
    "idefics3": (SPLIT, "<image>"),
    "smolvlm": (SPLIT, "<image>"),
    "unsplit": (SPLIT, "<image>"),
    "internvl": (INTERN, "<IMG_CONTEXT>"),
    "framed": (GEMMA, "<image_soft_token>"),
}


def expansion(name, image):
    """What the library's processor writes in place of its image marker."""
    encoder = CASES[name]
    library = encoder.processor
    shared = {"image_processor": library, "image_token": TOKENIZERS[name][1]}
    if name == "llava-next":
        processor = unready(
            transformers.LlavaNextProcessor, **shared, patch_size=encoder.patch_size,
            num_additional_image_tokens=1, vision_feature_select_strategy="default",
        )  # fmt: skip
        return processor.replace_image_token(library(image), 0)
    if name.startswith("onevision"):
        processor = unready(
            transformers.LlavaOnevisionProcessor, **shared, num_image_tokens=encoder.least_token_count,
            vision_feature_select_strategy="full", vision_aspect_ratio=f"anyres_max_{encoder.most_tiles}",
        )  # fmt: skip
        return processor.replace_image_token(library(image), 0)
    if name.startswith("qwen"):
        kind = transformers.Qwen2VLProcessor if name == "qwen" else transformers.Qwen3VLProcessor
        return unready(kind, **shared).replace_image_token(library(image), 0)
    if name == "internvl":
        processor = unready(
            transformers.InternVLProcessor, **shared, image_seq_length=encoder.least_token_count,
            start_image_token="<img>", end_image_token="</img>",
        )  # fmt: skip
        return processor.replace_image_token(library(image, crop_to_patches=True), 0)
    if name == "framed":
        processor = transformers.Gemma3Processor(
            image_processor=library, tokenizer=GEMMA, image_seq_length=encoder.token_count
        )
        return processor.replace_image_token(library(image), 0)
    kind = transformers.Idefics3Processor if name == "idefics3" else transformers.SmolVLMProcessor
    processor = unready(
        kind, **shared, image_seq_len=encoder.least_token_count, fake_image_token="<fake_token_around_image>",
        global_image_tag="<global-img>", global_image_token="<global-img>",
    )  # fmt: skip
    return processor.replace_image_token(library(image, return_row_col_info=True), 0)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_text_and_count_of_visual_tokens_are_the_library_processors(name, size):
    image = PIL.Image.new("RGB", size, (9, 100, 200))
    encoded = CASES[name](image)
    count = sum(tile.token_count for tile in encoded.tiles)
    token = TOKENIZERS[name][1]
    expected = expansion(name, image)
    assert (token * count if encoded.text is None else encoded.text) == expected
    assert expected.count(token) == count


@given(
    name=st.sampled_from(["llava-next", "onevision", "onevision, shrunk", "qwen", "idefics3", "internvl"]),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
)
@settings(max_examples=120, deadline=None)
def test_any_size_has_as_many_visual_tokens_as_the_library_says(name, size):
    image = PIL.Image.new("RGB", size, (9, 100, 200))
    encoded = CASES[name](image)
    written = expansion(name, image)
    assert written.count(TOKENIZERS[name][1]) == sum(tile.token_count for tile in encoded.tiles)
    assert encoded.text in (None, written)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_has_the_ids_of_the_opened_prompt_and_its_answers_alone_are_supervised(name, packed):
    tokenizer, token = TOKENIZERS[name]
    encoder = make_encoder(name)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 70, 3), dtype=np.uint8)
    turns = (Turn(question="what?", answer="cat"), Turn(question="where?", answer="left"))
    sample = Sample(sample_id="s", images=(ImageArray(pixels, "x"),), turns=turns, independent_turns=packed)
    encoded = encoder(sample)
    end = tokenizer.eos_token
    opened = expansion(name, PIL.Image.fromarray(pixels))
    prompt = f"USER: {opened}\nwhat? ASSISTANT: cat{end}"
    later = f"USER: {'opened' if packed else ''}where? ASSISTANT: left{end}"
    texts = [prompt, later.replace("opened", f"{opened}\n")] if packed else [prompt + later]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if packed:
        segments = encoded.segment_ids
        for index, expected in enumerate(ids, start=1):
            assert encoded.input_ids[(segments == 0) | (segments == index)].tolist() == expected
    else:
        assert encoded.input_ids.tolist() == ids[0]
    image_id = tokenizer.convert_tokens_to_ids(token)
    np.testing.assert_array_equal(encoded.visual_mask, encoded.input_ids == image_id)
    assert encoded.visual_mask.sum() == sum(tile.token_count for tile in encoded.tiles)
    answers = tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX])
    assert answers == f" cat{end} left{end}"


def make_encoder(name, *, template=None, max_length=4096):
    tokenizer, token = TOKENIZERS[name]
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=CASES[name],
        template=get_template("short") if template is None else template,
        image_token_id=tokenizer.convert_tokens_to_ids(token),
        max_length=max_length,
    )


def picture(width, height):
    return ImageArray(np.full((height, width, 3), 77, dtype=np.uint8), f"{width}x{height}")


@pytest.mark.parametrize("name", ["qwen", "llava-next", "smolvlm", "internvl"])
def test_max_length_is_held_against_each_pictures_own_count(name):
    # Idefics 3 and LLaVA-NeXT look at the shape, not at the size.
    small, large = (20, 60) if name in ("smolvlm", "llava-next") else (32, 32), (260, 250)
    counts = [len(build_prompt(make_encoder(name), picture(*size), "?")) for size in (small, large)]
    assert counts[1] > counts[0]
    encoder = make_encoder(name, max_length=counts[0])
    assert len(build_prompt(encoder, picture(*small), "?")) == counts[0]
    with pytest.raises(SampleError, match=r"visual, \d+ of text\) exceed max_length=\d+; .* limit the pixels"):
        build_prompt(encoder, picture(*large), "?")
    with pytest.raises(ConfigError, match="leaves no room for text"):
        make_encoder(name, max_length=CASES[name].least_token_count)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pictures_of_different_shapes_join_in_one_batch(name):
    encoder = make_encoder(name)
    sizes = [(40, 90), (64, 64), (130, 40)]
    samples = [build_prompt(encoder, picture(*size), "?") for size in sizes]
    batch = collate([*samples, build_prompt(encoder, None, "no picture")], pad_token_id=0)
    for key, tensor in batch.image_inputs.items():
        np.testing.assert_array_equal(tensor.numpy(), np.concatenate([sample.image_inputs[key] for sample in samples]))
    assert batch.visual_mask.sum(dim=1).tolist() == [
        sum(tile.token_count for tile in sample.tiles) for sample in [*samples, SimpleNamespace(tiles=())]
    ]


def test_pictures_of_two_families_do_not_join():
    samples = [build_prompt(make_encoder(name), picture(40, 40), "?") for name in ("llava-next", "smolvlm")]
    with pytest.raises(ConfigError, match="different inputs"):
        collate(samples, pad_token_id=0)
    samples = [build_prompt(make_encoder(name), picture(40, 40), "?") for name in ("internvl", "framed", "smolvlm")]
    other = {**samples[1].image_inputs, "pixel_values": np.zeros((1, 3, 16, 16), np.float32)}
    samples[1] = replace(samples[1], image_inputs=other)
    with pytest.raises(ConfigError, match="differ in size"):
        collate(samples, pad_token_id=0)


def test_one_fixed_grid_cannot_be_asked_of_pictures_with_their_own():
    with pytest.raises(ConfigError, match="DynamicEncoder cuts each picture into tokens of its own"):
        make_encoder("qwen").with_grid((3, 3))


def test_text_around_tokens_needs_the_tokenizer_that_knows_them():
    outside = {"template": get_template("short"), "image_token_id": -200, "max_length": 512}
    with pytest.raises(ConfigError, match="'<start_of_image>' cannot be tokenised"):
        SampleEncoder(tokenizer=GEMMA, image_encoder=framed(), **outside)
    with pytest.raises(ConfigError, match="around visual tokens cannot be tokenised"):
        SampleEncoder(tokenizer=LLAVA, image_encoder=CASES["internvl"], **outside)


def test_paligemma_prompt_has_the_ids_of_the_library_processor():
    processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor.image_seq_length = 16
    tokenizer = byte_tokenizer(["<bos>", "<eos>"], bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    library = transformers.PaliGemmaProcessor(image_processor=processor, tokenizer=tokenizer)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = library(images=PIL.Image.fromarray(pixels), text="<image>what is it?", suffix="a cat")
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder.from_processor(processor, (4, 4)),
        template=get_template("paligemma"),
        image_token_id=library.image_token_id,
        max_length=128,
    )
    turn = Turn(question="what is it?", answer="a cat")
    encoded = encoder(Sample(sample_id="s", images=(ImageArray(pixels, "x"),), turns=(turn,)))
    assert encoded.input_ids.tolist() == expected["input_ids"][0]
    np.testing.assert_array_equal(encoded.image_inputs["pixel_values"], np.asarray(expected["pixel_values"]))
    assert tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX]) == "a cat<eos>"
    text = encoder(Sample(sample_id="s", images=(), turns=(turn,)))
    assert tokenizer.decode(text.input_ids) == "<bos>what is it?\na cat<eos>"
    with pytest.raises(SampleError, match="holds one question and answer, got a conversation of 2"):
        encoder(Sample(sample_id="s", images=(ImageArray(pixels, "x"),), turns=(turn, turn)))
    assert PromptTemplate.from_dict(encoder.template.to_dict()) == encoder.template


def test_gemma3_prompt_has_the_ids_of_the_library_processor():
    encoder = framed()
    library = transformers.Gemma3Processor(
        image_processor=encoder.processor, tokenizer=GEMMA, image_seq_length=encoder.token_count
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    text = "user\n<start_of_image>what?\nmodel\n"
    expected = library(images=PIL.Image.fromarray(pixels), text=text, add_special_tokens=False)
    source = (
        "{% for m in messages %}{{ m['role'].replace('assistant', 'model') + '\n' }}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<start_of_image>{% else %}{{ p['text'] | trim }}{% endif %}{% endfor %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'model\n' }}{% endif %}"
    )
    prompt = build_prompt(
        make_encoder("framed", template=PromptTemplate(name="chat", chat_template=source)),
        ImageArray(pixels, "x"),
        "what?",
    )
    assert prompt.input_ids.tolist() == expected["input_ids"][0]
    np.testing.assert_array_equal(prompt.image_inputs["pixel_values"], np.asarray(expected["pixel_values"]))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_idefics3_and_llava_next_ids_are_the_whole_library_processors(size):
    image = PIL.Image.new("RGB", size, (9, 100, 200))
    source = ImageArray(np.asarray(image), "x")
    idefics = transformers.Idefics3Processor(
        image_processor=CASES["idefics3"].processor, tokenizer=SPLIT, image_seq_len=16
    )
    expected = idefics(images=image, text="USER: <image>\n? ASSISTANT:")["input_ids"][0]
    assert build_prompt(make_encoder("idefics3"), source, "?").input_ids.tolist() == expected
    near = transformers.LlavaNextProcessor(
        image_processor=CASES["llava-next"].processor, tokenizer=LLAVA, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    expected = near(images=image, text="USER: <image>\n? ASSISTANT:")["input_ids"][0]
    assert build_prompt(make_encoder("llava-next"), source, "?").input_ids.tolist() == expected
