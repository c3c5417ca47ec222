"""A sample's system prompt is in front of each of its conversations, is never learnt, and is never lost in silence."""

import dataclasses

import numpy as np
import pytest
from image_array import ImageArray
from layout_cases import CASES, byte_tokenizer
from test_published_chat_templates import GEMMA3, LLAVA, PUBLISHED, QWEN2_VL, make_encoder
from test_rewriting_chat_templates import DEEPSEEK_R1, QWEN3, bracketed

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sample import Sample, Turn, questions_of
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import TEMPLATES, get_template

SYSTEM = "Be kind."
TURNS = (Turn(question="what?", answer="cat"), Turn(question="where?", answer="left"))
PICTURE = ImageArray(np.zeros((64, 64, 3), np.uint8) + 9, "x")
IM = ("<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma 2's: it takes none, and says so.
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# Llama 3.2's: not together with a picture.
NOT_WITH_PICTURES = (
    "{% set ns = namespace(image=false) %}{% for m in messages %}{% if m.content is not string %}{% for c in m.content %}"
    "{% if c.type == 'image' %}{% set ns.image = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if ns.image and messages[0].role == 'system' %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}{% endif %}" + QWEN2_VL
)
DROPS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
CUTS = CHATML.replace("m['content']", "(m['content'][:4] if m['role'] == 'system' else m['content'])")
# Gemma 3's: in front of the first question, and the parts of it or a text.
INTO_QUESTION = GEMMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- endif -%}",
).replace(
    "{{ '<start_of_turn>' + role + '\n' }}", "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
)
# Pixtral's: the system prompt as a text, the question in parts; in front of the last question.
TEXT_BESIDE_PARTS = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last or loop.index0 == messages | length - 2 %}{{ s }}{% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ m.content[0].text }}</s>{% endif %}{% endfor %}"
)


def encoder_of(source, layout="llava-next", literal=False):
    tokenizer = byte_tokenizer(
        (*IM, "<image>", "</s>", "<bos>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
        eos_token="</s>", pad_token="</s>", bos_token="<bos>",
    )  # fmt: skip
    tokenizer.chat_template = None if literal else source
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=CASES[layout],
        template=get_template(source if literal else "chat", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=8192,
    )


def sample(turns=TURNS, *, system=SYSTEM, picture=True, independent=False):
    images = (PICTURE,) if picture else ()
    return Sample(sample_id="s", images=images, turns=turns, system=system, independent_turns=independent)


def answers_of(encoder, encoded):
    return encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX])


