"""A tokenizer that is a sentencepiece model and nothing else (``tokenizer.model``, as MobileVLM is published).

The model library makes merges of it in the order of the vocabulary, not of the pieces' scores, so that runs of blanks
become tokens that the model never saw. Here a plain BPE model (Llama's and its descendants': no normalisation, no
symbols of the user's) becomes a `tokenizers` BPE with its merges in the order of the scores, which finds the same
pieces and is stored as a tokenizer.json. Any other model has steps that the `tokenizers` package does otherwise or not at
all (character maps, Viterbi sums in another precision, frozen symbols): there the sentencepiece package itself finds
the pieces, and what is stored is the tokenizer.model again.

Text around special tokens is read as the library's slow ``LlamaTokenizer`` read it in training: with ``legacy`` (true
or not stated) each part between special tokens is a text of its own, which a blank is put in front of; without it only
the beginning of the whole text gets one.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.locations import by_make

MODEL_FILE = "tokenizer.model"
_BLANK = "\u2581"
_UNIGRAM, _WHOLE_BPE = 1, 2  # of trainer_spec.model_type; 3: words, 4: characters
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5  # of a piece's type
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_AGAIN = "copy or download the file again"


def is_model_only(folder: Path) -> bool:
    """Whether a folder's tokenizer is a sentencepiece model without a tokenizer.json.

    Llama 3 publishes a file of the same name that is a list of byte strings; the library reads that.
    """
    path = Path(folder) / MODEL_FILE
    if not path.is_file() or (Path(folder) / "tokenizer.json").is_file():
        return False
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(4096)) is None


def load_sentencepiece_tokenizer(folder: Path) -> Any:
    """Make the fast tokenizer of a folder with a ``tokenizer.model``.

    Special tokens, added tokens and settings come from ``tokenizer_config.json``, ``special_tokens_map.json`` and
    ``added_tokens.json``, as far as they are there.

    Returns:
        A tokenizer of the library's, whose ids are those of the sentencepiece package.

    Raises:
        ModelError: If sentencepiece is not installed, the file is no whole sentencepiece model of the kinds BPE and
            unigram, or the settings beside it contradict it.
    """
    folder = Path(folder)
    proto = _read_model(folder / MODEL_FILE)
    settings = _read_settings(folder, proto)
    pieces = [piece.piece for piece in proto.pieces]
    for index, token in settings.added.items():  # some checkpoints rename placeholders of the model
        if index < len(pieces) and token.content not in pieces:
            pieces[index] = token.content
    plain = _is_plain_bpe(proto)
    backend = _plain_bpe(proto, pieces, settings) if plain else _words(proto, pieces, settings)
    kind = _FromObject if plain else SentencePieceTokenizer
    tokenizer = kind.from_pretrained(folder, tokenizer_object=backend, local_files_only=True, **settings.arguments)
    for index, token in settings.added.items():
        found = tokenizer.convert_tokens_to_ids(token.content)
        if found != index:
            raise ModelError(
                f"{folder}: its files give token {token.content!r} the id {index}, behind the {len(pieces)} pieces of "
                f"{MODEL_FILE} it comes to {found}; {MODEL_FILE} and the files beside it belong to two models: {_AGAIN}"
            )
    if plain:
        tokenizer.__class__ = PreTrainedTokenizerFast  # it is saved as a tokenizer.json like any other
    else:
        tokenizer.pieces = _Pieces.of(proto, settings)
    return tokenizer


class _FromObject(PreTrainedTokenizerFast):
    """Takes the tokenizer that it is given, and not the library's own conversion of ``tokenizer.model``."""

    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012 - as the library declares it

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """What the class is made with; the library's hook."""
        return {name: value for name, value in kwargs.items() if name not in ("vocab_file", "tokenizer_file")}


