"""What ``cachectl inspect CACHE SAMPLE_ID`` says: the answer, what the teacher thought likely, where it looked."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_distill_cache.common.cache.plan import BASE
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.result_files import PICTURE_MARK
from vlm_distill_cache.common.tools.picture import (
    ASCII,
    BLOCKS,
    check_pictures,
    draw_picture,
    draw_text,
    open_images,
    word_maps,
)
from vlm_distill_cache.common.tools.views import MOST_STILLS, media_words, shots_of

if TYPE_CHECKING:
    from PIL.Image import Image


_MAX_ROWS = 40  # shown
_MAX_WORDS = 28  # as text
_MAX_DRAWN = 100  # in the picture
_MAX_MAPS = 400  # in the picture of a sample with several views
_TOP = 4
FIRST_IDEOGRAPH = 0x2E80
"""From here on scripts write no spaces."""
_CUT = "\ufffd"  # what a decoder makes of a character of which a part is missing
_TOKENIZER = "processor/tokenizer.json"
_SOFTWARE = 0x0131  # the tag of EXIF


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """Turns token ids into text with a cache's own tokenizer, or into numbers if there is none.

    Attributes:
        special: Ids of tokens such as the end of the answer.
    """

    decode: Callable[[Sequence[int]], str]
    special: frozenset[int] = frozenset()

    def of(self, token: int) -> str:
        """Return one token's text, safe to print."""
        return one_line(self.decode([token]), limit=40) or f"#{token}"

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Join the tokens of a text into words; special tokens are none."""
        words: list[list[int]] = []
        for position, token in enumerate(ids):
            if token in self.special:
                continue
            if words and words[-1][-1] == position - 1 and self._joins(ids, words[-1][0], position):
                words[-1].append(position)
            else:
                words.append([position])
        texts = (one_line(self.decode([ids[row] for row in rows]).strip(), limit=40) for rows in words)
        return [(text or f"#{ids[rows[0]]}", rows) for text, rows in zip(texts, words, strict=True)]

    def _joins(self, ids: Sequence[int], start: int, position: int) -> bool:
        """Whether a token goes on with the word that began at ``start``; only decoding the two together tells."""
        before = self.decode([*ids[start:position]])
        if before.endswith(_CUT) or not before.strip():
            return True  # so far it is part of a character, or only the space before one
        end = position + 1
        while (text := self.decode([*ids[start:end]])).endswith(_CUT) and end < min(position + 4, len(ids)):
            end += 1
        piece = text.removeprefix(before)
        # Punctuation stands alone, and so do characters of scripts that write no spaces.
        return bool(piece) and piece[0].isalnum() and ord(piece[0]) < FIRST_IDEOGRAPH


def load_token_text(cache: TeacherCache) -> TokenText:
    """Load the tokenizer that lies in a cache, if there is one and it can be read."""
    if _TOKENIZER not in cache.manifest.files:
        return TokenText(decode=_numbers)
    cache.check_side_files([_TOKENIZER])
    return read_token_text(cache.path)


def read_token_text(folder: Path) -> TokenText:
    """As `load_token_text`, of a folder that need not be sealed; its file is not compared with any digest."""
    try:
        from tokenizers import Tokenizer  # numbers do without it
    except ImportError:
        return TokenText(decode=_numbers)
    try:
        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    except Exception:  # noqa: BLE001 - tokenizers raises the bare class for whatever it cannot read
        return TokenText(decode=_numbers)

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
        return text or " ".join(tokenizer.id_to_token(token) or f"#{token}" for token in ids)

    special = (number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return TokenText(decode=decode, special=frozenset(special))


def _numbers(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def describe_record(cache: TeacherCache, sample_id: str, *, unicode: bool = True) -> str:
    """Describe one record: its answer, the teacher's likeliest tokens, where it looked, its fields."""
    record, text = cache.read(sample_id), load_token_text(cache)
    labels = record["labels"].tolist()
    lines = [f"sample {one_line(sample_id)} of {cache.path}, shard {cache.shard_of(sample_id)}"]
    lines += ["", f"answer: {' '.join(text.of(token) for token in labels[:_MAX_ROWS])}"]
    lines += _token_lines(record, text, cache.plan.signals.get(LogitCodec.signal))
    words, shots = text.words(labels), shots_of(record)
    if len(shots) > 1:
        lines.insert(1, f"shows {media_words(record)}")
    most = _MAX_WORDS if len(shots) < 2 else max(1, 4 * _MAX_WORDS // min(len(shots), MOST_STILLS))
    if maps := word_maps(record, cache.plan, words[: min(most, _MAX_WORDS)]):
        lines += [
            "",
            "attention per word (%: share of attention on the image)",
            "",
        ]
        lines += draw_text(maps, shades=BLOCKS if unicode else ASCII, shots=shots)
        if len(words) > len(maps):
            lines.append(f"... and {len(words) - len(maps)} more words")
    return "\n".join([*lines, "", *_field_lines(cache, record)])


def record_values(cache: TeacherCache, sample_id: str) -> dict[str, Any]:
    """What `describe_record` says of answer and tokens, for programs: of each row the token that follows and all cached ones."""
    record, text = cache.read(sample_id), load_token_text(cache)
    labels = record["labels"].tolist()
    values: dict[str, Any] = {
        "sample": sample_id,
        "shard": cache.shard_of(sample_id),
        "labels": labels,
        "answer": [text.decode([token]) for token in labels],
        "fields": {field.name: list(record[field.name].shape) for field in cache.fields},
    }
    if len(shots := shots_of(record)) > 1:
        values["views"] = [{"picture": shot.first, "video": shot.video, "label": shot.label} for shot in shots]
    settings = cache.plan.signals.get(LogitCodec.signal)
    if settings is not None and labels:
        said = LogitCodec.from_dict(settings).decode(record)
        tails = said.tail_log_mass[:, said.temperatures.index(1.0)]
        values["rows"] = [
            {
                "target": label,
                "token_ids": said.token_ids[row][said.entry_mask[row]],
                "log_probs": said.log_probs[row][said.entry_mask[row]],
                "tail_log_mass": tails[row],
            }
            for row, label in enumerate(labels)
        ]
    return values


def picture_of(
    cache: TeacherCache, sample_id: str, paths: Sequence[Path] = (), pictures: Sequence[Image] | None = None
) -> Image:
    """Draw where the teacher looked while saying each word of one answer.

    Args:
        paths: Files of the sample's pictures, to draw over: any of them, in any order; none draws the maps alone.
        pictures: All of the sample's pictures and frames in order, in place of files.

    Raises:
        ConfigError: If there is nothing to draw.
        CacheMismatchError: If a picture is another one, or the cache does not hold the sample.
    """
    record, text = cache.read(sample_id), load_token_text(cache)
    words = text.words(record["labels"].tolist())
    if pictures is None:
        images = open_images(paths, record)
    else:
        check_pictures(pictures, record, name=f"sample {sample_id!r} of the data")
        images = dict(enumerate(pictures))
    shots = shots_of(record, images)
    most = _MAX_DRAWN if len(shots) < 2 else max(1, min(_MAX_DRAWN, _MAX_MAPS // len(shots)))
    maps = word_maps(record, cache.plan, words[:most])
    if not maps:
        raise ConfigError(
            f"{cache.path}: sample {sample_id!r} is text alone: there is nothing to draw"
            if not len(record["tiles"])
            else f"{cache.path}: there is no answer attention to draw: the cache has signals {list(cache.signals)}"
        )
    cut = f" (first {most} of {len(words)} words)" if len(words) > most else ""
    title = f"{one_line(sample_id, limit=60)}{cut}: {' '.join(word for word, _ in words[:most])}"
    return draw_picture(maps, title=title, image=shots[0].image, shots=shots)


def save_picture(picture: Image, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        ConfigError: If the name does not end as one of a lossless format, or its folder is missing.
    """
    kinds = {".png": "PNG", ".webp": "WEBP"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: pictures are written as {' or '.join(kinds)}; give such a name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it, or choose another place")
    data, exif = io.BytesIO(), picture.getexif()
    exif[_SOFTWARE] = PICTURE_MARK.decode()  # a later picture may take its place
    picture.save(data, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    write_bytes_atomic(path, data.getvalue())


def _token_lines(record: Record, text: TokenText, settings: dict[str, Any] | None) -> list[str]:
    """One line per supervised row: target, the teacher's first tokens with probabilities, the mass of all others."""
    labels = record["labels"]
    if settings is None or not len(labels):
        return []
    said = LogitCodec.from_dict(settings).decode(record)
    counts, masses = said.entry_mask.sum(axis=1).tolist(), np.exp(said.log_probs)
    tails = np.exp(said.tail_log_mass[:, said.temperatures.index(1.0)])
    lines = [
        "",
        f"{'row':>4}  {'target':<18}{'others':>7}   the teacher's first tokens and their probabilities",
    ]
    for row, label in enumerate(labels[:_MAX_ROWS].tolist()):
        most = slice(min(_TOP, counts[row]))
        first = zip(said.token_ids[row, most].tolist(), masses[row, most].tolist(), strict=True)
        shown = [f"{text.of(token):<12} {mass:5.3f}" for token, mass in first]
        more = f"(+{counts[row] - _TOP})" if counts[row] > _TOP else ""
        lines.append(f"{row:>4}  {text.of(label):<18}{tails[row]:7.4f}   {'  '.join(shown)}  {more}".rstrip())
    if len(labels) > _MAX_ROWS:
        lines.append(f"      ... and {len(labels) - _MAX_ROWS} more rows")
    return lines


def _field_lines(cache: TeacherCache, record: Record) -> list[str]:
    owner = {f.name: signal for signal, group in cache.plan.fields.items() for f in group}
    lines = [f"{'field':<22}{'of':<18}{'dtype':<7}{'axis':<8}shape"]
    for field in cache.fields:
        shape = " x ".join(map(str, record[field.name].shape))
        signal = one_line(owner.get(field.name, BASE), limit=17)
        lines.append(f"{field.name:<22}{signal:<18}{field.dtype:<7}{field.axis:<7} {shape}")
    return lines
