"""One sample in, one training sequence out.

**Position convention.** Row p holds the distribution that predicts token p + 1, so ``labels[p]`` is
the token at p + 1 where that token belongs to an answer (its end token included), `IGNORE_INDEX`
elsewhere. An answer of L tokens has exactly L supervised rows. Everything after this file relies on it.

**Packing.** Independent conversations about one image share its prefix: the visual tokens are
computed once, and a block-diagonal mask keeps the conversations apart (docs/method.md, section 5; 8 conversations cost
about a quarter of 8 sequences). Each keeps exactly the tokens and positions it would have alone.

**Pictures.** A template writes one marker for each picture: the image token itself, or what the image encoder names
(Gemma 3: ``<start_of_image>``). Exactly this marker is replaced by `EncodedImage.text`, or by the image token once
per visual token. A video has a marker of its own where the family has one, else its frames are pictures. So each tag
has one writer: those that the family's chat template puts around the marker (Qwen-VL's ``<|vision_start|>``) stay the
template's, those that its library processor adds come from the image encoder, and the ids are those of the library's
own processor. Literal templates (``vicuna_v1``) write no tags.

Dims: T tokens of the sequence, N visual tokens, A supervised rows, P pictures, frames of videos among them.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

import numpy as np

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError, SampleError, TooLongError
from vlm_distill_cache.common.pixels import HASH_BYTES
from vlm_distill_cache.data.images.byte_pixels import pixel_tables
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, EncodedImage, ImageEncoder, VideoEncoder
from vlm_distill_cache.data.sample import FrameSampling, Medium, Sample, Turn
from vlm_distill_cache.data.text.chat import Marker, Rendered
from vlm_distill_cache.data.text.labels import Tokens, inside_spans, shared_length, shift_labels
from vlm_distill_cache.data.text.media import (
    EncodedMedium,
    PicturesBeyond,
    encode_media,
    first_media,
    join_pieces,
    joined_media,
    open_out,
    token_count,
    with_frames,
    within_limits,
)
from vlm_distill_cache.data.text.pixel_cache import PixelCache, identity_of
from vlm_distill_cache.data.text.special_tokens import check_end_token, find_special_tokens, pattern_of, read_texts
from vlm_distill_cache.data.text.templates import IMAGE_MARKER, PromptTemplate

MAX_TEXT = 2_000_000  # characters of a sample: a tokenizer takes some 170 bytes and 3 microseconds for each
# Characters: what a token may stand for at least, whatever the vocabulary, and at most.
TOKEN_TEXT, MAX_TOKEN_TEXT = 64, 1024
MAX_TURNS = 10_000  # that are cut, not refused; a template's time grows faster than their number
LongSamples = Literal["refuse", "truncate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSample:
    """One sequence ready to be collated; numpy, so that workers can hand it over cheaply.

    Attributes:
        sample_id: As in the data set.
        input_ids: i8 ``[T]``; the image token's id at the N visual positions.
        labels: i8 ``[T]``, ALREADY shifted: the target of row p, or `IGNORE_INDEX`.
        visual_mask: bool ``[T]``, True at visual tokens.
        position_ids: i8 ``[T]``; each packed conversation counts on from the shared prefix.
        segment_ids: i8 ``[T]``; 0 = shared prefix, k = k-th independent conversation; all 0 if not packed.
        image_inputs: Arrays by the model's argument name, as `EncodedImage.inputs`; empty for a text-only sample. Pixels are
            held as bytes where they can be (`data.images.byte_pixels`).
        tiles: The boxes of the visual tokens, each with the pictures it shows; empty for a text-only sample.
        image_hashes: Of each picture 16 bytes, P in order.
        frame_times: Of each picture the number of the video that it is a frame of, and its seconds; of a still picture -1
            and NaN. Empty where no picture is a frame.
    """

    sample_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    visual_mask: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    image_inputs: Mapping[str, np.ndarray]
    tiles: tuple[Tile, ...]
    image_hashes: tuple[bytes, ...]
    frame_times: tuple[tuple[int, float], ...] = ()

    @property
    def image_hash(self) -> bytes:
        """The hashes of all pictures, one behind the other; 16 zeros for a text-only sample."""
        return b"".join(self.image_hashes) or bytes(HASH_BYTES)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def is_packed(self) -> bool:
        """Whether conversations share a prefix, so that a causal mask alone is not enough."""
        return bool(self.segment_ids[-1])

    @property
    def supervised_rows(self) -> np.ndarray:
        """Positions with a label, i8 ``[A]``, ascending."""
        return np.flatnonzero(self.labels != IGNORE_INDEX)

    def cut_after(self, rows: int) -> "EncodedSample":
        """The beginning of the sequence: it ends with the target of its ``rows``-th supervised row.

        What was behind, a question whose answer is not reached included, is left out; of its pictures only the tokens are
        (`SampleEncoder` leaves out their inputs too). Of packed conversations the last may lose their ends, or all.

        Args:
            rows: At least 1; a sequence with no more supervised rows loses what follows its last answer.
        """
        end = int(self.supervised_rows[:rows][-1]) + 2
        labels = self.labels[:end].copy()
        labels[-1] = IGNORE_INDEX  # its target is cut off
        return replace(
            self,
            labels=labels,
            input_ids=self.input_ids[:end],
            visual_mask=self.visual_mask[:end],
            position_ids=self.position_ids[:end],
            segment_ids=self.segment_ids[:end],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleEncoder:
    """Tokenizer, image encoder and template as one function from `Sample` to `EncodedSample`.

    Attributes:
        tokenizer: A fast tokenizer (character offsets locate the answers).
        image_encoder: Pixels and boxes, and what the prompt's image marker is replaced by.
        template: The prompt; it writes a marker once for each picture and video.
        image_token_id: Id at visual positions. If it is an added token of the tokenizer, the text holds
            that token and is tokenised whole, which gives the ids of the model library's own
            processor; otherwise the text is split around the image, as original LLaVA code does.
        max_length: Most tokens a sequence may have.
        positions: Most tokens that a conversation may have for the model (`data.families.inputs.known_positions`);
            longer ones are refused whatever ``max_length``. None: it does not say.
        long_samples: Longer ones are refused, or cut at the end, as LLaVA's training code does: ``truncate``. A
            sequence then ends with the last target that fits (`EncodedSample.cut_after`), whether it was long or not, so
            that a student with another number of visual tokens can be cut to the same targets. Refused is what has no
            target left; so are prompts, and packed conversations of which one is longer than ``positions``.
        video_token_id: Id at the visual positions of a video, of families that have one; None: frames are pictures.
        sampling: Which frames of a video are read; None: videos are refused.
        most_pictures: Samples with more pictures are refused; None: any number. Where frames are pictures, a video has so many
            of its frames as are left, at uniform times.
        pictures_beyond: ``drop``: the first ``most_pictures`` stay, the others are left out with their markers.
        visual_token_budget: Frames of videos are left out until a sample has so many; more are refused. None: any number.
        pixels: Keeps encoded pictures and videos on disk; None: each is decoded whenever it is encoded.

    Raises:
        ConfigError: The tokenizer is not a fast one, ``max_length`` is too small for an image, or the template can mark
            no answers: what does not depend on a sample.
    """

    tokenizer: Any
    image_encoder: AnyImageEncoder
    template: PromptTemplate
    image_token_id: int
    max_length: int
    positions: int | None = None
    long_samples: LongSamples = "refuse"
    video_token_id: int | None = None
    sampling: FrameSampling | None = None
    most_pictures: int | None = 1
    pictures_beyond: PicturesBeyond = "refuse"
    visual_token_budget: int | None = None
    pixels: PixelCache | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(self.tokenizer).__name__} gives no character offsets, which locate the answers; "
                "load the fast tokenizer (a folder with tokenizer.json)"
            )
        if self.max_length <= self.image_encoder.least_token_count:
            raise ConfigError(
                f"max_length={self.max_length} leaves no room for text beside "
                f"{self.image_encoder.least_token_count} visual tokens; raise max_length"
            )
        if not self._knows_image and 0 <= self.image_token_id < self.tokenizer.vocab_size:
            word = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            raise ConfigError(
                f"image_token_id={self.image_token_id} is the ordinary token {word!r} of the tokenizer; use "
                "an added token, or an id outside its vocabulary"
            )
        if self.image_encoder.writes_text and not self._knows_image:
            marker = self.image_encoder.marker
            what = "around visual tokens" if marker is None else f"that stands for {marker!r}"
            raise ConfigError(
                f"image_token_id={self.image_token_id} is no added token of the tokenizer, so the text {what} cannot be "
                "tokenised; use the tokenizer of the image encoder's checkpoint"
            )
        # Bad news early: whatever does not depend on a sample fails here, and what fails later is that sample's.
        self._probe_template()
        _ = self._leading_ids, self.end_token_ids

    @cached_property
    def reader(self) -> Any:
        """The tokenizer, which finds every special token that the template writes."""
        turns = (Turn(question="a", answer="b"),) * (1 if self.template.holds_one_turn else 3)
        texts = []
        for has_image, count in product((True, False), range(1, len(turns) + 1)):
            # A template that cannot write one of these says so below, or with the sample that needs it.
            with suppress(ConfigError, SampleError):
                text = self.template.render(
                    turns[:count], self.tokenizer, has_image=has_image, image_token=self.image_token
                ).text
                texts += [text] if self._knows_image else text.split(IMAGE_MARKER)
        try:
            return find_special_tokens(self.tokenizer, texts, self.template.chat_template)
        except SampleError as error:
            raise ConfigError(f"the tokenizer cannot write a plain conversation: {error}") from error

    def _probe_template(self) -> None:
        """Refuse a template that cannot mark the answers of two turns, or of one."""
        reasons = []
        for count in (1,) if self.template.holds_one_turn else (2, 1):
            turns = (Turn(question="a", answer="b"),) * count
            try:
                self.template.render(turns, self.tokenizer, has_image=True, image_token=self.image_token)
            except (ConfigError, SampleError) as error:
                reasons.append(error)
            else:
                return
        raise ConfigError(str(reasons[0])) from reasons[0]

    def with_grid(self, grid: tuple[int, int]) -> "SampleEncoder":
        """The same text and pixels with another number of visual tokens (a student's)."""
        if not isinstance(self.image_encoder, ImageEncoder):
            raise ConfigError(
                f"{type(self.image_encoder).__name__} cuts each picture into tokens of its own, so they cannot be set to "
                f"a grid of {grid[0]} x {grid[1]}; give the student an image encoder with one fixed grid"
            )
        return replace(self, image_encoder=self.image_encoder.with_grid(grid))

    def __call__(self, sample: Sample, *, prompt_only: bool = False, rows: int | None = None) -> EncodedSample:
        """Encode one sample.

        Args:
            sample: With any number of pictures and videos.
            prompt_only: Stop where the last answer (of independent turns: the first) would begin; there are no
                labels then.
            rows: How many supervised rows are kept, at least 1; what is then too long is refused. None: all, or with
                ``long_samples="truncate"`` as many as fit.

        Raises:
            SampleError: Names the sample: unreadable image, empty answer, special token in the text,
                an unreadable video, more than ``max_length`` tokens or than the model has positions, or texts that template
                or tokenizer cannot write.
        """
        try:
            return self._encode(sample, prompt_only, rows)
        except (SampleError, ConfigError) as error:  # other texts and pictures went through when the encoder was built
            kind = type(error) if isinstance(error, SampleError) else SampleError
            raise kind(f"sample {sample.sample_id!r}: {error}") from error

    @cached_property
    def pixel_tables(self) -> tuple[np.ndarray, ...]:
        """What numbers the image encoder makes of bytes, float32 ``[3, 256]`` each."""
        return pixel_tables(self.image_encoder)

    @cached_property
    def media_identity(self) -> str | None:
        """A name for all that decides what becomes of pictures, but their bytes; None: not all of it is known."""
        return identity_of(self)

    @cached_property
    def image_token(self) -> str:
        """What a template writes for the image: the encoder's marker, else the image token."""
        if self.image_encoder.marker is not None:
            return self.image_encoder.marker
        return str(self.tokenizer.added_tokens_decoder[self.image_token_id]) if self._knows_image else IMAGE_MARKER

    @cached_property
    def video_token(self) -> str:
        """What a template writes for a video; empty: the family has no word for one."""
        if not isinstance(self.image_encoder, VideoEncoder):
            return ""
        if self.image_encoder.video_marker is not None:
            return self.image_encoder.video_marker
        added = self.tokenizer.added_tokens_decoder
        return str(added[self.video_token_id]) if self.video_token_id in added else ""

    @cached_property
    def end_token_ids(self) -> list[int]:
        """Ids that end an answer: the last one of a trained answer, and the tokenizer's end-of-sequence token."""
        rendered = self._plain
        try:
            ids, offsets = read_texts(self.reader, [rendered.text])[0]
            last = int(ids[inside_spans(offsets, rendered.answer_spans)][-1])
        except SampleError as error:
            raise ConfigError(f"the tokenizer cannot write a plain conversation: {error}") from error
        check_end_token(ids, offsets, rendered.text, rendered.answer_spans[-1], self.tokenizer)
        eos = self.tokenizer.eos_token_id
        if last != eos and not self.template.chat_template and self.template.answer_end is None:
            raise ConfigError(
                f"prompt template {self.template.name!r} ends an answer with {self.tokenizer.eos_token!r} (id {eos}), which the "
                f"tokenizer reads so that its last token is {self.tokenizer.convert_ids_to_tokens(last)!r} (id {last}); make "
                "it an added token in tokenizer.json"
            )
        return sorted({last} if eos is None else {last, int(eos)})

    @cached_property
    def _plain(self) -> Rendered:
        """A conversation of one turn, without a picture if the template can do without."""
        probe = (Turn(question="a", answer="b"),)
        try:
            return self.template.render(probe, self.tokenizer, has_image=False)
        except (ConfigError, SampleError):
            return self.template.render(probe, self.tokenizer, has_image=True, image_token=self.image_token)

    @cached_property
    def _knows_image(self) -> bool:
        return self.image_token_id in self.tokenizer.added_tokens_decoder

    @cached_property
    def _leading_ids(self) -> np.ndarray:
        """Ids the tokenizer puts in front of a text (``<s>``); some templates write them themselves.

        A chat template is followed as the model library's processors do: they add what the tokenizer adds unless
        the text begins with the beginning-of-sequence token (LLaVA-NeXT's does not, Gemma 3's does).
        """
        if self.template.bos_after_image:
            return np.zeros(0, dtype=np.int64)
        writes_it = self.template.chat_template and self.tokenizer.bos_token
        if writes_it and self._plain.text.startswith(self.tokenizer.bos_token):
            return np.zeros(0, dtype=np.int64)
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return np.array(full[:start], dtype=np.int64)
        raise ConfigError("the tokenizer changes a text when it adds special tokens; it cannot be used")

    @cached_property
    def _reserved(self) -> re.Pattern[str]:
        """Strings that would turn into special tokens inside a user's text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return pattern_of({IMAGE_MARKER, self.image_token, *(str(token) for token in added if token.special)})

    def _encode(self, sample: Sample, prompt_only: bool, rows: int | None) -> EncodedSample:
        packed = sample.independent_turns and len(sample.turns) > 1
        sample = within_limits(self, sample)
        self._check(sample)
        self._refuse_far_too_long(sample.turns[:1] if packed and prompt_only else sample.turns, prompt_only, rows)
        media = encode_media(self, sample.images) if self.pixels is None else self.pixels.media(self, sample.images)
        turns = with_frames(sample.placed(), media)
        conversations = [(turn,) for turn in turns] if packed else [turns]
        if packed and media:
            conversations = [(replace(turn, places=turns[0].places),) for turn in turns]
        markers = [marker for medium in media for marker in medium.markers]
        rendered = [
            self.template.render(turns, self.tokenizer, markers=markers, system=sample.system)
            for turns in conversations
        ]
        if prompt_only:
            start = rendered[0].answer_spans[-1][0]
            rendered = [Rendered(text=rendered[0].text[:start], answer_spans=())]
        written = [encoded for medium in media for encoded in medium.encoded]
        rendered = [open_out(conversation, markers, written) for conversation in rendered]
        tokens = self._tokenize(rendered, markers, written)
        if prompt_only or (rows is None and self.long_samples == "refuse"):
            self._refuse_long(tokens, written)
            return self._assemble(sample.sample_id, tokens, media)
        return self._cut(self._assemble(sample.sample_id, tokens, media), media, rows, packed=packed)

    def _check(self, sample: Sample) -> None:
        if not sample.turns:
            raise SampleError("no turns; a sample needs at least one answer")
        length = len(sample.system) + sum(len(turn.question) + len(turn.answer) for turn in sample.turns)
        if length > MAX_TEXT:
            raise SampleError(
                f"its texts have {length} characters (system prompt: {len(sample.system)}), expected at most {MAX_TEXT}; shorten "
                "them, or leave the sample out"
            )
        video = self.video_token if sample.videos else ""
        self._check_text("the system prompt", sample.system, video=video)
        for index, turn in enumerate(sample.turns):
            if not turn.answer.strip():
                raise SampleError(f"the answer of turn {index + 1} is empty; nothing could be learnt from it")
            self._check_text(f"turn {index + 1}", turn.question, turn.answer, video=video)

    @cached_property
    def _token_text(self) -> int:
        """How many characters a token stands for at most; more only for blanks that the tokenizer drops."""
        longest = max(map(len, self.tokenizer.get_vocab()), default=0)
        return min(max(longest, TOKEN_TEXT), MAX_TOKEN_TEXT)

    def _refuse_far_too_long(self, turns: Sequence[Turn], prompt_only: bool, rows: int | None) -> None:
        """Refuse what certainly has more tokens than fit, before time and memory are taken to count them."""
        cuts = not prompt_only and (rows is not None or self.long_samples == "truncate")
        most = max(self.max_length, MAX_TURNS) if cuts else self.max_length
        asked = 0 if self.template.drops_question else sum(len(turn.question) for turn in turns)
        length = asked + (0 if prompt_only else sum(len(turn.answer) for turn in turns))
        if len(turns) > most:
            found, least = f"it has {len(turns)} turns", len(turns)
        elif not cuts and length > most * TOKEN_TEXT and length > most * self._token_text:
            found, least = f"its texts have {length} characters", length // self._token_text
        else:
            return
        kind = SampleError if self.positions is None or least <= self.positions else TooLongError
        raise kind(
            f"{found}, which are more than max_length={self.max_length} tokens can hold; raise max_length, shorten the sample, "
            f"or leave it out{self._truncate}"
        )

    def _check_text(self, where: str, *texts: str, video: str = "") -> None:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise SampleError(f"{where} holds a lone surrogate: {error}") from error
            # A word for a video that is no token (SmolVLM) may stand in texts without one.
            if found := self._reserved.search(text) or (video and re.search(re.escape(video), text)):
                raise SampleError(
                    f"{where} contains {found.group()!r}, which the tokenizer would read as a special token; remove it from "
                    "the text (pictures and videos stand beside it)"
                )

    def _tokenize(
        self, rendered: list[Rendered], markers: Sequence[Marker], written: Sequence[EncodedImage]
    ) -> list[Tokens]:
        """Tokenise all conversations of a sample in one call, then open the image tokens out."""
        texts = [conversation.text for conversation in rendered]
        if markers and not self._knows_image:
            split = [text.split(IMAGE_MARKER) for text in texts]
            pieces = iter(read_texts(self.reader, [piece for parts in split for piece in parts]))
            ids_and_offsets = [join_pieces(parts, pieces, IMAGE_MARKER, self.image_token_id) for parts in split]
        else:
            ids_and_offsets = read_texts(self.reader, texts)
        # The text of one that has any holds each visual token already.
        counts = [
            count
            for image in written
            for count in ([token_count(image)] if image.text is None else [1] * token_count(image))
        ]
        leading = len(self._leading_ids)
        tokens = []
        for (ids, offsets), conversation in zip(ids_and_offsets, rendered, strict=True):
            is_answer = inside_spans(offsets, conversation.answer_spans)
            if counts:
                # Equal to writing the token so often: it is split off before the text is normalised.
                visual = np.flatnonzero(self._are_visual(ids))
                repeats = np.ones(len(ids), dtype=np.int64)
                # Another number is told where the sequence is assembled.
                repeats[visual[: len(counts)]] = counts[: len(visual)]
                ids, is_answer = np.repeat(ids, repeats), np.repeat(is_answer, repeats)
            if leading:
                ids = np.concatenate([self._leading_ids, ids])
                is_answer = np.concatenate([np.zeros(leading, dtype=bool), is_answer])
            tokens.append(Tokens(ids=ids, is_answer=is_answer))
        return tokens

    def _are_visual(self, ids: np.ndarray) -> np.ndarray:
        """Which ids stand for visual tokens, bool ``[T]``."""
        found: np.ndarray = ids == self.image_token_id
        if self.video_token_id is not None:
            found |= ids == self.video_token_id
        return found

    def _cut(
        self, whole: EncodedSample, media: Sequence[EncodedMedium], rows: int | None, *, packed: bool
    ) -> EncodedSample:
        """A sequence that ends with its last target, of as many as fit or as are asked for."""
        supervised = whole.supervised_rows
        if rows is None:
            fits = self.max_length if packed or self.positions is None else min(self.max_length, self.positions)
            rows = int((supervised + 2 <= fits).sum())
        cut = whole.cut_after(rows) if rows and len(supervised) else whole
        visual_count = int(cut.visual_mask.sum())
        self._refuse_lengths(len(cut), int(cut.position_ids.max()) + 1, visual_count)
        # Pictures stand in questions, a sequence is cut behind an answer: each is there or not.
        ends = np.cumsum([sum(map(token_count, medium.encoded)) for medium in media])
        kept = int(np.searchsorted(ends, visual_count, side="right"))
        return cut if kept == len(media) else replace(cut, **joined_media(first_media(self, media, kept)))

    def _refuse_long(self, tokens: list[Tokens], written: Sequence[EncodedImage]) -> None:
        shared = shared_length(tokens) if len(tokens) > 1 else 0
        lengths = [len(conversation.ids) - shared for conversation in tokens]
        visual_count = sum(map(token_count, written))
        # Each packed conversation counts on from the shared prefix.
        self._refuse_lengths(shared + sum(lengths), shared + max(lengths), visual_count)

    @property
    def _truncate(self) -> str:
        """The option of stage one that cuts long samples, where it is not given."""
        return ", or cut it at its end (long_samples=truncate, of stage one)" if self.long_samples == "refuse" else ""

    def _refuse_lengths(self, total: int, longest: int, visual_count: int) -> None:
        varies = visual_count > self.image_encoder.least_token_count
        fewer = ", limit the pixels of a picture in preprocessor_config.json" if varies else ""
        if self.positions is not None and longest > self.positions:
            raise TooLongError(
                f"a conversation of {longest} tokens ({visual_count} visual) is longer than the {self.positions} positions "
                f"that the model knows (max_position_embeddings in its config.json); shorten the conversation{fewer}, or "
                f"leave the sample out{self._truncate}"
            )
        if total > self.max_length:
            why = (
                ""
                if self.long_samples == "refuse"
                else " (no answer begins before the limit, behind which all is cut off)"
            )
            raise SampleError(
                f"{total} tokens ({visual_count} visual, {total - visual_count} of text) exceed "
                f"max_length={self.max_length}; raise max_length{fewer} or leave the sample out{self._truncate}{why}"
            )

    def _assemble(self, sample_id: str, tokens: list[Tokens], media: Sequence[EncodedMedium]) -> EncodedSample:
        shared = shared_length(tokens) if len(tokens) > 1 else 0
        pieces = [conversation.ids[shared:] for conversation in tokens]
        lengths = [len(piece) for piece in pieces]
        visual_count = sum(token_count(image) for medium in media for image in medium.encoded)
        labels = [shift_labels(conversation) for conversation in tokens]
        input_ids = np.concatenate([tokens[0].ids[:shared], *pieces])
        visual_mask = self._are_visual(input_ids)
        if int(visual_mask.sum()) != visual_count:
            raise SampleError(
                f"the prompt holds {int(visual_mask.sum())} visual tokens, expected {visual_count}; packed "
                "conversations must share everything up to the first question's text, so use a template with "
                "text between image and answer"
            )
        return EncodedSample(
            sample_id=sample_id,
            input_ids=input_ids,
            labels=np.concatenate([labels[0][:shared], *(row[shared:] for row in labels)]),
            visual_mask=visual_mask,
            position_ids=np.concatenate(
                [np.arange(shared), *(np.arange(shared, shared + length) for length in lengths)]
            ),
            segment_ids=np.repeat(
                np.arange(len(tokens) + 1) if len(tokens) > 1 else np.zeros(2, np.int64), [shared, *lengths]
            ),
            **joined_media(media),
        )


def build_prompt(
    encoder: SampleEncoder,
    image: Medium | None,
    question: str,
    system: str = "",
    *,
    further: Sequence[Medium] = (),
    places: tuple[int, ...] = (),
) -> EncodedSample:
    """Encode a question up to where the answer would begin, for generation.

    The tokens, without labels, are those in front of a trained answer; an empty question asks for a caption, an empty
    ``system`` leaves the template its own system prompt. ``further`` pictures and ``places`` are as of `Question`.
    """
    images = () if image is None else (image, *further)
    turn = Turn(question=question, answer="x", places=places)
    return encoder(Sample(sample_id="prompt", images=images, turns=(turn,), system=system), prompt_only=True)