class SentencePieceTokenizer(_FromObject):
    """A fast tokenizer whose pieces, and where they stand in the text, the sentencepiece package finds.

    Attributes:
        pieces: Finds them.
    """

    pieces: "_Pieces"

    def _encode_plus(
        self,
        text: str | Sequence[str],
        text_pair: Any = None,
        add_special_tokens: bool = True,
        *,
        max_length: int | None = None,
        truncation_strategy: Any = "do_not_truncate",
        padding_strategy: Any = "do_not_pad",
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_offsets_mapping: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Ids, and with ``return_offsets_mapping`` the characters of each; the library's hook behind a call."""
        if text_pair is not None or any(
            kwargs.get(name)
            for name in ("is_split_into_words", "return_overflowing_tokens", "return_special_tokens_mask")
        ):
            raise NotImplementedError("this tokenizer reads whole texts, not pairs, words or pieces that overflow")
        before = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        after = [self.eos_token_id] if add_special_tokens and self.add_eos_token else []
        found: dict[str, list[Any]] = {"input_ids": [], "offset_mapping": []}
        cut = slice(None)
        if max_length is not None and getattr(truncation_strategy, "value", truncation_strategy) != "do_not_truncate":
            cut = slice(max_length) if self.truncation_side == "right" else slice(-max_length, None)
        single = isinstance(text, str)
        for one in [str(text)] if single else text:
            ids, offsets = self.pieces.encode(one, self.added_tokens_decoder)
            found["input_ids"].append([*before, *ids, *after][cut])
            found["offset_mapping"].append([*[(0, 0)] * len(before), *offsets, *[(0, 0)] * len(after)][cut])
        if not return_offsets_mapping:
            del found["offset_mapping"]
        return self.pad(
            {name: rows[0] for name, rows in found.items()} if single and return_tensors is None else found,
            padding=padding_strategy,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def tokenize(self, text: str, pair: Any = None, add_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """The pieces of a text."""
        tokens: list[str] = self.convert_ids_to_tokens(self(text, pair, add_special_tokens)["input_ids"])
        return tokens

    def with_backend(self, backend: Tokenizer) -> "SentencePieceTokenizer":
        """The same pieces between the added tokens of another backend."""
        other = copy.copy(self)
        other._tokenizer = backend
        return other

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Write ``tokenizer.model``: a tokenizer.json cannot say what this tokenizer does.

        The library leaves added tokens and what stands around a text out of tokenizer_config.json, as it has them in the
        tokenizer.json of others. They are written where the rest does not give them again.
        """
        folder = Path(save_directory)
        path = folder / (f"{filename_prefix}-{MODEL_FILE}" if filename_prefix else MODEL_FILE)
        path.write_bytes(self.pieces.model)
        if filename_prefix or load_sentencepiece_tokenizer(folder)._stated() != self._stated():
            config = folder / Path(file_names[0]).name
            config.write_text(
                json.dumps(_read_object(config) | self._stated(), indent=2, sort_keys=True, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
        return (*file_names, str(path))

    def _stated(self) -> dict[str, Any]:
        """What of this tokenizer stands beside its model, as tokenizer_config.json says it."""
        return {
            "added_tokens_decoder": {
                str(index): token.__getstate__() for index, token in self.added_tokens_decoder.items()
            },
            "add_bos_token": bool(self.add_bos_token),
            "add_eos_token": bool(self.add_eos_token),
            **{name: self.special_tokens_map.get(name) for name in _NAMED},
        }


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """A sentencepiece model between special tokens.

    Attributes:
        model: The file's bytes.
        beginning: With the blank in front of a text, where the model puts one there.
        inner: Without it.
        legacy: Whether each part of a text between special tokens is a text of its own.
        keeps_blank: Whether a part that begins with blanks must be read as one that gets a blank in front.
    """

    model: bytes
    beginning: Any
    inner: Any
    legacy: bool
    keeps_blank: bool

    @classmethod
    def of(cls, proto: Any, settings: "_Settings") -> "_Pieces":
        from sentencepiece import SentencePieceProcessor

        model = proto.SerializeToString()
        proto.normalizer_spec.add_dummy_prefix = settings.prefix
        beginning = SentencePieceProcessor(model_proto=proto.SerializeToString())
        proto.normalizer_spec.add_dummy_prefix = False
        return cls(
            model=model,
            beginning=beginning,
            inner=SentencePieceProcessor(model_proto=proto.SerializeToString()),
            legacy=settings.legacy,
            keeps_blank=proto.normalizer_spec.remove_extra_whitespaces,
        )

    def encode(self, text: str, added: Mapping[int, AddedToken]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges of a text in which added tokens may stand."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, index in self._parts(text, added):
            if index is not None:
                ids.append(index)
                offsets.append((start, end))
                continue
            part = text[start:end]
            begins = self.legacy or start == 0 or (self.keeps_blank and part.startswith(" "))
            found = (self.beginning if begins else self.inner).EncodeAsOffsetMapping(part)
            ids += found["ids"]
            offsets += [(start + first, start + last) for first, last in found["offsets"]]
        return ids, offsets

    def _parts(self, text: str, added: Mapping[int, AddedToken]) -> Iterator[tuple[int, int, int | None]]:
        """Where the added tokens of a text and what is between them stand, with the ids of the former."""
        pattern, ids = self._pattern(tuple(added.items()))
        last = 0
        for match in pattern.finditer(text):
            if match.start() > last:
                yield last, match.start(), None
            yield match.start(), match.end(), ids[str(match.lastgroup)]
            last = match.end()
        if last < len(text):
            yield last, len(text), None

    @cached_property
    def _patterns(self) -> dict[tuple[tuple[int, str], ...], tuple[re.Pattern[str], dict[str, int]]]:
        return {}

    def _pattern(self, added: tuple[tuple[int, AddedToken], ...]) -> tuple[re.Pattern[str], dict[str, int]]:
        """The expression of some added tokens, longer ones first, and the id of each group's name."""
        key = tuple((index, _expression(token)) for index, token in added)
        if key not in self._patterns:
            longest = sorted(added, key=lambda pair: len(pair[1].content), reverse=True)
            words = [f"(?P<t{index}>{_expression(token)})" for index, token in longest]
            self._patterns[key] = re.compile("|".join(words) or r"(?!)"), {f"t{index}": index for index, _ in added}
        return self._patterns[key]


def _expression(token: AddedToken) -> str:
    word = re.escape(token.content)
    if token.single_word:
        word = rf"(?<!\w){word}(?!\w)"
    return (r"\s*" if token.lstrip else "") + word + (r"\s*" if token.rstrip else "")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What stands beside a model, and in it, about its special tokens.

    Attributes:
        legacy: Whether each part of a text between special tokens is a text of its own.
        prefix: Whether a text gets a blank in front.
        added: Tokens whose ids the files state.
        arguments: Of the tokenizer's class.
    """

    legacy: bool
    prefix: bool
    added: Mapping[int, AddedToken]
    arguments: Mapping[str, Any]


def _read_model(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise ModelError(
            f"{path.parent}: its tokenizer is a {MODEL_FILE}, which needs sentencepiece and protobuf ({error}); run "
            f"{by_make('`make setup` or ')}`pip install sentencepiece protobuf`"
        ) from error
    proto, content = sentencepiece_model_pb2.ModelProto(), path.read_bytes()
    try:
        proto.ParseFromString(content)
        SentencePieceProcessor(model_proto=content)
    except Exception as error:  # of any class: both are extensions that raise what they like
        raise ModelError(
            f"{path}: {len(content)} bytes that are no whole sentencepiece model ({str(error).strip()}); {_AGAIN}"
        ) from error
    if not (proto.pieces and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise ModelError(
            f"{path}: {len(content)} bytes, {len(proto.pieces)} pieces, and not the settings that end a sentencepiece "
            f"model: it is cut off; {_AGAIN}"
        )
    if proto.trainer_spec.model_type not in (_UNIGRAM, _WHOLE_BPE):
        raise ModelError(
            f"{path}: a sentencepiece model of type {proto.trainer_spec.model_type} (3: words, 4: characters), expected "
            "1 (unigram) or 2 (BPE); use a model whose tokenizer is of one of these"
        )
    return proto


def _read_settings(folder: Path, proto: Any) -> _Settings:
    config = _read_object(folder / "tokenizer_config.json")
    named = {name: config[name] for name in _NAMED if name in config}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    stated = config.get("added_tokens_decoder")
    try:
        if stated is None:
            older = _read_object(folder / "special_tokens_map.json")
            named |= {name: older[name] for name in _NAMED if name in older}
            extra = older.get("additional_special_tokens") or extra
            stated = {index: token for token, index in _read_object(folder / "added_tokens.json").items()}
            special = {_content(token) for token in [*named.values(), *(extra or [])]}
        else:
            special = {_content(token) for token in named.values()}
        added = {int(index): _token(value, special=_content(value) in special) for index, value in stated.items()}
        for name, index in _of_model(proto).items():
            named.setdefault(name, proto.pieces[index].piece)
        arguments: dict[str, Any] = {
            name: None if value is None else _token(value, special=True) for name, value in named.items()
        }
        if isinstance(extra, list):
            arguments["extra_special_tokens"] = [_token(value, special=True) for value in extra]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder}: the special tokens in tokenizer_config.json, special_tokens_map.json or added_tokens.json are not "
            f"as a tokenizer's save_pretrained writes them ({error!r}); {_AGAIN}"
        ) from error
    bos = config.get("add_bos_token")
    return _Settings(
        legacy=config.get("legacy") is not False,
        prefix=bool(proto.normalizer_spec.add_dummy_prefix) and config.get("add_prefix_space") is not False,
        added=added,
        arguments={
            **arguments,
            "added_tokens_decoder": added,
            "add_bos_token": arguments.get("bos_token") is not None if bos is None else bool(bos),
            "add_eos_token": bool(config.get("add_eos_token")),
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def _of_model(proto: Any) -> dict[str, int]:
    """Special tokens that the model itself has, by name."""
    trainer = proto.trainer_spec
    ids = {
        "unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id,
    }  # fmt: skip
    return {name: index for name, index in ids.items() if 0 <= index < len(proto.pieces)}


def _content(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _token(value: Any, *, special: bool) -> AddedToken:
    """A token as the files describe it; found in the text as it stands, as the slow tokenizer did."""
    described = value if isinstance(value, dict) else {}
    return AddedToken(
        _content(value),
        single_word=bool(described.get("single_word")),
        lstrip=bool(described.get("lstrip")),
        rstrip=bool(described.get("rstrip")),
        special=special or bool(described.get("special")),
        normalized=False,
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: no readable JSON ({error}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(found).__name__}; {_AGAIN}")
    return found


def _is_plain_bpe(proto: Any) -> bool:
    """Whether merges in the order of scores find the same pieces as sentencepiece does.

    Of pieces with one score it merges the leftmost pair first, which an order of pairs can follow for runs of blanks only:
    there the longer left side goes first.
    """
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type != _WHOLE_BPE
        or trainer.treat_whitespace_as_suffix
        or spec.precompiled_charsmap
        or spec.remove_extra_whitespaces
        or not spec.escape_whitespaces
        or any(piece.type in (_USER_DEFINED, _UNUSED) for piece in proto.pieces)
    ):
        return False
    normal = [piece for piece in proto.pieces if piece.type == _NORMAL]
    letters = {piece.piece for piece in normal if len(piece.piece) == 1}
    merged = [piece for piece in normal if len(piece.piece) > 1]
    shared = {score for score, count in Counter(piece.score for piece in merged).items() if count > 1}
    blanks = all(not piece.piece.strip(_BLANK) for piece in merged if piece.score in shared)
    return blanks and all(letters.issuperset(piece.piece) for piece in merged)


def _plain_bpe(proto: Any, pieces: Sequence[str], settings: _Settings) -> Tokenizer:
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (piece[:at], piece[at:])
        for piece in scores
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    merges.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token=pieces[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    blanks: list[Any] = [normalizers.Replace(" ", _BLANK)]
    if settings.prefix and settings.legacy:
        blanks.insert(0, normalizers.Prepend(_BLANK))
    elif settings.prefix:
        # No blank is left, so the first step puts one in front of a text whatever it begins with.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="never", split=False),
            ]
        )
    tokenizer.normalizer = normalizers.Sequence(blanks)
    tokenizer.decoder = _decoder(settings)
    return tokenizer


def _words(proto: Any, pieces: Sequence[str], settings: _Settings) -> Tokenizer:
    """Names of ids and back, and the text of ids; it reads no text."""
    tokenizer = Tokenizer(
        WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=pieces[proto.trainer_spec.unk_id])
    )
    tokenizer.decoder = _decoder(settings)
    return tokenizer


def _decoder(settings: _Settings) -> Any:
    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if settings.prefix else steps)
