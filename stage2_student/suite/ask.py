"""A model answers the requests of benchmarks: answers generated, and given answers weighed.

All that is weighed about one picture is packed behind it (half the time of two sequences, a third of four). Pictures are
opened when their batch is made, so that a benchmark of documents needs the memory of a batch. A batch depends on the
requests alone: the same requests in the same order give the same numbers.

Dims: A supervised rows of a sequence, R requests.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import PIL.Image
import torch

from vlm_distill_cache.common.errors import DistillError, ModelError, SampleError
from vlm_distill_cache.data.sample import ImageSource, Sample, Turn
from vlm_distill_cache.data.text.collate import joinable
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import device_of, generate_answers, pad_token_id
from vlm_distill_cache.stage2_student.batches.prefetch import Prefetcher
from vlm_distill_cache.stage2_student.scores.evaluate import answer_log_probs
from vlm_distill_cache.stage2_student.students.model import generation_inputs_of, packs_conversations
from vlm_distill_cache.stage2_student.suite.requests import LEAST, Generate, Request, Result, Weigh

MOST_SEQUENCES = 64  # in a batch, of
MOST_TOKENS = 8_192  # in all, padding included: 12 pictures of 576 visual tokens; 4 GiB of keys and values of a 7B
MOST_PACKED = 16  # conversations behind one picture; the mask grows with the square of their tokens
ON_CPU, ON_ACCELERATOR = 1, 8  # threads that read pictures and texts
AHEAD = 8  # sequences that each keeps ready

Unit = TypeVar("Unit")


@dataclass(frozen=True, kw_only=True)
class _Given:
    """One given answer: the place of its request, its own among the request's answers, and the conversation."""

    request: int
    place: int
    turn: Turn


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sequence:
    """What goes through the model at once: an encoded sample, and the answers in it in the order of its segments."""

    encoded: EncodedSample
    given: Sequence[_Given]


@torch.inference_mode()
def ask(model: Any, encoder: SampleEncoder, requests: Sequence[Request]) -> list[Result | SampleError]:
    """Ask a model.

    Args:
        model: A student, or any model of the library, in evaluation mode.
        encoder: Fits the model.
        requests: ``[R]``.

    Returns:
        ``[R]``: each request's result; or the error of one whose picture or text cannot be used.

    Raises:
        ModelError: The model's logits are not numbers.
    """
    found: dict[int, Result | SampleError] = {}
    _weigh(model, encoder, requests, found)
    _generate(model, encoder, requests, found)
    for place, request in enumerate(requests):
        if isinstance(request, Weigh) and request.optional and isinstance(found[place], SampleError):
            found[place] = []
    return [found[place] for place in range(len(requests))]


def _weigh(
    model: Any, encoder: SampleEncoder, requests: Sequence[Request], found: dict[int, Result | SampleError]
) -> None:
    """Put the sum of log-probabilities of each given answer, and its tokens, into ``found``."""
    weighed: dict[tuple[int, int], list[float]] = {}
    packs = packs_conversations(model) and not encoder.template.drops_question
    pictures = list(_by_picture(requests))

    def encode() -> Iterator[_Sequence]:
        load = partial(_encode_given, encoder, pictures, packs=packs)
        for sequences, errors in _ahead(model, load, len(pictures)):
            found.update(errors)
            yield from sequences

    for batch in _batches(encode(), lambda unit: len(unit.encoded)):
        places = {id(unit.encoded): unit for unit in batch}
        for group in joinable([unit.encoded for unit in batch]):
            for encoded, (log_probs, owner) in zip(
                group, answer_log_probs(model, group, pad_token_id(encoder)), strict=True
            ):
                given = places[id(encoded)].given
                for segment, one in enumerate(given, 1 if len(given) > 1 else 0):
                    rows = log_probs[owner == segment]  # [A]
                    weighed[one.request, one.place] = [max(float(rows.sum()), LEAST), len(rows)]
    for place, request in enumerate(requests):
        if isinstance(request, Weigh) and place not in found:
            found[place] = [weighed[place, number] for number in range(len(request.answers))]


def _by_picture(requests: Sequence[Request]) -> Iterator[tuple[ImageSource | None, list[_Given]]]:
    """The given answers of all requests about one picture, at most ``MOST_PACKED`` at a time."""
    groups: dict[object, list[_Given]] = defaultdict(list)
    for place, request in enumerate(requests):
        if isinstance(request, Weigh):
            # Of texts without a picture each is a group of its own.
            key = ("request", place) if request.image is None else id(request.image)
            for number, answer in enumerate(request.answers):
                turn = Turn(question=request.question, answer=answer)
                groups[key].append(_Given(request=place, place=number, turn=turn))
    for given in groups.values():
        for start in range(0, len(given), MOST_PACKED):
            yield requests[given[0].request].image, given[start : start + MOST_PACKED]


