"""What a template writes for the model, and not as text, becomes one id whatever the tokenizer's files say of it."""

import itertools
import json

import numpy as np
import pytest
from sentencepiece_factory import own, write_converted, write_model, write_settings
from test_encoding import TOKENIZERS, make_encoder, make_sample
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.text.processors import load_tokenizer
from vlm_distill_cache.data.text.special_tokens import read_texts
from vlm_distill_cache.data.text.templates import PromptTemplate

TURNS = (("what  is it?", "a red  square."), ("in  it", "4"), ("is it?", "b!"))
TAGS = ("<|user|>", "<|model|>", "<|end|>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}{% else %}<|model|>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|model|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    write_converted(folder / "json", folder)
    return folder


def tokenizer_with(folder, *, normalized, tags=(), chat=None, **flags):
    """llava-hf's tokenizer.json with its added tokens as some chat models publish theirs."""
    described = json.loads((folder / "json" / "tokenizer.json").read_text())
    size = len(own(folder)) + 2
    described["added_tokens"] += [
        {**described["added_tokens"][0], "id": size + n, "content": t} for n, t in enumerate(tags)
    ]
    for token in described["added_tokens"]:
        token.update(normalized=normalized, **flags)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", chat_template=chat,
    )  # fmt: skip
    assert tokenizer.added_tokens_decoder[2].normalized == normalized
    return tokenizer


def encode(tokenizer, template, **more):
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoder = make_encoder(tokenizer, template, image_token_id=image)
    return encoder, encoder(make_sample(*TURNS, **more))


@pytest.mark.parametrize("template", ["vicuna_v1", "short", "chat"])
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("flags", [{}, {"single_word": True}, {"special": False}])
def test_tokens_that_are_looked_for_in_normalised_text_are_found_as_they_stand(folder, template, image, flags):
    made = [
        tokenizer_with(folder, normalized=normalized, tags=TAGS, chat=CHAT, **(flags if normalized else {}))
        for normalized in (True, False)
    ]
    assert "</s>" not in made[0].convert_ids_to_tokens(made[0]("b.</s>a")["input_ids"])  # as published, it falls apart
    (encoder, found), (_, expected) = (encode(tokenizer, template, image=image) for tokenizer in made)
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.labels, expected.labels)
    assert found.visual_mask.sum() == (6 if image else 0)
    end = made[1].convert_tokens_to_ids("<|end|>" if template == "chat" else "</s>")
    assert (found.input_ids == end).sum() == len(TURNS)
    assert (found.labels == end).sum() == len(TURNS)
    assert end in encoder.end_token_ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_finds_them_is_not_touched(name):
    encoder = make_encoder(TOKENIZERS[name], "vicuna_v1")
    assert encoder.reader is encoder.tokenizer


def test_nor_is_one_of_the_librarys_or_of_a_sentencepiece_model(folder):
    for tokenizer in (load_tokenizer(folder), load_tokenizer(folder / "json")):
        encoder, encoded = encode(tokenizer, "vicuna_v1", image=False)
        assert encoder.reader is tokenizer
        assert (encoded.labels == 2).sum() == len(TURNS)


def test_tokens_that_are_split_on_purpose_are_not_split_in_a_prompt(folder):
    tokenizer = tokenizer_with(folder, normalized=False)
    _, expected = encode(tokenizer, "vicuna_v1", image=False)
    split = tokenizer_with(folder, normalized=False)
    split.split_special_tokens = True
    _, found = encode(split, "vicuna_v1", image=False)
    assert np.array_equal(found.input_ids, expected.input_ids)


def test_an_answer_that_ends_with_a_tag_which_is_no_token_is_refused(folder):
    tokenizer = tokenizer_with(folder, normalized=False, chat=CHAT)
    with pytest.raises(ConfigError, match=r"ends an answer with '<\|end\|>', which is no token of the tokenizer"):
        encode(tokenizer, "chat")
    with pytest.raises(ConfigError, match=r"ends an answer with '<\|im_end\|>', which is no token"):
        encode(tokenizer, PromptTemplate(name="own", answer_end="<|im_end|>"))


def test_an_end_that_is_text_by_intent_stays_text(folder):
    _, encoded = encode(
        tokenizer_with(folder, normalized=False), PromptTemplate(name="own", answer_end="\n###"), image=False
    )
    assert (encoded.labels == 2).sum() == 0


def test_a_tag_that_only_other_conversations_have_is_found_too(folder):
    """System turns, tools: the template names their tags, and plain conversations do not show them."""
    chat = CHAT.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m.role == 'system' %}<|system|>{% endif %}"
    )
    tokenizer = tokenizer_with(folder, normalized=True, tags=(*TAGS, "<|system|>"), chat=chat)
    encoder, _ = encode(tokenizer, "chat")
    tag = tokenizer.convert_tokens_to_ids("<|system|>")
    assert tag not in tokenizer("a<|system|>b")["input_ids"]
    assert tag in read_texts(encoder.reader, ["a<|system|>b"])[0][0]


@pytest.mark.parametrize("kind", ["llama", "bpe", "bpe-symbols", "unigram", "unigram-bytes"])
@pytest.mark.parametrize("image", [True, False])
def test_whatever_the_files_say_of_a_token_the_text_around_it_is_read_by_the_sentencepiece_package(
    tmp_path, kind, image
):
    write_model(tmp_path, kind)
    size = len(own(tmp_path))

    def read(**flags):
        described = {"special": True, **flags}
        decoder = {"2": {"content": "</s>", **described}, str(size): {"content": "<image>", **described}}
        write_settings(tmp_path, added_tokens_decoder=decoder)
        return encode(load_tokenizer(tmp_path), "vicuna_v1", image=image)[1]

    expected = read()
    found = [token for token in expected.input_ids.tolist() if token < size]
    parts = [own(tmp_path).encode(part) for turn in TURNS for part in turn]
    assert all(part[-1] in found for part in parts)
    assert found.count(own(tmp_path).unk_id()) < len(found) // 2
    for single_word, normalized, special in itertools.product([True, False], repeat=3):
        other = read(single_word=single_word, normalized=normalized, special=special)
        assert np.array_equal(other.input_ids, expected.input_ids)
        assert np.array_equal(other.labels, expected.labels)
