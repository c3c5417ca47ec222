"""The forms in which log-probabilities are written, each read as a `Served`.

Those of vLLM, SGLang and other servers of the OpenAI form; and the caches of DistillKit and NeMo-Aligner.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.distillkit import is_distillkit, read_distillkit
from vlm_distill_cache.stage1_teacher.imports.served import (
    Distribution,
    Served,
    add_entry,
    as_id,
    as_ids,
    as_list,
    as_number,
    as_object,
    shown,
)
from vlm_distill_cache.stage1_teacher.imports.words import TokenWords

FORMS = ("vllm", "sglang", "openai", "distillkit", "nemo")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the body of a response.

    Attributes:
        form: One of `FORMS`, or ``auto``: by what the body holds.
        words: For tokens that are written as texts.
    """

    form: str
    words: TokenWords

    def read(self, body: Mapping[str, Any]) -> Served:
        """What a response says of its sample.

        Raises:
            SampleError: It is no response with log-probabilities, or none of the form; says what it lacks.
        """
        if error := body.get("error"):
            raise SampleError(f"the server answered with an error: {shown(error)}")
        form = self.form if self.form != "auto" else _form_of(body)
        if form == "vllm":
            return self._vllm(body)
        if form == "sglang":
            return _sglang(body)
        if form == "distillkit":
            return read_distillkit(body)
        if form == "nemo":
            return _nemo(body)
        if form == "openai":
            found = self._openai(_choice(body), body)
            if found is not None:
                return found
        if why := why_not(body):
            raise SampleError(why)
        of = "" if self.form == "auto" else f" of the form {self.form}"
        names = ", ".join(map(shown, list(body)[:8]))
        raise SampleError(
            f"the response holds no log-probabilities{of} (it has {names}); expected prompt_logprobs (vLLM), "
            "meta_info.input_token_logprobs (SGLang) or choices[0].logprobs (OpenAI): ask the server for them"
        )

    def _vllm(self, body: Mapping[str, Any]) -> Served:
        """``prompt_logprobs``, at the top or in the first choice, and what was generated behind it."""
        choice = _choice(body)
        entries = _first(body, choice, "prompt_logprobs")
        ids = _first(body, choice, "prompt_token_ids")
        if entries is None:
            raise SampleError("the response has no prompt_logprobs; ask vLLM for them (prompt_logprobs=K)")
        places = _positions(entries)
        tokens: list[int | None]
        if ids is not None and len(as_list(ids, "prompt_token_ids")) == len(places):
            tokens = as_ids(ids, "prompt_token_ids")
        else:  # vLLM writes each token itself first
            tokens = [None if not entry else as_id(next(iter(entry)), "prompt_logprobs") for entry in places]

        def distribution(place: int) -> Distribution | None:
            return _by_id(places[place], f"prompt_logprobs[{place}]")

        return Served(tokens=tokens, distribution=distribution, more=lambda: self._generated(body, choice))

    def _generated(self, body: Mapping[str, Any], choice: Mapping[str, Any]) -> Served:
        """What vLLM generated: ``outputs[0]`` of an offline dump, or the log-probabilities of a choice."""
        outputs = body.get("outputs")
        if isinstance(outputs, list) and outputs:
            output = as_object(outputs[0], "outputs[0]")
            if output.get("logprobs") is not None:
                places = _positions(output["logprobs"])
                tokens = as_ids(output.get("token_ids"), "outputs[0].token_ids")
                if len(tokens) != len(places):
                    raise SampleError(f"outputs[0] has {len(tokens)} token_ids and {len(places)} logprobs")
                return Served(tokens=tokens, distribution=lambda j: _by_id(places[j], f"outputs[0].logprobs[{j}]"))
        found = self._openai(choice, {})
        return Served(tokens=[], distribution=lambda place: None) if found is None else found

    def _openai(self, choice: Mapping[str, Any], body: Mapping[str, Any]) -> Served | None:
        """``logprobs`` of a choice: ``content`` of chats, or lists of tokens (completions; with ``echo`` the prompt too)."""
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict):
            return None
        if isinstance(logprobs.get("content"), list):
            content = [as_object(item, f"logprobs.content[{j}]") for j, item in enumerate(logprobs["content"])]
            own = [(item.get("token"), item.get("bytes"), item.get("logprob")) for item in content]

            def others(j: int) -> list[tuple[Any, Any, Any]]:
                tops = as_list(content[j].get("top_logprobs") or [], f"logprobs.content[{j}].top_logprobs")
                found = [as_object(top, f"logprobs.content[{j}].top_logprobs") for top in tops]
                return [(top.get("token"), top.get("bytes"), top.get("logprob")) for top in found]

        elif isinstance(logprobs.get("tokens"), list):
            values = as_list(logprobs.get("token_logprobs"), "logprobs.token_logprobs")
            tops = as_list(logprobs.get("top_logprobs") or [None] * len(values), "logprobs.top_logprobs")
            if not len(values) == len(tops) == len(logprobs["tokens"]):
                raise SampleError("logprobs.tokens, token_logprobs and top_logprobs differ in length")
            own = [(token, None, value) for token, value in zip(logprobs["tokens"], values, strict=True)]

            def others(j: int) -> list[tuple[Any, Any, Any]]:
                top = as_object(tops[j] or {}, f"logprobs.top_logprobs[{j}]")
                return [(token, None, value) for token, value in top.items()]

        else:
            return None
        ids = choice.get("token_ids")
        stated = as_ids(ids, "token_ids") if isinstance(ids, list) and len(ids) == len(own) else None
        tokens = stated or [
            self.words.id_of(text, data, f"logprobs, token {j}") for j, (text, data, _) in enumerate(own)
        ]

        def distribution(place: int) -> Distribution | None:
            if own[place][2] is None:
                return None
            what = f"logprobs, token {place}"
            first = tokens[place]
            assert first is not None
            found = {first: as_number(own[place][2], what)}
            for text, data, value in others(place):
                same = stated is not None and (text, data) == own[place][:2]
                add_entry(found, first if same else self.words.id_of(text, data, what), as_number(value, what), what)
            return found

        echoed = bool(own) and own[0][2] is None  # of the first token of a prompt there is none
        if echoed:
            return Served(tokens=tokens, distribution=distribution)
        prompt = _first(body, choice, "prompt_token_ids")
        answer = Served(tokens=tokens, distribution=distribution, whole=False)
        if prompt is None:
            return answer
        return Served(
            tokens=as_ids(prompt, "prompt_token_ids"), distribution=lambda place: None, more=lambda: answer
        ).joined()


