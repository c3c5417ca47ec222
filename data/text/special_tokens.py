"""Special tokens that a template writes as text: each must become its own id, whatever stands around it.

Some checkpoints publish theirs as ``normalized: true``. The `tokenizers` package then looks for them in the normalised
text. Where the normaliser puts a blank in front of every text (Llama's), it puts one in front of the token, too: it does
not find the end of ``.</s>``, which falls apart into characters, and takes the blank of ``: <image>`` into the token. The
slow tokenizers that these models were trained with look for the token as it stands. So does what is made here, and only
where a template's texts show that it must be: a token that is found stays as it is.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.text.sentencepiece_model import SentencePieceTokenizer
from vlm_distill_cache.data.text.tokenizer_trial import is_failure

_TAG = re.compile(r"<\S+>|\[\S+\]")
_CLOSING_TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")


def is_no_text(token: Any) -> bool:
    """Whether an added token is one such as ``<|im_end|>`` or ``</s>``, and not one for speed, as runs of blanks."""
    return bool(token.special or _TAG.fullmatch(str(token)))


def pattern_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some words, the longest that stands at a place; nothing if there are none."""
    named = sorted(set(words) - {""}, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in named) or r"(?!)")


def read_texts(tokenizer: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids i8 ``[T]`` and character ranges i8 ``[T, 2]`` of each text, without special tokens around it.

    Raises:
        SampleError: The tokenizer fails on a text.
    """
    try:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # what is too long is refused by the encoder, with its sample's name
        )
    except BaseException as error:
        if not is_failure(error):
            raise
        raise SampleError(f"the tokenizer cannot read its text: {str(error) or type(error).__name__}") from error
    return [
        (np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def find_special_tokens(tokenizer: Any, texts: Sequence[str], source: str = "") -> Any:
    """A tokenizer that reads each special token of some texts as its id: the given one if it does.

    Args:
        texts: Conversations as a template writes them.
        source: The template's; it may name more tokens, which it writes in other conversations.

    Raises:
        ConfigError: A token of the texts is not found whatever is done.
    """
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if is_no_text(token)]
    others = [f"a{name}b" for name in names if name in source and not any(name in text for text in texts)]
    lost = _lost(tokenizer, tokenizer, [*texts, *others], blanks=True)
    if not lost:
        return tokenizer
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        if token["content"] in lost:
            token.update(normalized=False, single_word=False)
    backend = Tokenizer.from_str(json.dumps(described))
    if isinstance(tokenizer, SentencePieceTokenizer):  # its backend reads no text
        mended = tokenizer.with_backend(backend)
    else:
        mended = PreTrainedTokenizerFast(tokenizer_object=backend)
    still = _lost(tokenizer, mended, texts, blanks=False)
    if still:
        raise ConfigError(
            f"the tokenizer does not read {', '.join(map(repr, still))}, which the prompt template writes, as one token: "
            f"{_shown(mended, texts, still[0])}; correct its entry in added_tokens of tokenizer.json, or choose "
            "another template"
        )
    return mended


def check_end_token(ids: np.ndarray, offsets: np.ndarray, text: str, span: tuple[int, int], tokenizer: Any) -> None:
    """Refuse a conversation whose answer ends with a tag that is no token.

    Args:
        ids: i8 ``[T]``.
        offsets: Their characters, i8 ``[T, 2]``.
        span: The answer's characters, its end included; the answer itself ends with none of ``<``, ``>``, ``[`` and ``]``.

    Raises:
        ConfigError: It would be taught as text.
    """
    closing = _CLOSING_TAG.search(text, *span)
    if closing is None:
        return
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside = (starts < closing.end(1)) & (ends > closing.start(1))
    if int(inside.sum()) > 1:
        raise ConfigError(
            f"the prompt template ends an answer with {closing[1]!r}, which is no token of the tokenizer: it would be taught "
            f"as {tokenizer.convert_ids_to_tokens(ids[inside].tolist())}; use the template and the tokenizer of one "
            "checkpoint, or choose another template"
        )


def _lost(tokenizer: Any, reader: Any, texts: Sequence[str], *, blanks: bool) -> list[str]:
    """Special tokens of the texts that a reader does not find; with ``blanks`` those, too, with which it takes a blank."""
    tokens = {
        str(token): (index, token) for index, token in tokenizer.added_tokens_decoder.items() if is_no_text(token)
    }
    pattern = pattern_of(tokens)
    lost: dict[str, None] = {}
    for text, (ids, offsets) in zip(texts, read_texts(reader, texts), strict=True):
        counted, places = Counter(ids.tolist()), set(zip(ids.tolist(), *offsets.T.tolist(), strict=True))
        written = Counter(pattern.findall(text))
        lost |= dict.fromkeys(word for word, count in written.items() if counted[tokens[word][0]] < count)
        for found in pattern.finditer(text) if blanks else ():
            index, token = tokens[found.group()]
            if not (token.lstrip or token.rstrip or (index, *found.span()) in places):
                lost[found.group()] = None
    return list(lost)


def _shown(reader: Any, texts: Sequence[str], word: str) -> list[str]:
    """How a reader reads a word in the first text that holds it."""
    text = next(text for text in texts if word in text)
    start = text.index(word)
    ids, offsets = read_texts(reader, [text])[0]
    inside = (offsets[:, 0] < start + len(word)) & (offsets[:, 1] > start)
    return list(reader.convert_ids_to_tokens(ids[inside].tolist()))