def _encode_given(
    encoder: SampleEncoder,
    pictures: Sequence[tuple[ImageSource | None, Sequence[_Given]]],
    number: int,
    *,
    packs: bool,
) -> tuple[list[_Sequence], dict[int, SampleError]]:
    """One packed sequence of a picture; or one for each answer, where the model or the texts do not allow that.

    Returns:
        The sequences, and the error of each request that has one.
    """
    image, given = pictures[number]
    images = () if image is None else (_Once(image),)

    def encoded(part: Sequence[_Given]) -> _Sequence:
        turns = tuple(one.turn for one in part)
        sample = Sample(sample_id="request", images=images, turns=turns, independent_turns=len(turns) > 1)
        with _one_item():
            return _Sequence(encoded=encoder(sample), given=part)

    if packs and len(given) > 1:
        with suppress(SampleError):  # too long together, or one of them alone: what follows tells
            return [encoded(given)], {}
    sequences: list[_Sequence] = []
    errors: dict[int, SampleError] = {}
    for one in given:
        try:
            sequences.append(encoded([one]))
        except SampleError as error:
            errors.setdefault(one.request, error)
    return sequences, errors


class _Once:
    """A picture that is opened once for several sequences."""

    def __init__(self, source: ImageSource) -> None:
        self.name = source.name
        self._source = source
        self._loaded: PIL.Image.Image | SampleError | None = None

    def load(self) -> PIL.Image.Image:
        """The picture, or the error that it raised before."""
        if self._loaded is None:
            try:
                self._loaded = self._source.load()
            except SampleError as error:
                self._loaded = error
        if isinstance(self._loaded, SampleError):
            raise self._loaded
        return self._loaded


def _generate(
    model: Any, encoder: SampleEncoder, requests: Sequence[Request], found: dict[int, Result | SampleError]
) -> None:
    """Put each generated answer into ``found``."""
    limits: dict[int, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        if isinstance(request, Generate):
            limits[request.max_tokens].append(place)
    for limit, places in limits.items():

        def encode(places: Sequence[int] = places) -> Iterator[tuple[int, EncodedSample]]:
            load = partial(_encode_prompt, encoder, [requests[place] for place in places])
            for place, prompt in zip(places, _ahead(model, load, len(places)), strict=True):
                if isinstance(prompt, SampleError):
                    found[place] = prompt
                else:
                    yield place, prompt

        for batch in _batches(encode(), lambda unit: len(unit[1])):
            owners = {id(prompt): place for place, prompt in batch}
            for group in joinable([prompt for _, prompt in batch]):
                made = generate_answers(model, encoder, group, max_new_tokens=limit, inputs=generation_inputs_of(model))
                if not all(made.finite):
                    raise ModelError("the model's logits are not numbers (NaN), so it says nothing; train it again")
                found.update((owners[id(prompt)], text) for prompt, text in zip(group, made.texts, strict=True))


@contextmanager
def _one_item() -> Iterator[None]:
    """Make what a picture or text raises that no processor can use (one without a width, say) an error of its item alone."""
    try:
        yield
    except DistillError:
        raise
    except (ValueError, ArithmeticError, IndexError, OSError, PIL.Image.DecompressionBombError) as error:
        raise SampleError(f"it cannot be shown to the model ({type(error).__name__}: {error})") from error


def _encode_prompt(encoder: SampleEncoder, requests: Sequence[Request], number: int) -> EncodedSample | SampleError:
    try:
        with _one_item():
            return build_prompt(encoder, requests[number].image, requests[number].question)
    except SampleError as error:
        return error


def _ahead(model: Any, load: Callable[[int], Unit], count: int) -> Iterator[Unit]:
    """``load(0)``, ``load(1)``, ... made by threads while the model computes: on an accelerator it waits for pictures."""
    workers = ON_CPU if device_of(model).type == "cpu" else ON_ACCELERATOR
    with Prefetcher(load, 0, count, num_workers=workers, depth=AHEAD) as loaded:
        yield from loaded


def _batches(units: Iterable[Unit], length: Callable[[Unit], int]) -> Iterator[list[Unit]]:
    """As many in order as fit into ``MOST_SEQUENCES`` and ``MOST_TOKENS``, but at least one."""
    batch: list[Unit] = []
    longest = 0
    for unit in units:
        tokens = max(longest, length(unit))
        if batch and (len(batch) == MOST_SEQUENCES or tokens * (len(batch) + 1) > MOST_TOKENS):
            yield batch
            batch, tokens = [], length(unit)
        batch.append(unit)
        longest = tokens
    if batch:
        yield batch
