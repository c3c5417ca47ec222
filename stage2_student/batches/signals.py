"""What a loss on cached signals is, and how records become what a student's batch is compared with.

Teacher and student may cut the picture into different tokens. Both are pooled to **the coarser of the two**,
by shared area: a student need not tell apart what it, or the teacher, sees as one. All of this depends
on the sample alone, so it runs on loading threads and the loop meets tensors of equal shape.

Dims: B batch, T sequence, G layer groups, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenRequest
from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.attention.sinks import SinkMap
from vlm_distill_cache.common.attention.tiles import Tile, tiles_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX, Record
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.text.collate import collate, supervised_rows, text_rows, visual_keys
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch, TrainingSample
from vlm_distill_cache.stage2_student.batches.sinks import NO_SINKS
from vlm_distill_cache.stage2_student.loss_weights import LossWeights


@dataclass(frozen=True)
class Sides:
    """One sample's record and one student, about to meet.

    Attributes:
        record: The sample's, or another's in the control experiment.
        student_tiles: The student's visual tokens, on the teacher's pictures (`batches.frames`); empty without an image.
        match: How the cached layer groups become those of the losses; None: they stay.
        sinks: The sinks of the cache's teacher, of the parts that the losses ask for (`batches.sinks`).
    """

    record: Record
    own: Record
    codecs: Mapping[str, Any]
    student_tiles: tuple[Tile, ...]
    match: GroupMatch | None
    where: str
    sinks: Mapping[str, SinkMap] = field(default_factory=dict)

    @cached_property
    def teacher_tiles(self) -> tuple[Tile, ...]:
        """The teacher's visual tokens; empty without an image."""
        return tiles_of(self.record)

    @property
    def see(self) -> bool:
        """Whether both sides have visual tokens."""
        return bool(self.student_tiles and self.teacher_tiles)

    def decode(self, signal: str) -> Any:
        """A signal as its codec unpacks it, in tensors."""
        return as_tensors(self.codecs[signal].decode(self.record))

    def check_tokens(self, signal: str, found: int, tiles: tuple[Tile, ...] | None = None) -> None:
        """Refuse a signal of another number of visual tokens than the record's tiles (or `tiles`) have."""
        expected = sum(tile.token_count for tile in (self.teacher_tiles if tiles is None else tiles))
        if found != expected:
            raise CacheMismatchError(
                f"{self.where}: {signal} covers {found} visual tokens, the record's tiles {expected}; "
                "run `cachectl verify --deep` on the cache, then build the damaged shard again"
            )


@dataclass(frozen=True)
class LiveSides(Sides):
    """The same, the record being what a live teacher said: each signal in tensors under its own name."""

    def decode(self, signal: str) -> Any:
        """A signal as the teacher said it; no codec has touched it."""
        return self.record[signal]


class StudentSizes(Protocol):
    """What losses may ask of a student; asked only where needed, since of some models it is not known."""

    @property
    def depth(self) -> int:
        """Layers of the language model."""

    @property
    def width(self) -> int:
        """Of the language model."""

    def kept_layers(self, teacher_depth: int) -> tuple[int, ...] | None:
        """Which of the layers of a teacher of this depth are its own; None: it was not cut out of one."""


@dataclass(frozen=True)
class Seen:
    """What one forward pass of a student over a batch showed, and which losses are asked for.

    Attributes:
        attention: By name of the request, float32 ``[B, G, R, M]``.
        hidden: By name of the request, float ``[B, R, S, D]``.
        rows: Whose logits were asked for, bool ``[B, T]``.
        logits: Of `rows`, float ``[rows, V]``, batch-row order; None if they were never held.
        divergence: Of the term that is computed `in_pass`; None without it.
        fed: What each visual token stood for, of a student that feeds fewer of them (`losses.fed_tokens`); else None.
    """

    batch: TrainingBatch
    losses: LossWeights
    attention: Mapping[str, Tensor]
    hidden: Mapping[str, Tensor]
    rows: Tensor
    logits: Tensor | None
    divergence: Tensor | None
    fed: Tensor | None = None


Requests = Mapping[str, AttentionRequest | HiddenRequest]
Value = tuple[Tensor, Mapping[str, Tensor]]
VisualRows = Literal["causal", "alike"]