_INSIDE = ("response", "body", "result", "output", "completion")
_FOUND = ("prompt_logprobs", "choices", "meta_info", "outputs", "input_ids", "tokens")


def body_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body of the response in a row: of a batch file it is in ``response.body``.

    Raises:
        SampleError: The row says that the request failed.
    """
    for _ in _INSIDE:
        if row.get("error"):
            raise SampleError(f"the server answered with an error: {shown(row['error'])}")
        status = row.get("status_code")
        if isinstance(status, int) and status >= 400:
            raise SampleError(f"the server answered with status {status}: {shown(row.get('body'))}")
        inner = next((part for part in map(opened, map(row.get, _INSIDE)) if isinstance(part, dict)), None)
        if inner is None or any(name in row for name in _FOUND):
            break
        row = inner
    return row


def opened(value: Any) -> Any:
    """A value, or what it holds where it is a text of JSON."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def tokens_of(row: Mapping[str, Any]) -> list[int | None] | None:
    """The tokens of a row whose form has no ids of samples; None if it is of another form."""
    try:
        if is_distillkit(row):
            return as_ids(row["input_ids"], "input_ids")
        return list(_nemo(row).tokens) if _is_nemo(row) else None
    except SampleError:
        return None


def why_not(row: Mapping[str, Any]) -> str:
    """Why rows of a tool whose format is known cannot be used; empty for others."""
    if "target_logprobs" in row and "target_token_ids" in row:
        return (
            "this is a data set that axolotl prepared: its probabilities may be scaled to sum to 1 over the likeliest tokens, "
            "which loses the mass of all others, and its versions differ in which token a row is about; import the responses "
            "of the teacher's server instead (vLLM: prompt_logprobs, SGLang: input_token_logprobs)"
        )
    if any(name == "logprobs" or name.endswith("_logprobs") for name, value in row.items() if isinstance(value, list)):
        return (
            "its log-probabilities come without the ids of the tokens that they are about (axolotl's input has none), so they "
            "cannot be compared with the sample; import whole responses of the teacher's server, with prompt_token_ids and "
            "prompt_logprobs"
        )
    if "top_k_logits" in row and "top_k_indices" in row:
        return (
            "these are logits of the likeliest tokens (MaxText) without the sum over all others, so no probability can be had of "
            "them; write log-probabilities, or the log-sum-exp of all logits too (log_sum_exp_logits)"
        )
    return ""


