"""Our prompt templates as the model library's chat templates: jinja that writes what `PromptTemplate.render` writes.

Messages hold texts or lists of parts, as ``[{"type": "image"}, {"type": "text", "text": "..."}]``.
"""

from collections.abc import Iterator
from typing import Any

from vlm_distill_cache.data.text.chat import takes_parts
from vlm_distill_cache.data.text.templates import PromptTemplate

# Leaves a message's text in `found.text`, and whether it shows a picture in `found.shows`.
_READ = """\
{%- set found = namespace(text='', shows=false) -%}
{%- if message['content'] is string -%}
{%- set found.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set found.shows = true -%}
{%- elif part['type'] == 'text' -%}
{%- set found.text = found.text + part['text'] -%}
{%- else -%}
{{- raise_exception('this model reads texts and pictures, got a part of type ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""
# For templates that know texts only: the picture is written in front of its question, as in training.
_AS_TEXTS = (
    "{%- set flat = namespace(messages=[]) -%}\n{%- for message in messages -%}\n"
    + _READ
    + "{%- set text = (IMAGE if found.shows else '') + found.text | trim -%}\n"
    "{%- set flat.messages = flat.messages + [dict(message, content=text)] -%}\n"
    "{%- endfor -%}\n{%- set messages = flat.messages -%}\n"
)
# For a checkpoint's own template: texts without blanks around them, as `PromptTemplate.render` gives them to it.
_TRIMMED = """\
{%- set trimmed = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set trimmed.messages = trimmed.messages + [dict(message, content=message['content'] | trim)] -%}
{%- else -%}
{%- set trimmed.parts = [] -%}
{%- for part in message['content'] -%}
{%- set alone = message['content'] | selectattr('type', 'equalto', 'text') | list | length == 1 -%}
{%- set trimmed.parts = trimmed.parts + [dict(part, text=part['text'] | trim) if alone and part['type'] == 'text' else part] -%}
{%- endfor -%}
{%- set trimmed.messages = trimmed.messages + [dict(message, content=trimmed.parts)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = trimmed.messages -%}
"""


def chat_template_of(template: PromptTemplate, tokenizer: Any, image_token: str, *, adds_rest: bool = False) -> str:
    """A prompt template as jinja.

    With ``add_generation_prompt`` it ends where the answer's blank begins. A checkpoint's own chat template is given texts
    without blanks around them; one that knows texts only is given texts.

    Args:
        tokenizer: Gives the special tokens; its end-of-sequence token stands behind answers.
        image_token: What is written for a picture.
        adds_rest: Whether the model's processor writes by itself what stands between picture and question and in front of
            the answer (PaliGemma's).
    """
    if template.chat_template:
        source = template.chat_template
        if takes_parts(source, tokenizer, image_token):
            return source if source.startswith(_TRIMMED) else _TRIMMED + source
        return _AS_TEXTS.replace("IMAGE", ascii(f"{image_token}\n")) + source
    return "\n".join(_statements(template, image_token, adds_rest=adds_rest and template.bos_after_image))


def _statements(template: PromptTemplate, image_token: str, *, adds_rest: bool) -> Iterator[str]:
    writes_bos = template.bos_after_image and not adds_rest
    asks = [] if adds_rest else [template.before_answer]
    yield f"{{%- set past = namespace(system={template.system!a}, begun=false) -%}}"
    yield "{%- for message in messages -%}"
    yield _READ.rstrip()
    yield "{%- if message['role'] == 'system' -%}"
    if template.system:
        yield "{%- if past.begun -%}"
        yield "{{- raise_exception('this model takes its system prompt in front only') -}}"
        yield "{%- elif found.text | trim -%}"
        yield "{%- set past.system = found.text | trim + ' ' -%}"
        yield "{%- endif -%}"
    else:
        yield "{{- raise_exception('this model takes no system prompt') -}}"
    yield "{%- elif message['role'] == 'user' -%}"
    yield "{%- if not past.begun -%}"
    if writes_bos:
        yield "{%- if not found.shows -%}{{- bos_token -}}{%- endif -%}"
    yield "{{- past.system -}}"
    yield "{%- set past.begun = true -%}"
    if template.holds_one_turn:
        yield "{%- else -%}"
        yield "{{- raise_exception('this model takes one question') -}}"
    yield "{%- endif -%}"
    yield _write(template.before_question)
    yield "{%- if found.shows -%}"
    yield _write(image_token) + ("{{- bos_token -}}" if writes_bos else "") + _write(template.after_image)
    yield "{%- endif -%}"
    if not template.drops_question:
        yield "{{- found.text | trim -}}"
    yield "{%- elif message['role'] == 'assistant' -%}"
    yield _write(*asks, template.blank) + "{{- found.text | trim -}}"
    yield "{{- eos_token -}}" if template.answer_end is None else _write(template.answer_end)
    yield "{%- else -%}"
    yield "{{- raise_exception('unknown role ' + message['role']) -}}"
    yield "{%- endif -%}"
    yield "{%- endfor -%}"
    if any(asks):
        yield "{%- if add_generation_prompt -%}" + _write(*asks) + "{%- endif -%}"


def _write(*texts: str) -> str:
    """A statement that writes texts as they are."""
    text = "".join(texts)
    return f"{{{{- {text!a} -}}}}" if text else ""
