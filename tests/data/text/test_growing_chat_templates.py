"""Templates that grow turn by turn give the text and the spans that they always gave: caches depend on them."""

import random

import pytest
from layout_cases import byte_tokenizer
from test_published_chat_templates import PUBLISHED
from tiny_families import GEMMA_CHAT, INTERNVL_CHAT, NEXT_CHAT, ONEVISION_CHAT, QWEN_CHAT, SMOL_CHAT

from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.text.templates import get_template

PARTS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    **{f"tiny-{number}": source for number, source in enumerate(
        (GEMMA_CHAT, INTERNVL_CHAT, NEXT_CHAT, ONEVISION_CHAT, QWEN_CHAT, SMOL_CHAT)
    )},
    **{name: published[1] for name, published in PUBLISHED.items()},
    "strings": PARTS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<IMG_CONTEXT>", "<start_of_image>")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<bos>", "</s>", *IMAGE_TOKENS)


def image_token_of(source):
    return next((token for token in IMAGE_TOKENS if token in source), "<image>")


def slow_reference(turns, tokenizer, source, image_token):
    """The text and spans as every version up to now made them."""
    takes_parts = "image" in source
    messages, spans, text, past = [], [], "", ""

    def apply(shown, asks):
        return tokenizer.apply_chat_template(shown, chat_template=source, tokenize=False, add_generation_prompt=asks)

    for index, turn in enumerate(turns):
        shows_image = bool(image_token) and index == 0
        question, answer = turn.question.strip(), turn.answer.strip()
        content = question if not shows_image or takes_parts else f"{image_token}\n{question}"
        if takes_parts:
            content = [*([{"type": "image"}] if shows_image else []), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        prompt = apply(messages, True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if takes_parts else answer})
        full = apply(messages, False)
        asked = prompt if full.startswith(prompt) else apply(messages[:-1], False)
        assert prompt.startswith(past)
        if full.startswith(prompt):
            written = full[len(prompt) :]
            assert answer in written
        else:
            assert prompt.startswith(asked)
            assert full.startswith(asked)
            before, _, after = full[len(asked) :].partition(answer)
            assert before.split() == prompt[len(asked) :].split()
            written = answer + after
        if written.rstrip().endswith(answer):
            written = written.rstrip() + tokenizer.eos_token
        text += prompt[len(past) :]
        spans.append((len(text), len(text) + len(written.rstrip())))
        text, past = text + written, full
    return text, tuple(spans)


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_spans_are_those_of_every_earlier_version(name, has_image):
    tokenizer = byte_tokenizer(SPECIAL, eos_token="</s>", pad_token="</s>", bos_token="<bos>")
    tokenizer.chat_template = source = TEMPLATES[name]
    token, template = image_token_of(source), get_template("chat", tokenizer)
    rng = random.Random(name)
    words = ["red ", "user\n", "  ASSISTANT: ", "é中🙂", "<think>x</think>", "\n\n", "a", "<b>", "{{ x }}", "[1]"]
    for _ in range(40):
        turns = tuple(
            Turn(question="".join(rng.choices(words, k=3)), answer="".join(rng.choices(words, k=3)) + rng.choice("ab"))
            for _ in range(rng.randint(1, 4))
        )
        rendered = template.render(turns, tokenizer, has_image=has_image, image_token=token)
        expected = slow_reference(turns, tokenizer, source, token if has_image else "")
        assert (rendered.text, rendered.answer_spans) == expected
