"""Chat templates of the shapes that published checkpoints have: where the image goes, what an answer is."""

import json

import numpy as np
import pytest
from image_array import ImageArray
from layout_cases import CASES, ROW_COL, byte_tokenizer, framed

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.processors import load_tokenizer
from vlm_distill_cache.data.text.templates import get_template

QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- for message in messages -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}{%- set role = 'model' if "
    "message['role'] == 'assistant' else message['role'] -%}{{ '<start_of_turn>' + role + '\n' }}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
ONE_VISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")


def opened(name, size=(64, 64)):
    """The text of a picture, and how often it holds the image token."""
    encoded = CASES[name]((ImageArray(np.zeros((size[1], size[0], 3), np.uint8), "x")).load())
    return encoded.text, sum(tile.token_count for tile in encoded.tiles)


# name of the layout, template, special tokens, image token, end of answers, and the conversation with PICTURE in it
PUBLISHED = {
    "qwen2-vl": (
        "qwen", QWEN2_VL, (*IM, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"), "<|image_pad|>", "<|im_end|>",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>PICTURE<|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n[cat<|im_end|>]\n"
        "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n",
    ),
    "smolvlm": (
        "smolvlm", SMOLVLM,
        ("<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", *ROW_COL),
        "<image>", "<end_of_utterance>",
        "<|im_start|>User:PICTUREwhat?<end_of_utterance>\nAssistant:[ cat<end_of_utterance>]\n"
        "User: where?<end_of_utterance>\nAssistant:[ left<end_of_utterance>]\n",
    ),
    "internvl": (
        "internvl", INTERNVL, (*IM, "<img>", "</img>", "<IMG_CONTEXT>"), "<IMG_CONTEXT>", "<|im_end|>",
        "<|im_start|>user\nPICTURE\nwhat?<|im_end|>\n<|im_start|>assistant\n[cat<|im_end|>]\n"
        "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n",
    ),
    "gemma3": (
        "framed", GEMMA3,
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        "<image_soft_token>", "<end_of_turn>",
        "<bos><start_of_turn>user\nPICTUREwhat?<end_of_turn>\n<start_of_turn>model\n[cat<end_of_turn>]\n"
        "<start_of_turn>user\nwhere?<end_of_turn>\n<start_of_turn>model\n[left<end_of_turn>]\n",
    ),
    "onevision": (
        "onevision", ONE_VISION, (*IM, "<image>"), "<image>", "<|im_end|>",
        "<|im_start|>user PICTURE\nwhat?<|im_end|><|im_start|>assistant\n[cat<|im_end|>]"
        "<|im_start|>user \nwhere?<|im_end|><|im_start|>assistant\n[left<|im_end|>]",
    ),
    "llava-next": (
        "llava-next", LLAVA, ("</s>", "<image>"), "<image>", "</s>",
        "USER: PICTURE\nwhat? ASSISTANT:[ cat</s>]USER: where? ASSISTANT:[ left</s>]",
    ),
}  # fmt: skip


def make_encoder(name):
    layout, source, specials, image_token, end, _ = PUBLISHED[name]
    roles = {"bos_token": "<bos>"} if "<bos>" in specials else {}
    tokenizer = byte_tokenizer(specials, eos_token=end, pad_token=end, **roles)
    tokenizer.chat_template = source
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=CASES[layout],
        template=get_template("chat", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        max_length=4096,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_conversation_has_the_picture_once_and_its_answers_alone_supervised(name):
    layout, _, _, image_token, _, expected = PUBLISHED[name]
    encoder = make_encoder(name)
    turns = (Turn(question="what?", answer="cat"), Turn(question="where?", answer="left"))
    picture = ImageArray(np.zeros((64, 64, 3), np.uint8) + 9, "x")
    encoded = encoder(Sample(sample_id="s", images=(picture,), turns=turns))
    text, count = opened(layout)
    whole = expected.replace("PICTURE", text if text is not None else image_token * count)
    assert encoder.tokenizer.decode(encoded.input_ids) == whole.replace("[", "").replace("]", "")
    assert int(encoded.visual_mask.sum()) == count
    answers = "".join(part.split("]")[0] for part in expected.split("[")[1:])
    assert encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX]) == answers
    prompt = build_prompt(encoder, picture, "what?")
    assert encoder.tokenizer.decode(prompt.input_ids) == whole.split("[")[0]
    assert encoder.end_token_ids == [encoder.tokenizer.eos_token_id]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_without_a_picture_has_no_image_token(name):
    encoder = make_encoder(name)
    encoded = encoder(Sample(sample_id="s", images=(), turns=(Turn(question="what?", answer="cat"),)))
    assert not encoded.visual_mask.any()
    assert "what?" in encoder.tokenizer.decode(encoded.input_ids)


def test_a_template_without_an_end_and_a_tokenizer_without_one_are_refused():
    tokenizer = byte_tokenizer(["<image>"])
    tokenizer.chat_template = LLAVA
    with pytest.raises(ConfigError, match="nothing behind an answer and the tokenizer has no end-of-sequence"):
        get_template("chat", tokenizer).render((Turn(question="a", answer="b"),), tokenizer, has_image=False)


def test_a_template_that_begins_answers_with_other_words_than_its_prompt_is_refused():
    tokenizer = byte_tokenizer(["<image>", "</s>"], eos_token="</s>")
    tokenizer.chat_template = LLAVA.replace("'ASSISTANT:'", "'BOT:'")
    with pytest.raises(ConfigError, match="does not grow turn by turn"):
        get_template("chat", tokenizer).render((Turn(question="a", answer="b"),), tokenizer, has_image=False)


def test_the_processors_chat_template_is_the_tokenizers(tmp_path):
    tokenizer = byte_tokenizer(["<image>", "</s>"], eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": ONE_VISION}))
    assert load_tokenizer(tmp_path).chat_template == ONE_VISION
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(ModelError, match=r"chat_template\.json: expected"):
        load_tokenizer(tmp_path)


def test_the_framed_layouts_marker_is_what_its_chat_template_writes():
    encoder = make_encoder("gemma3")
    assert encoder.image_token == framed().marker == "<start_of_image>"