def _is_nemo(body: Mapping[str, Any]) -> bool:
    return all(name in body for name in ("tokens", "labels", "topk_logits", "topk_token_ids", "log_sum_exp_logits"))


def _nemo(body: Mapping[str, Any]) -> Served:
    """NeMo-Aligner's ``compute_topk_logits.py``: row j of the logits follows ``tokens[j]`` and is about ``labels[j]``."""
    tokens, labels = (as_ids(body.get(name), name) for name in ("tokens", "labels"))
    logits, ids, sums = (
        as_list(body.get(name), name) for name in ("topk_logits", "topk_token_ids", "log_sum_exp_logits")
    )
    if not len(tokens) == len(labels) == len(logits) == len(ids) == len(sums):
        raise SampleError("tokens, labels, topk_logits, topk_token_ids and log_sum_exp_logits differ in length")
    ends = next((place for place, label in enumerate(labels[:-1]) if label != tokens[place + 1]), len(tokens))
    if len(set(tokens[ends + 1 :])) > 1:  # behind the last token only padding follows
        raise SampleError(
            "labels are not the tokens shifted by one, so it is not known which token a row of topk_logits is about"
        )

    def distribution(place: int) -> Distribution | None:
        if not place:
            return None
        what = f"topk_logits[{place - 1}]"
        values, words = as_list(logits[place - 1], what), as_list(ids[place - 1], f"topk_token_ids[{place - 1}]")
        total = sums[place - 1][0] if isinstance(sums[place - 1], list) and sums[place - 1] else sums[place - 1]
        if len(values) != len(words):
            raise SampleError(f"{what} has {len(values)} logits for {len(words)} tokens")
        found: dict[int, float] = {}
        for word, value in zip(words, values, strict=True):
            add_entry(found, as_id(word, what), as_number(value, what) - as_number(total, what), what)
        return found

    return Served(tokens=[*tokens[:1], *labels], distribution=distribution)


def _form_of(body: Mapping[str, Any]) -> str:
    if is_distillkit(body):
        return "distillkit"
    if _is_nemo(body):
        return "nemo"
    choice = _choice(body)
    if _first(body, choice, "prompt_logprobs") is not None:
        return "vllm"
    meta = body.get("meta_info")
    if isinstance(meta, dict) and (meta.get("input_token_logprobs") or meta.get("output_token_logprobs")):
        return "sglang"
    return "openai" if choice.get("logprobs") else ""


def _choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = body.get("choices")
    if isinstance(choices, list) and len(choices) > 1:
        raise SampleError(f"the response holds {len(choices)} choices; send one prompt a request, with n=1")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _first(body: Mapping[str, Any], choice: Mapping[str, Any], name: str) -> Any:
    return body.get(name) if body.get(name) is not None else choice.get(name)