# The text without its picture, the answers' tokens in brackets.
WRITTEN = {
    "qwen2-vl": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    "[cat<|im_end|>]\n<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n",
    "smolvlm": f"<|im_start|>System: {SYSTEM}<end_of_utterance>\nUser: what?<end_of_utterance>\nAssistant:"
    "[ cat<end_of_utterance>]\nUser: where?<end_of_utterance>\nAssistant:[ left<end_of_utterance>]\n",
    "onevision": f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user \nwhat?<|im_end|><|im_start|>assistant\n"
    "[cat<|im_end|>]<|im_start|>user \nwhere?<|im_end|><|im_start|>assistant\n[left<|im_end|>]",
    "internvl": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    "[cat<|im_end|>]\n<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[left<|im_end|>]\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_published_chat_templates_write_it_in_front(name):
    assert bracketed(make_encoder(name), sample(picture=False)) == WRITTEN[name]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, WRITTEN["qwen2-vl"]),
        (DEEPSEEK_R1.replace("{%- if m['role'] == 'user' -%}", "{%- if m['role'] == 'system' -%}{{ m['content'] }}"
                             "{%- elif m['role'] == 'user' -%}"),
         f"<bos>{SYSTEM}<|User|>what?<|Assistant|>[cat<|end|>]<|User|>where?<|Assistant|>[left<|end|>]"),
        (QWEN3.replace("m.role == 'user' -%}{{-", "m.role != 'assistant' -%}{{-").replace("user\n'", "' + m.role + '\n'"),
         WRITTEN["qwen2-vl"].replace("[left", "[<think>\n\n</think>\n\nleft")),
        (INTO_QUESTION.replace("<start_of_image>", "<image>"),
         f"<bos><start_of_turn>user\n{SYSTEM}\n\nwhat?<end_of_turn>\n<start_of_turn>model\n[cat<end_of_turn>]\n"
         "<start_of_turn>user\nwhere?<end_of_turn>\n<start_of_turn>model\n[left<end_of_turn>]\n"),
        (TEXT_BESIDE_PARTS, f"<bos>[INST]what?[/INST][cat</s>][INST]{SYSTEM}\n\nwhere?[/INST][left</s>]"),
    ],
)  # fmt: skip
def test_templates_of_every_kind_write_it(source, expected):
    written = bracketed(encoder_of(source), sample(picture=False))
    assert written.removeprefix("<bos>") == expected.removeprefix("<bos>")


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_a_picture_only_the_answers_are_learnt(name):
    encoder = make_encoder(name)
    if name == "gemma3":
        with pytest.raises(SampleError, match=r"takes no system prompt .it says: Conversation roles must alternate"):
            encoder(sample())
        return
    encoded, plain = encoder(sample()), encoder(sample(system=""))
    assert answers_of(encoder, encoded) == answers_of(encoder, plain)
    assert encoded.visual_mask.sum() == plain.visual_mask.sum()
    text = encoder.tokenizer.decode(encoded.input_ids)
    assert text.count(SYSTEM) == 1
    assert text.index(SYSTEM) < text.index("what?")
    prompt = build_prompt(encoder, PICTURE, "what?", SYSTEM)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (REFUSES, "takes no system prompt .it says: System role not supported., got 'Be kind.'; take it out"),
        (NOT_WITH_PICTURES, "it says: Prompting with images is incompatible"),
        (DROPS, "takes no system prompt .it leaves it out"),
        (CUTS, "takes no system prompt .it leaves it out"),
    ],
)
def test_a_chat_template_that_takes_none_is_that_samples_failure(source, reason):
    encoder = encoder_of(source.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"))
    with pytest.raises(SampleError, match=f"sample 's': .*{reason}"):
        encoder(sample())
    assert answers_of(encoder, encoder(sample(system="")))
    if source is NOT_WITH_PICTURES:
        assert SYSTEM in encoder.tokenizer.decode(encoder(sample(picture=False)).input_ids)


def test_in_vicuna_it_takes_the_place_of_llavas_own():
    tokenizer = encoder_of("vicuna_v1", literal=True).tokenizer
    template = TEMPLATES["vicuna_v1"]
    own = template.render(TURNS, tokenizer, has_image=True)
    given = template.render(TURNS, tokenizer, has_image=True, system=SYSTEM)
    assert given.text == own.text.replace(template.system, SYSTEM + " ")
    moved = len(given.text) - len(own.text)
    assert given.answer_spans == tuple((start + moved, end + moved) for start, end in own.answer_spans)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].system])
def test_a_literal_template_without_a_place_for_it_says_which_have_one(name):
    with pytest.raises(
        SampleError,
        match=rf"sample 's': .*{name}' has no place for a system prompt.*\(template=vicuna_v1, or template=chat",
    ):
        encoder_of(name, literal=True)(sample(TURNS[:1]))


@pytest.mark.parametrize("source", ["vicuna_v1", CHATML])
def test_packed_conversations_share_it_and_are_what_each_would_be_alone(source):
    encoder = encoder_of(source, literal=source == "vicuna_v1")
    packed = encoder(sample(independent=True))
    assert packed.is_packed
    shared = packed.segment_ids == 0
    assert SYSTEM in encoder.tokenizer.decode(packed.input_ids[shared])
    for number, turn in enumerate(TURNS, start=1):
        alone = encoder(sample((turn,)))
        own = shared | (packed.segment_ids == number)
        assert packed.input_ids[own].tolist() == alone.input_ids.tolist()
        assert packed.position_ids[own].tolist() == alone.position_ids.tolist()


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("a <image> b", "the system prompt contains '<image>'"),
        ("a </s>", "contains '</s>'"),
        ("\ud83d", "a lone surrogate"),
    ],
)
def test_texts_that_would_be_special_tokens_are_refused(system, reason):
    with pytest.raises(SampleError, match=reason):
        encoder_of("vicuna_v1", literal=True)(sample(system=system))


def test_a_question_is_asked_with_its_samples_system_prompt():
    assert [item.system for item in questions_of(sample(), lambda answer: "x")] == [SYSTEM] * 2
    assert dataclasses.replace(sample(), system="") == sample(system="")


def test_llavas_published_template_writes_it():
    assert LLAVA in PUBLISHED["llava-next"]
    assert bracketed(make_encoder("llava-next"), sample(TURNS[:1], picture=False)) == (
        f"SYSTEM: {SYSTEM} USER: what? ASSISTANT:[ cat</s>]"
    )
