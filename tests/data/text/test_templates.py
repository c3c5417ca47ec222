"""Templates give the published strings, and their spans are exactly the answers."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import TEMPLATES, PromptTemplate, get_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SHOUTS = CHATML.replace("m['content']", "m['content'] | upper")
TURNS = (Turn(question=" what is it? ", answer="a circle\n"), Turn(question="its colour?", answer="red"))


def chat_tokenizer(chat_template, specials=("<|im_start|>", "<|im_end|>", "<image>", "</s>")):
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=specials[1])
    tokenizer.chat_template = chat_template
    return tokenizer


def answers_of(rendered):
    return [rendered.text[start:end] for start, end in rendered.answer_spans]


def test_vicuna_v1_is_the_published_string():
    rendered = TEMPLATES["vicuna_v1"].render(TURNS, SimpleNamespace(eos_token="</s>"), has_image=True)
    assert rendered.text == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nwhat is it? ASSISTANT: a circle</s>"
        "USER: its colour? ASSISTANT: red</s>"
    )
    assert answers_of(rendered) == [" a circle</s>", " red</s>"]


def test_plain_is_image_caption_and_line_feed():
    rendered = TEMPLATES["plain"].render(TURNS[:1], SimpleNamespace(eos_token="</s>"), has_image=True)
    assert rendered.text == "<image>a circle\n"
    assert answers_of(rendered) == ["a circle\n"]


def test_short_has_no_system_prompt_and_takes_the_tokenizers_end():
    rendered = TEMPLATES["short"].render(TURNS[1:], SimpleNamespace(eos_token="<|end|>"), has_image=False)
    assert rendered.text == "USER: its colour? ASSISTANT: red<|end|>"


def test_several_turns_do_not_fit_a_caption():
    with pytest.raises(SampleError, match="holds one caption, got a conversation of 2 turns"):
        TEMPLATES["plain"].render(TURNS, SimpleNamespace(eos_token="</s>"), has_image=True)


def test_missing_end_token_is_an_error_with_a_remedy():
    with pytest.raises(ConfigError, match="set its eos_token"):
        TEMPLATES["short"].render(TURNS, SimpleNamespace(eos_token=None), has_image=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_dict_round_trip_is_json(name):
    template = get_template(name)
    assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert template.name == name


def test_unknown_names_and_dicts_are_refused():
    with pytest.raises(ConfigError, match=r"unknown prompt template 'vicuna'; choose one of .*'chat'"):
        get_template("vicuna")
    with pytest.raises(ConfigError, match="cannot be read"):
        PromptTemplate.from_dict({"name": "x", "colour": 1})
    with pytest.raises(ConfigError, match="needs a tokenizer with one chat template"):
        get_template("chat", SimpleNamespace(chat_template=None))


def test_chat_template_with_text_content():
    tokenizer = chat_tokenizer(CHATML)
    rendered = get_template("chat", tokenizer).render(TURNS, tokenizer, has_image=True)
    assert rendered.text == (
        "<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
        "<|im_start|>user\nits colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert answers_of(rendered) == ["a circle<|im_end|>", "red<|im_end|>"]


def test_chat_template_with_content_parts():
    tokenizer = chat_tokenizer(PARTS)
    rendered = get_template("chat", tokenizer).render(TURNS, tokenizer, has_image=True)
    assert rendered.text == ("USER: <image>\nwhat is it? ASSISTANT: a circle</s>USER: its colour? ASSISTANT: red</s>")
    assert answers_of(rendered) == ["a circle</s>", "red</s>"]


def test_chat_without_image_has_no_image_token():
    tokenizer = chat_tokenizer(PARTS)
    assert "<image>" not in get_template("chat", tokenizer).render(TURNS, tokenizer, has_image=False).text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SHOUTS, "does not grow turn by turn"),
        (PARTS.replace("<image>\n", "<image><image>"), "writes '<image>' 2 times"),
        ("{{ raise_exception('only French') }}", "only French"),
    ],
)
def test_chat_templates_whose_answers_cannot_be_located_are_refused_when_the_encoder_is_built(source, message):
    tokenizer = chat_tokenizer(source)
    size = {"height": 8, "width": 8}
    images = ImageEncoder.from_processor(CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False), (1, 1))
    with pytest.raises(ConfigError, match=message):
        SampleEncoder(
            tokenizer=tokenizer,
            image_encoder=images,
            template=get_template("chat", tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            max_length=64,
        )


def test_chat_encoding_supervises_the_answers_and_adds_no_token_of_its_own():
    tokenizer = chat_tokenizer(CHATML)
    size = {"height": 8, "width": 8}
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder.from_processor(
            CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False), (1, 1)
        ),
        template=get_template("chat", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=64,
    )
    encoded = encoder(Sample(sample_id="s", images=(), turns=(Turn(question="a a", answer="a"),)))
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert words[:3] == ["<|im_start|>", "<unk>", "a"]
    targets = tokenizer.convert_ids_to_tokens(encoded.labels[encoded.supervised_rows].tolist())
    assert targets == ["a", "<|im_end|>"]