def _positions(entries: Any) -> list[dict[Any, Any] | None]:
    """One table a position, whether each is an object, pairs of keys and values, or all lie flat (``FlatLogprobs``)."""
    if isinstance(entries, dict) and "start_indices" in entries:
        flat = {
            name: as_list(entries.get(name), name) for name in ("start_indices", "end_indices", "token_ids", "logprobs")
        }
        ids = as_ids(flat["token_ids"], "token_ids")
        spans = [
            slice(as_id(start, "start_indices"), as_id(end, "end_indices"))
            for start, end in zip(flat["start_indices"], flat["end_indices"], strict=False)
        ]
        return [dict(zip(ids[span], flat["logprobs"][span], strict=False)) or None for span in spans]
    return [
        _position(entry, f"prompt_logprobs[{place}]") for place, entry in enumerate(as_list(entries, "prompt_logprobs"))
    ]


def _position(entry: Any, what: str) -> dict[Any, Any] | None:
    if entry is None or isinstance(entry, dict):
        return {key: value for key, value in entry.items() if value is not None} if entry else None
    found: dict[Any, Any] = {}
    for item in as_list(entry, what):
        if isinstance(item, dict) and {"token_id", "logprob"} <= item.keys():
            found[as_id(item["token_id"], what)] = item["logprob"]
        elif isinstance(item, list | tuple) and len(item) == 2:
            found[as_id(item[0], what)] = item[1]
        else:
            raise SampleError(f"{what} holds {shown(item)}, expected log-probabilities by token id")
    return found or None


def _by_id(entry: Mapping[Any, Any] | None, what: str) -> Distribution | None:
    """``{id: {"logprob": x, ...}}`` or ``{id: x}``."""
    if not entry:
        return None
    found: dict[int, float] = {}
    for key, value in entry.items():
        number = value.get("logprob") if isinstance(value, dict) else value
        add_entry(found, as_id(key, what), as_number(number, f"{what}[{key}]"), what)
    return found


def _sglang(body: Mapping[str, Any]) -> Served:
    """``meta_info``: ``input_token_logprobs`` of the prompt's tokens, ``output_token_logprobs`` of those generated."""
    meta = as_object(body.get("meta_info"), "meta_info")
    ours = meta.get("input_token_logprobs")
    if not ours:
        return _listed(meta, "output", whole=False)
    total = meta.get("prompt_tokens")
    if isinstance(total, int) and not isinstance(total, bool) and total > len(as_list(ours, "input_token_logprobs")):
        raise SampleError(
            f"the response tells {len(ours)} of the prompt's {total} tokens, so the others cannot be compared; ask SGLang for all "
            "of them (logprob_start_len=0)"
        )
    prompt = _listed(meta, "input", whole=True)
    return Served(
        tokens=prompt.tokens,
        distribution=prompt.distribution,
        stand_ins=frozenset({0}),  # what it writes for the numbers that stand for a picture
        more=lambda: _listed(meta, "output", whole=False),
    )


def _listed(meta: Mapping[str, Any], side: str, *, whole: bool) -> Served:
    """``[log-probability, id, text]`` of each token, and a list of such for the likeliest ones in its place."""
    listed = as_list(meta.get(f"{side}_token_logprobs") or [], f"{side}_token_logprobs")
    own = [_triple(item, f"{side}_token_logprobs[{place}]") for place, item in enumerate(listed)]
    tops = as_list(meta.get(f"{side}_top_logprobs") or [None] * len(own), f"{side}_top_logprobs")
    if len(tops) != len(own):
        raise SampleError(
            f"{side}_token_logprobs has {len(own)} tokens, {side}_top_logprobs {len(tops)}; expected as many"
        )

    def distribution(place: int) -> Distribution | None:
        what = f"{side}_top_logprobs[{place}]"
        value, token = own[place]
        found = {} if value is None else {token: as_number(value, what)}
        for item in as_list(tops[place] or [], what):
            number, other = _triple(item, what)
            add_entry(found, other, as_number(number, what), what)
        return found or None

    return Served(tokens=[token for _, token in own], distribution=distribution, whole=whole)


def _triple(item: Any, what: str) -> tuple[Any, int]:
    parts = as_list(item, what)
    if len(parts) < 2:
        raise SampleError(f"{what} is {shown(item)}, expected [logprob, token id, text]")
    return parts[0], as_id(parts[1], what)
