"""A prompt template as jinja, read by our processor: the ids and pixels that `SampleEncoder` gives for the prompt."""

import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import QWEN_CHAT, byte_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from vlm_distill_cache.common.models.processing import VisionLanguageProcessor
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.load import ImageBytes
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.jinja_template import chat_template_of
from vlm_distill_cache.data.text.templates import TEMPLATES, PromptTemplate

TEXTS_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ODD = PromptTemplate(
    name="odd", system="{{ 'x' }} it's \"so\" \\n %} \u00e9\U0001f600 ", before_question="\\Q: {%", after_image=" {# ",
    before_answer="\nA:", answer_end="<|im_end|>",
)  # fmt: skip
CHATS = [PromptTemplate(name="chat", chat_template=source) for source in (TEXTS_ONLY, QWEN_CHAT)]
ALL = [*TEMPLATES.values(), ODD, *CHATS]
# What stands for a picture: no token at all, or one of the tokenizer's.
KINDS = {
    "pad": {"layout": "pad", "knows": False},
    "square": {"layout": "square", "knows": True},
    "crop": {"layout": "crop", "knows": False},
}


def setting(template: PromptTemplate, *, layout: str, knows: bool):
    tokenizer = byte_tokenizer(
        "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", bos=True
    )
    size = {"height": 24, "width": 24}
    images = hf.CLIPImageProcessorPil(
        size=size if layout == "square" else {"shortest_edge": 24}, crop_size=size, do_center_crop=layout != "square"
    )
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>") if knows else len(tokenizer) + 7
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder(processor=images, layout=layout, grid=(2, 3)),
        template=template,
        image_token_id=token,
        max_length=5000,
    )
    processor = VisionLanguageProcessor(
        images, tokenizer, chat_template_of(template, tokenizer, encoder.image_token), layout, encoder.image_token, token,
        6, not template.bos_after_image,
    )  # fmt: skip
    return encoder, processor


SETTINGS = {
    (template.name, number, kind): setting(template, **options)
    for number, template in enumerate(ALL)
    for kind, options in KINDS.items()
    if kind == "square" or template.chat_template != QWEN_CHAT  # its picture is a token
}
words = st.text(alphabet="ab \n{}%'\"\\é😀", max_size=12)
said = words.filter(str.strip)


@pytest.mark.parametrize("which", SETTINGS, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    turns=st.lists(st.tuples(words, said), min_size=1, max_size=3),
    system=said,
    shows=st.booleans(),
    has_system=st.booleans(),
    as_parts=st.booleans(),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["RGB", "RGBA", "L"]),
)
def test_the_processor_reads_what_the_encoder_reads(which, turns, system, shows, has_system, as_parts, size, mode):
    encoder, processor = SETTINGS[which]
    template = encoder.template
    if template.holds_one_turn:
        turns = turns[:1]
    has_system &= bool(template.system or template.chat_template)
    noise = np.random.default_rng(sum(size)).integers(0, 256, (*size, len(mode)), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise.squeeze(2) if mode == "L" else noise)
    stored = io.BytesIO()
    picture.save(stored, "PNG")
    sample = Sample(
        sample_id="s",
        images=(ImageBytes(data=stored.getvalue(), name="p"),) if shows else (),
        turns=tuple(Turn(question=question, answer=answer) for question, answer in turns),
        system=system if has_system else "",
    )
    expected = encoder(sample, prompt_only=True)
    parts = as_parts or template.chat_template == QWEN_CHAT

    def content(text, *, image=False):
        text = text.strip() if template.chat_template == QWEN_CHAT else text  # a checkpoint's own stays as it is
        image = [{"type": "image", "image": picture}] if image else []
        return [*image, {"type": "text", "text": text}] if parts or image else text

    messages = [{"role": "system", "content": content(system)}] if has_system else []
    for index, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": content(question, image=shows and index == 0)})
        messages.append({"role": "assistant", "content": content(answer)})
    found = processor.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    assert found["input_ids"].tolist() == [expected.input_ids.tolist()]
    assert found["attention_mask"].tolist() == [[1] * len(expected)]
    assert ("pixel_values" in found) == shows
    if shows:
        np.testing.assert_array_equal(found["pixel_values"], expected.image_inputs["pixel_values"])
    if template.chat_template == TEXTS_ONLY:  # read again as a checkpoint's own
        again = replace(encoder, template=PromptTemplate(name="chat", chat_template=processor.chat_template))
        assert again(sample).input_ids.tolist() == encoder(sample).input_ids.tolist()
    if not template.chat_template:  # with its answers, too
        rendered = template.render(
            sample.turns, encoder.tokenizer, has_image=shows, image_token=encoder.image_token, system=sample.system
        )
        assert processor.apply_chat_template(messages) == rendered.text


def test_a_batch_is_padded_in_front_and_each_row_is_as_alone(monkeypatch):
    _, processor = SETTINGS["vicuna_v1", 0, "pad"]
    monkeypatch.setattr(processor.tokenizer, "padding_side", "left")  # as it is saved
    picture = PIL.Image.new("RGB", (30, 20), "red")
    texts = ["USER: <image>\nwhat ASSISTANT:", "USER: hi ASSISTANT:"]
    whole = processor([picture], texts, return_tensors="np")
    for index, text in enumerate(texts):
        alone = processor([picture] if index == 0 else None, text, return_tensors="np")
        length = alone["input_ids"].shape[1]
        np.testing.assert_array_equal(whole["input_ids"][index, -length:], alone["input_ids"][0])
        assert whole["attention_mask"][index].tolist() == [0] * (whole["input_ids"].shape[1] - length) + [1] * length
    right = processor([picture], texts, padding_side="right", padding="max_length", max_length=70, return_tensors="np")
    assert right["attention_mask"].tolist() == [sorted(row, reverse=True) for row in right["attention_mask"].tolist()]
    assert right["input_ids"].shape == (2, 70)


def test_pictures_and_texts_that_do_not_go_together_are_refused_in_words():
    _, processor = SETTINGS["vicuna_v1", 0, "pad"]
    picture = PIL.Image.new("RGB", (3, 2))
    with pytest.raises(ValueError, match="1 pictures, but 0 of the texts hold <image>; put it once"):
        processor([picture], "what")
    with pytest.raises(ValueError, match="0 pictures, but 1 of the texts"):
        processor(text="<image> what")
    with pytest.raises(ValueError, match="2 times <image>; this model takes one picture"):
        processor([picture, picture], "<image><image> what")
    with pytest.raises(ValueError, match="would become 20000 x 20000"):
        processor([PIL.Image.new("RGB", (20000, 1))], "<image> what")
    with pytest.raises(ValueError, match="max_length=5 would cut a picture off"):
        processor([picture], "what is it <image>", truncation=True, max_length=5)


@pytest.mark.parametrize("name", ["plain", "paligemma", "short"])
def test_what_a_template_cannot_hold_is_refused_by_its_jinja_too(name):
    source = chat_template_of(TEMPLATES[name], byte_tokenizer(), "<image>")

    def render(*roles):
        return render_jinja_template([[{"role": role, "content": "x"} for role in roles]], chat_template=source)

    with pytest.raises(Exception, match="takes no system prompt"):
        render("system", "user")
    with pytest.raises(Exception, match="unknown role tool"):
        render("tool")
    if name != "short":
        with pytest.raises(Exception, match="takes one question"):
            render("user", "assistant", "user")