@dataclass(frozen=True, kw_only=True)
class LossTerm(ABC):
    """All that stage two knows of one loss on cached signals; `losses.terms.TERMS` names them.

    Attributes:
        reads: The signals that it needs.
        at_images: Whether it is about visual tokens: samples have a target where both sides see an image.
        of_picture: Whether it is of the picture alone: a student with another tokenizer can learn it.
        needs_boxes: Whether it must be known which part of the picture each visual token sees.
        attends: Whether it compares attention, of layer groups that must be matched.
        visual_rows: Of losses on what visual tokens see: ``causal``: both sides must see what precedes them alone;
            ``alike``: where the two sides see different things, a part of the loss is no matter of where they look.
        in_pass: Whether it is computed inside the forward pass, together with the cross-entropy.
        logits_at_images: Whether it needs the student's logits at visual tokens.
        tempered: Whether its temperature must be one that the cache holds tail masses for.
    """

    reads: tuple[str, ...]
    at_images: bool = True
    of_picture: bool = False
    needs_boxes: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    visual_rows: ClassVar[VisualRows | None] = None
    in_pass: ClassVar[bool] = False
    logits_at_images: ClassVar[bool] = False
    tempered: ClassVar[bool] = False

    def check_cache(  # noqa: B027 - most terms have nothing to refuse
        self, signals: Mapping[str, Any], losses: LossWeights, where: str, match: GroupMatch | None
    ) -> None:
        """Refuse a cache whose codecs cannot serve this loss; needs no student.

        Args:
            signals: The codec dictionaries of its plan, those that the term reads among them.
            match: How layers meet; None: not yet known.
        """

    def fit(self, plan: Plan, losses: LossWeights, student: StudentSizes, where: str) -> Any:  # noqa: B027
        """What the loss must know of its cache and its student, once a phase; the methods below get it back.

        Raises:
            CacheMismatchError: If the two cannot be compared.
        """

    def check_record(self, record: Record, encoded: EncodedSample, *, where: str) -> None:  # noqa: B027
        """Refuse, with a CacheMismatchError, a record that was made from other words than the student reads."""

    @abstractmethod
    def target(self, sides: Sides) -> Any:
        """The teacher's side of one sample, on the CPU."""

    @abstractmethod
    def collate(self, targets: Sequence[Any], places: Sequence[int]) -> Any:
        """Join the teacher's sides of the samples that have one; `places`: where these are in the batch."""

    def count(self, target: Any) -> int:
        """How many rows or images of a batch the loss is a mean over."""
        return int(target.count)

    def requests(self, batch: TrainingBatch, target: Any, groups: Groups, fit: Any) -> Requests:
        """What of the student's forward pass to record; terms that need the same use the same name."""
        return {}

    def measured(self, losses: LossWeights, fit: Any) -> tuple[str, ...]:
        """Names of what is logged beside the loss."""
        return ()

    @abstractmethod
    def value(self, seen: Seen, target: Any, fit: Any) -> Value:
        """The loss, a float32 scalar with a graph, and its measures, without one: means over `count` rows or images."""


def decode_signals(
    record: Record,
    codecs: Mapping[str, Any],
    terms: Mapping[str, LossTerm],
    student_tiles: tuple[Tile, ...],
    *,
    where: str,
    foreign: Record | None = None,
    match: GroupMatch | None = None,
    live: bool = False,
    sinks: Mapping[str, SinkMap] = NO_SINKS,
) -> dict[str, Any]:
    """The teacher's side of each term for one sample and one student, as `TrainingSample` holds it.

    With a ``foreign`` record attention is that of another sample: the control experiment. A ``live`` record is a
    live teacher's (`LiveSides`).
    """
    own = (LiveSides if live else Sides)(record, record, codecs, student_tiles, match, where, sinks)
    looking = own if foreign is None else Sides(foreign, record, codecs, student_tiles, match, where, sinks)
    sides = {name: looking if term.attends else own for name, term in terms.items()}
    return {name: term.target(sides[name]) for name, term in terms.items() if sides[name].see or not term.at_images}


def collate_samples(
    samples: Sequence[TrainingSample], terms: Mapping[str, LossTerm], *, pad_token_id: int
) -> TrainingBatch:
    """Pad samples to one batch and join the teacher's sides of `terms`, for which they were decoded, in the same order."""
    inputs = collate([sample.encoded for sample in samples], pad_token_id)
    labels = inputs.labels[inputs.labels != IGNORE_INDEX]
    held = {name: [place for place, sample in enumerate(samples) if name in sample.targets] for name in terms}
    return TrainingBatch(
        inputs=inputs,
        labels=labels,
        targets={
            name: terms[name].collate([samples[place].targets[name] for place in places], places)
            for name, places in held.items()
            if places
        },
        rows=supervised_rows(inputs),
        text_rows=text_rows(inputs),
        keys=visual_keys(inputs),
        has_image=torch.tensor([place for place, sample in enumerate(samples) if sample.has_image], dtype=torch.int64),
        row_count=len(labels),
    )
