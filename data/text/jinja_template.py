"""Our prompt templates as the model library's chat templates: jinja that writes what `PromptTemplate.render` writes.

Messages hold texts or lists of parts, as ``[{"type": "image"}, {"type": "text", "text": "..."}]``.
"""

from typing import Any

from vlm_distill_cache.data.text.chat import takes_parts
from vlm_distill_cache.data.text.templates import PromptTemplate

# Leaves `text` and `shows`, of one message.
_READ = (
    "{%- set found = namespace(text='', shows=false) -%}"
    "{%- if message['content'] is string -%}{%- set found.text = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set found.shows = true -%}"
    "{%- elif part['type'] == 'text' -%}{%- set found.text = found.text + part['text'] -%}"
    "{%- else -%}{{- raise_exception('this model reads texts and pictures, got a part of type ' + part['type']) -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
)
_TURNS = (
    "{{%- set past = namespace(system={system}, begun=false) -%}}"
    "{{%- for message in messages -%}}"
    + _READ.replace("{", "{{").replace("}", "}}")
    + "{{%- if message['role'] == 'system' -%}}"
    "{{%- if past.begun or not past.system -%}}"
    "{{{{- raise_exception('this model takes {no_system}') -}}}}{{%- endif -%}}"
    "{{%- if found.text | trim -%}}{{%- set past.system = found.text | trim + ' ' -%}}{{%- endif -%}}"
    "{{%- elif message['role'] == 'user' -%}}"
    "{{%- if past.begun and {one_turn} -%}}{{{{- raise_exception('this model takes one question') -}}}}{{%- endif -%}}"
    "{{%- if not past.begun -%}}"
    "{{%- if {bos} and not found.shows -%}}{{{{- bos_token -}}}}{{%- endif -%}}{{{{- past.system -}}}}"
    "{{%- set past.begun = true -%}}{{%- endif -%}}"
    "{{{{- {before_question} -}}}}"
    "{{%- if found.shows -%}}{{{{- {image_token} -}}}}{{%- if {bos} -%}}{{{{- bos_token -}}}}{{%- endif -%}}"
    "{{{{- {after_image} -}}}}{{%- endif -%}}"
    "{{%- if not {drops_question} -%}}{{{{- found.text | trim -}}}}{{%- endif -%}}"
    "{{%- elif message['role'] == 'assistant' -%}}"
    "{{{{- {before_answer} + {blank} + found.text | trim -}}}}{{{{- {answer_end} -}}}}"
    "{{%- else -%}}{{{{- raise_exception('unknown role ' + message['role']) -}}}}{{%- endif -%}}"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- {before_answer} -}}}}{{%- endif -%}}"
)
# For templates that know texts only: the picture is written in front of its question, as in training.
_AS_TEXTS = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    + _READ
    + "{%- set text = (IMAGE + '\\n' if found.shows else '') + found.text | trim -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)


def chat_template_of(template: PromptTemplate, tokenizer: Any, image_token: str, *, adds_rest: bool = False) -> str:
    """A prompt template as jinja.

    With ``add_generation_prompt`` it ends where the answer's blank begins. A checkpoint's own chat template stays as it
    is; one that knows texts only is given texts.

    Args:
        tokenizer: Gives the special tokens; its end-of-sequence token stands behind answers.
        image_token: What is written for a picture.
        adds_rest: Whether the model's processor writes by itself what stands between picture and question and in front of
            the answer (PaliGemma's).
    """
    if template.chat_template:
        source = template.chat_template
        if takes_parts(source, tokenizer, image_token):
            return source
        return _AS_TEXTS.replace("IMAGE", ascii(image_token)) + source
    drop = adds_rest and template.bos_after_image
    return _TURNS.format(
        system=ascii(template.system),
        no_system="its system prompt in front only" if template.system else "no system prompt",
        one_turn=str(template.holds_one_turn).lower(),
        bos=str(template.bos_after_image and not drop).lower(),
        drops_question=str(template.drops_question).lower(),
        before_question=ascii(template.before_question),
        image_token=ascii(image_token),
        after_image=ascii(template.after_image),
        before_answer=ascii("" if drop else template.before_answer),
        blank=ascii(template.blank),
        answer_end="eos_token" if template.answer_end is None else ascii(template.answer_end),
    )
