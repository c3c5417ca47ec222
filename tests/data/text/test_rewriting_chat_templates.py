"""Chat templates that write a conversation anew with each turn: the answers are those of the whole conversation."""

import random

import pytest
from layout_cases import CASES, byte_tokenizer

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template

IM = ("<|im_start|>", "<|im_end|>")
# The parts of published templates that plain turns reach; a part of Qwen 3's, with its parts of content spelt out.
QWEN3 = (
    "{%- set ns = namespace(last=messages|length - 1) -%}{%- for m in messages[::-1] -%}"
    "{%- set index = (messages|length - 1) - loop.index0 -%}"
    "{%- if ns.last == messages|length - 1 and m.role == 'user' -%}{%- set ns.last = index -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = m.content -%}{%- if m.role == 'user' -%}"
    "{{- '<|im_start|>user\n' + content + '<|im_end|>' + '\n' }}{%- else -%}{%- set why = '' -%}"
    "{%- if '</think>' in content -%}"
    "{%- set why = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and (loop.last or why) -%}"
    "{{- '<|im_start|>assistant\n<think>\n' + why.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else -%}{{- '<|im_start|>assistant\n' + content }}{%- endif -%}{{- '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' }}{%- endif -%}"
)
DEEPSEEK_R1 = (
    "{{- bos_token }}{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- '<|User|>' + m['content'] }}{%- else -%}"
    "{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{- '<|Assistant|>' + content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "<|user|>\n{{ m.content }}{%- else -%}{{ '<|assistant|>\n' }}{%- set content = m.content -%}{%- set why = '' -%}"
    "{%- if '</think>' in content -%}{%- set why = content.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set content = content.split('</think>')[-1] -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and why -%}{{ '<think>' + why.strip() + '</think>' }}{%- else -%}"
    "{{ '<think></think>' }}{%- endif -%}{%- if content.strip() -%}{{ '\n' + content.strip() }}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)
ROUNDS = (
    "{{ messages | length }} messages\n{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n"
    "Q: {{ m.content }}\n{% else %}A: {{ m.content }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# A text in front that depends on all of the conversation, and pictures in lists of parts.
SYSTEM = (
    "{% set n = messages | selectattr('role', 'equalto', 'user') | list | length %}<|im_start|>system\n"
    "{{ 'Answer ' + n|string + ' questions.' }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    "{{ c.text | trim }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = "<think>\nI look at it.\n</think>\n\n"
PAIRS = {
    "none": (("what?", "red"), ("where?", "left")),
    "first": (("what?", THINK + "red"), ("where?", "left")),
    "last": (("what?", "red"), ("where?", THINK + "left")),
    "both": (("what?", THINK + "red"), ("where?", THINK + "left")),
}
# The whole text, an answer's tokens in brackets.
EXPECTED = {
    ("qwen3", "none"): "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n"
    "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nleft<|im_end|>]\n",
    ("qwen3", "first"): "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n"
    "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nleft<|im_end|>]\n",
    ("qwen3", "last"): "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n"
    f"<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[{THINK}left<|im_end|>]\n",
    ("qwen3", "both"): "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n"
    f"<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n[{THINK}left<|im_end|>]\n",
    ("deepseek", "none"): "<s><|User|>what?<|Assistant|>[red<|end|>]<|User|>where?<|Assistant|>[left<|end|>]",
    ("deepseek", "both"): "<s><|User|>what?<|Assistant|>[\n\nred<|end|>]<|User|>where?<|Assistant|>[\n\nleft<|end|>]",
    ("glm", "first"): "[gMASK]<sop><|user|>\nwhat?<|assistant|>\n[<think></think>\nred<|end|>]<|user|>\n"
    "where?<|assistant|>\n[<think></think>\nleft<|end|>]",
    ("glm", "both"): "[gMASK]<sop><|user|>\nwhat?<|assistant|>\n[<think></think>\nred<|end|>]<|user|>\n"
    "where?<|assistant|>\n[<think>I look at it.</think>\nleft<|end|>]",
    ("rounds", "none"): "4 messages\n[Round 1]\nQ: what?\nA: [red<|end|>]\n\n[Round 2]\nQ: where?\nA: [left<|end|>]",
    ("system", "none"): "<|im_start|>system\nAnswer 2 questions.<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n"
    "<|im_start|>assistant\n[red<|im_end|>]\n<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n"
    "[left<|im_end|>]\n",
}
SOURCES = {"qwen3": QWEN3, "deepseek": DEEPSEEK_R1, "glm": GLM, "rounds": ROUNDS, "system": SYSTEM}


def make_encoder(name, max_length=4096):
    end = "<|im_end|>" if name in ("qwen3", "system") else "<|end|>"
    tokenizer = byte_tokenizer((*IM, "<|end|>", "<s>", "<image>"), eos_token=end, pad_token=end, bos_token="<s>")
    tokenizer.chat_template = SOURCES.get(name, name)
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=CASES["llava-next"],
        template=get_template("chat", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=max_length,
    )


def conversation(pairs):
    turns = tuple(Turn(question=question, answer=answer) for question, answer in pairs)
    return Sample(sample_id="s", images=(), turns=turns)


def bracketed(encoder, sample):
    """The whole text with brackets around each answer's tokens."""
    encoded = encoder(sample)
    decode, text, last = encoder.tokenizer.decode, "", False
    for place, token in enumerate(encoded.input_ids):
        taught = place > 0 and encoded.labels[place - 1] != IGNORE_INDEX
        assert not taught or encoded.labels[place - 1] == token
        text += ("[" if taught and not last else "]" if last and not taught else "") + decode([token])
        last = taught
    return text + ("]" if last else "")


@pytest.mark.parametrize(("name", "kind"), EXPECTED)
def test_what_is_taught_is_what_the_whole_conversation_holds(name, kind):
    encoder = make_encoder(name)
    whole = encoder.tokenizer.apply_chat_template(
        [
            {"role": role, "content": [{"type": "text", "text": text}] if name == "system" else text}
            for pair in PAIRS[kind]
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ],
        tokenize=False,
    )
    found = bracketed(encoder, conversation(PAIRS[kind])).replace("[gMASK", "(gMASK").replace("[Round", "(Round")
    assert found.replace("(", "[") == EXPECTED[name, kind]
    plain = EXPECTED[name, kind].replace("[gMASK]", "(gMASK)").replace("[Round 1]", "(1)").replace("[Round 2]", "(2)")
    whole = whole.replace("[gMASK]", "(gMASK)").replace("[Round 1]", "(1)").replace("[Round 2]", "(2)")
    ends = "<|end|>" if name in ("glm", "rounds") else ""  # the tokenizer's, where the template writes none
    assert plain.replace("[", "").replace("]", "").replace(ends, "") == whole.replace(ends, "")


@pytest.mark.parametrize("name", SOURCES)
def test_an_answer_is_found_whatever_the_texts_are(name):
    """Against what is known of these templates: an answer's last words and its end token close its span."""
    rng = random.Random(0)
    encoder = make_encoder(name)
    words = [
        "red",
        "assistant",
        "<think>",
        "A:",
        "Q: x\nA: y",
        "</s>",
        "\n\n",
        "<b>",
        ">",
        "user\n",
        "é中🙂",
        "[Round 2]",
    ]
    for _ in range(60):
        pairs = []
        for _ in range(rng.randint(1, 4)):
            question, answer = ("".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2))
            why = THINK if rng.random() < 0.4 else ""
            pairs.append((question + "?", f"{why}{answer}."))
        sample = conversation(pairs)
        rendered = encoder.template.render(sample.turns, encoder.tokenizer, has_image=False)
        end = encoder.tokenizer.eos_token
        for (_, answer), (start, stop) in zip(pairs, rendered.answer_spans, strict=True):
            taught = rendered.text[start:stop]
            assert taught.endswith(end)
            visible = answer.rpartition("</think>")[2].strip()
            assert taught.removesuffix(end).rstrip().endswith(visible)
            assert taught.count(visible) >= 1
        encoder(sample)


def test_an_answer_of_which_nothing_is_written_fails_its_sample_alone():
    encoder = make_encoder("qwen3")
    with pytest.raises(SampleError, match=r"sample 's'.*answer of turn 1 cannot be located.*nothing of it"):
        encoder(conversation((("what?", "<think>hm</think>"), ("where?", "left"))))
    encoder(conversation(PAIRS["none"]))


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("{{ raise_exception('only ' + m.role) }}", "only assistant"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "by zero"),
    ],
)
def test_a_template_that_fails_on_some_texts_fails_those_samples_alone(condition, said):
    source = "{%- for m in messages -%}{%- if 'odd' in m.content -%}" + condition + "{%- endif -%}"
    source += "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    source += "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    encoder = make_encoder(source)
    with pytest.raises(SampleError, match=f"sample 's'.*fails on this conversation: .*{said}"):
        encoder(conversation((("what?", "odd"),)))
    encoder(conversation(PAIRS["none"]))


def test_a_template_for_one_turn_fails_longer_conversations_alone():
    source = "{%- if messages | length > 2 -%}{{ raise_exception('one turn') }}{%- endif -%}" + QWEN3
    encoder = make_encoder(source)
    encoder(conversation(PAIRS["last"][1:]))
    with pytest.raises(SampleError, match="one turn"):
        encoder(conversation(PAIRS["none"]))


@pytest.mark.parametrize(
    "source",
    [
        QWEN3.replace("+ content }}", "+ content|upper }}").replace("content.lstrip('\n')", "content|upper"),
        QWEN3.replace("messages[::-1]", "nothing.here"),
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_templates_that_can_mark_no_answer_are_refused_before_the_first_sample(source):
    with pytest.raises(ConfigError, match=r"cannot be located|fails on this conversation"):
        make_encoder(source)


def test_a_template_that_concatenates_strings_gets_strings_also_if_it_knows_pictures():
    source = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% else %}{{ m.content }}<|end|>"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = bracketed(make_encoder(source), conversation(PAIRS["none"]))
    assert found == "user: what?\nassistant: [red<|end|>]\nuser: where?\nassistant: [left<|end|>]\n"


# What stands at the very end of a conversation only: the next answer's header, a second end token, another end token.
ENDINGS = {
    "llama3": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '<|im_start|>\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        "{{ '<|head|>assistant<|im_start|>\n\n' }}",
        "<|head|>user<|im_start|>\n\n{q}<|im_end|><|head|>assistant<|im_start|>\n\n[{a}<|im_end|>]",
        "<|head|>assistant<|im_start|>\n\n",
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|head|>user\n{q}<|im_end|>\n<|head|>assistant\n[{a}<|im_end|>]\n",
        "<|end|>",
    ),
    "no prompt": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n[{a}<|im_end|>]\n",
        "<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("answers", [("red",), ("red", "left"), ("assistant", "user"), ("a", "assistant", "t")])
def test_what_stands_at_the_end_of_a_conversation_only_is_no_part_of_an_answer(name, answers):
    source, turn, ending = ENDINGS[name]
    tokenizer = byte_tokenizer((*IM, "<|head|>", "<|end|>", "<s>", "<image>"), eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = source
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=CASES["llava-next"],
        template=get_template("chat", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=4096,
    )
    pairs = [(f"what {number}?", answer) for number, answer in enumerate(answers)]
    expected = "".join(turn.format(q=question, a=answer) for question, answer in pairs) + ending
    assert bracketed(encoder, conversation(pairs)) == expected
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in encoder.end_token_ids


def test_the_last_answer_may_end_otherwise_than_those_before_it():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '<|end|>' if loop.last and not add_generation_prompt and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turn = "<|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n[{a}{end}]"
    pairs = [("what?", "red"), ("where?", "left"), ("why?", "so")]
    expected = "".join(
        turn.format(q=question, a=answer, end="<|end|>" if answer == "so" else "<|im_end|>")
        for question, answer in pairs
    )
    assert bracketed(make_encoder(source), conversation(pairs)) == expected
