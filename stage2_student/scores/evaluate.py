"""Scoring a model on caption pairs and questions, and against the cached teacher.

Any model with the model library's signature and an encoder that fits it can be scored, so that a teacher's
and a student's numbers come from the same code. Two captions of a pair are packed behind one image (half
the time of two sequences); letters and short answers are generated greedily in left-padded batches.

Dims: B batch, T sequence, A supervised rows of a batch, V vocabulary, I items.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import RowAttention, SparseLogits
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.sample import CaptionPair, EvaluationSet, ImageSource, Question, Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import Generated, device_of, generate_answers, pad_token_id, prompt_of
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.losses.attention import answer_attention_loss, has_mass
from vlm_distill_cache.stage2_student.losses.attention_targets import AttentionTarget, student_cells
from vlm_distill_cache.stage2_student.losses.fed_tokens import fed_shares
from vlm_distill_cache.stage2_student.losses.logits import tail_bucket_loss
from vlm_distill_cache.stage2_student.losses.objective import record, requests_of
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.scores.metrics import (
    LETTER_PROMPT,
    LETTER_TOKENS,
    RESAMPLES,
    Score,
    bootstrap,
    bootstrap_kinds,
    exact_match,
    group_by_kind,
    parse_letter,
    preference,
    score_letters,
)
from vlm_distill_cache.stage2_student.scores.oracle import oracle_scores
from vlm_distill_cache.stage2_student.scores.results import PAIRED, EvaluationReport
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import generation_inputs_of, model_inputs_of, packs_conversations


def language_model_of(model: Any) -> Any:
    """The decoder whose attention can be captured: our students name it, LLaVA keeps it one level down."""
    inner = getattr(model, "language_model", None)
    return model.base_model.language_model if inner is None else inner


def supervised_logits(model: Any, inputs: Mapping[str, Any], supervised: Tensor) -> Tensor:
    """Logits of the rows that predict answer tokens; other rows never meet the output projection.

    The model is a student, or any causal model of the library; ``supervised`` is bool ``[B, T]``.

    Returns:
        Float ``[A, V]``, batch-row order.
    """
    if isinstance(model, LibraryStudent):
        logits: Tensor = model(**inputs, supervised=supervised, use_cache=False).logits
        return logits
    return row_logits(model, inputs, supervised)


def answer_log_probs(model: Any, samples: Sequence[EncodedSample], pad_id: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probability of every answer token, and which conversation it belongs to.

    Returns:
        For each sample: nats, float64 ``[A_i]``; and the rows' segment ids, int64 ``[A_i]``.

    Raises:
        ModelError: If a logit is not a number.
    """
    batch = collate(samples, pad_id).to(device_of(model))
    supervised = batch.labels != IGNORE_INDEX  # [B, T]
    with oracle_scores(model, batch.tiles, batch.image_hashes):
        logits = supervised_logits(model, model_inputs_of(model, batch), supervised)
    chosen = logits.gather(1, batch.labels[supervised][:, None])[:, 0].float()
    log_probs = (chosen - logits.float().logsumexp(1)).double().cpu().numpy()  # [A]
    if np.isnan(log_probs).any():  # it would count as the wrong caption's win
        raise ModelError("the model's logits are not numbers (NaN), so nothing can be scored; train it again")
    counts = [len(sample.supervised_rows) for sample in samples]
    return [
        (part, sample.segment_ids[sample.supervised_rows])
        for part, sample in zip(np.split(log_probs, np.cumsum(counts)[:-1]), samples, strict=True)
    ]


Item = TypeVar("Item")

ANSWER_TOKENS = 16  # longest generated short answer, unless the expected one is longer


@torch.inference_mode()
def evaluate_model(
    model: Any,
    encoder: SampleEncoder,
    items: EvaluationSet,
    *,
    cached: CachedDataset | None = None,
    letters: bool = True,
    batch_size: int = 64,
    resamples: int = RESAMPLES,
) -> EvaluationReport:
    """Score one model.

    The encoder fits the model (tokenizer, image grid, template), which is put into evaluation mode and back as it
    was. ``cached`` are samples with the teacher's signals, to measure the agreement with it; ``letters`` also asks
    the A/B question (two generations a pair). ``resamples`` are of the bootstrap.

    Raises:
        SampleError: If an item's image or text cannot be used; names the item.
        CacheMismatchError: If a cached sample does not fit the data.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, Score] = {}
    by_item: dict[str, dict[str, list[float]]] = {}

    def keep(name: str, values: np.ndarray, kinds: Sequence[str] = ()) -> None:
        grouped = group_by_kind(values, kinds or [""] * len(values))
        scores[name] = bootstrap_kinds(grouped, resamples=resamples)
        if name in PAIRED:
            by_item[name] = grouped
        if kinds:
            scores.update({f"{name}/{kind}": bootstrap(part, resamples=resamples) for kind, part in grouped.items()})

    try:
        if items.pairs:
            kinds = [pair.kind for pair in items.pairs]
            for name, values in score_pairs(model, encoder, items.pairs, batch_size=batch_size).items():
                keep(name, values, kinds)
            if letters:
                for name, values in ask_letters(model, encoder, items.pairs, batch_size=batch_size).items():
                    keep(f"letters/{name}", values, kinds)
        if items.questions:
            kinds = [question.kind for question in items.questions]
            keep("questions", score_questions(model, encoder, items.questions, batch_size=batch_size), kinds)
        if cached is not None:
            for name, values in score_agreement(model, cached, batch_size=batch_size).items():
                keep(name, values)
    finally:
        model.train(was_training)
    return EvaluationReport(scores=scores, items=by_item)


def score_pairs(
    model: Any, encoder: SampleEncoder, pairs: Sequence[CaptionPair], *, batch_size: int
) -> dict[str, np.ndarray]:
    """Compare log p(right | image) with log p(wrong | image), end-of-answer token included.

    Returns:
        Float ``[I]`` each: ``likelihood`` by the sum over the caption's tokens, ``likelihood_per_token``
        by their mean (the sum favours the shorter caption).
    """
    found = {}
    for name, values in weigh_pairs(model, encoder, pairs, batch_size=batch_size).items():
        found[name] = preference(values[:, 0], values[:, 1])
    return found


def weigh_pairs(
    model: Any, encoder: SampleEncoder, pairs: Sequence[CaptionPair], *, batch_size: int
) -> dict[str, np.ndarray]:
    """Log-probabilities of both captions, the right one's first: nats, float ``[I, 2]``, by the names of `score_pairs`."""
    sums, means = [], []
    for batch in _batches(pairs, batch_size, "caption pairs"):
        packs = packs_conversations(model)
        encoded = [sample for pair in batch for sample in encode_pair(encoder, pair, packed=packs)]
        captions = [
            row_scores[owner == segment]
            for row_scores, owner in answer_log_probs(model, encoded, pad_token_id(encoder))
            for segment in sorted(set(owner.tolist()))
        ]  # right, wrong, right, wrong, ...
        sums += [float(caption.sum()) for caption in captions]
        means += [float(caption.mean()) for caption in captions]
    return {
        "likelihood": np.array(sums).reshape(-1, 2),
        "likelihood_per_token": np.array(means).reshape(-1, 2),
    }


def encode_pair(encoder: SampleEncoder, pair: CaptionPair, *, packed: bool = True) -> list[EncodedSample]:
    """Encode both captions behind one image, or apart where the template has no text between the two.

    Returns:
        One packed sample, or two; the right caption first.
    """
    turns = tuple(Turn(question="", answer=caption) for caption in (pair.right, pair.wrong))
    if packed and not encoder.template.drops_question:
        return [encoder(_sample(pair.item_id, pair.image, turns))]
    return [encoder(_sample(pair.item_id, pair.image, (turn,))) for turn in turns]


def ask_letters(
    model: Any, encoder: SampleEncoder, pairs: Sequence[CaptionPair], *, batch_size: int
) -> dict[str, np.ndarray]:
    """Ask which of two captions fits, in both orders; also compare log p(A) with log p(B) of the first token.

    Returns:
        Float ``[I]`` each: as ``score_letters``, and ``likelihood``: mean over the orders of whether the
        right letter is the more likely one; not where both letters begin with the same token.

    Source:
        SugarCrepe's two-option question as CompoDistill words it (docs/method.md, section 7).
    """
    token_a, token_b = (_letter_token(encoder, pairs[0].image, letter) for letter in "AB")
    asked = [
        (pair, LETTER_PROMPT.format(a=first, b=second))
        for pair in pairs
        for first, second in ((pair.right, pair.wrong), (pair.wrong, pair.right))
    ]
    given, margins = [], []
    for batch in _batches(asked, batch_size, "letters"):
        prompts = [build_prompt(encoder, pair.image, text) for pair, text in batch]
        made = _generate(model, encoder, prompts, LETTER_TOKENS)
        given += [parse_letter(text) for text in made.texts]
        margins += (made.first_logits[:, token_a] - made.first_logits[:, token_b]).tolist()
    letters = score_letters(list(zip(given[0::2], given[1::2], strict=True)))
    if token_a == token_b:
        return letters
    margin = np.array(margins)
    prefers = (preference(margin[0::2], np.zeros(len(pairs))) + preference(-margin[1::2], np.zeros(len(pairs)))) / 2
    return {**letters, "likelihood": prefers}


def score_questions(
    model: Any, encoder: SampleEncoder, questions: Sequence[Question], *, batch_size: int
) -> np.ndarray:
    """Exact match of greedily generated answers, float ``[I]``."""
    matches = np.zeros(len(questions))

    def ask(places: Sequence[int], limit: int) -> None:
        for batch in _batches(places, batch_size, "questions"):
            asked = [questions[place] for place in batch]
            prompts = [prompt_of(encoder, item) for item in asked]
            for place, text in zip(batch, _generate(model, encoder, prompts, limit).texts, strict=True):
                matches[place] = exact_match(text, questions[place].answer)

    ask(range(len(questions)), ANSWER_TOKENS)
    # Bytes of other scripts and emoji may be tokens of their own, and an answer that is cut never matches.
    counts = [len(encoder.tokenizer(item.answer, add_special_tokens=False)["input_ids"]) for item in questions]
    long = [place for place, count in enumerate(counts) if count > ANSWER_TOKENS and not matches[place]]
    ask(long, max(counts, default=0) + 2)  # a blank in front, the end behind
    return matches


def score_agreement(model: Any, cached: CachedDataset, *, batch_size: int) -> dict[str, np.ndarray]:
    """Compare a model with the cached teacher on the same samples, one value a sample.

    Which of logits and answer attention the joined data reads decides what is compared.

    Returns:
        Float ``[I]`` each: ``teacher/kl`` (tail-bucket KL, nats a row), ``teacher/top1`` (share of rows
        whose most likely token is the teacher's), and on the common grid ``attention/cosine`` and
        ``attention/kl`` (mean over rows, weighted by the teacher's mass on the image).
    """
    language_model = language_model_of(model)
    capture = AttentionCapture(language_model)
    depth = int(language_model.config.num_hidden_layers)
    values: dict[str, list[float]] = {}
    for positions in _batches(range(len(cached)), batch_size, "teacher's signals"):
        batch = cached.batch(positions).to(device_of(model))
        target, teacher = (batch.targets.get(codec.signal) for codec in (RowAttentionCodec, LogitCodec))
        supervised = batch.inputs.labels != IGNORE_INDEX
        by_gaze = oracle_scores(model, batch.inputs.tiles, batch.inputs.image_hashes)
        if target is None:
            with by_gaze:
                logits = supervised_logits(model, model_inputs_of(model, batch.inputs), supervised)
        else:
            groups = cached.student_groups(depth)
            terms = choose_terms([RowAttentionCodec.signal])
            with by_gaze, record(model, capture, requests_of(terms, batch, groups)) as (maps, _):
                logits = supervised_logits(model, model_inputs_of(model, batch.inputs), supervised)
            chosen = batch.has_image.to(logits.device)
            image_rows = batch.rows[batch.has_image]
            fed = fed_shares(model, batch.keys)
            if fed is not None:
                target = target.of_fed_rows(fed[batch.has_image.to(fed.device)], image_rows)
            cells = student_cells(maps["answer"][chosen], target, image_rows)
            for rows in _row_ranges(image_rows):
                for kind, value in _compare_attention(cells[rows], target, rows).items():
                    values.setdefault(f"attention/{kind}", []).append(value)
        if teacher is not None:
            best = logits.argmax(-1) == teacher.token_ids[:, 0]  # [A]
            for rows in _row_ranges(batch.rows):
                kl = tail_bucket_loss(logits[rows], _take_rows(teacher, rows))
                values.setdefault("teacher/kl", []).append(float(kl))
                values.setdefault("teacher/top1", []).append(float(best[rows].float().mean()))
    return {name: np.array(found) for name, found in values.items()}


def _compare_attention(cells: Tensor, target: AttentionTarget, rows: slice) -> dict[str, float]:
    """Mass-weighted mean over one sample's rows: the losses' sums, divided by their weights; empty if none."""
    assert target.image_mass is not None
    teacher = RowAttention(target.teacher[rows], target.image_mass[rows])
    looking = has_mass(teacher.cells)  # rows the losses average over
    if not bool(looking.any()):
        return {}
    weight = float(teacher.image_mass[looking].mean())
    return {
        "kl": float(answer_attention_loss(cells, teacher, kind="kl")) / weight,
        "cosine": 1 - float(answer_attention_loss(cells, teacher, kind="cosine")) / weight,
    }


def _row_ranges(rows: Tensor) -> Iterator[slice]:
    """Where each sample's rows lie among all rows of a batch; samples without rows are passed over.

    ``rows`` is int64 ``[B, R]``, padding -1.
    """
    start = 0
    for count in (rows >= 0).sum(dim=1).tolist():
        if count:
            yield slice(start, start + count)
        start += count


def _take_rows(logits: SparseLogits, rows: slice) -> SparseLogits:
    """One sample's rows of a batch's signals."""
    return SparseLogits(
        logits.token_ids[rows],
        logits.log_probs[rows],
        logits.entry_mask[rows],
        logits.tail_log_mass[rows],
        logits.temperatures,
    )


def _generate(model: Any, encoder: SampleEncoder, prompts: Sequence[EncodedSample], max_new_tokens: int) -> Generated:
    """Greedy answers of any model to prompts, in one left-padded batch."""
    inputs = generation_inputs_of(model)
    with oracle_scores(model, [prompt.tiles for prompt in prompts], [prompt.image_hash for prompt in prompts]):
        return generate_answers(model, encoder, prompts, max_new_tokens=max_new_tokens, inputs=inputs)


def _sample(item_id: str, image: ImageSource, turns: tuple[Turn, ...]) -> Sample:
    """An item as the sample whose answers are scored."""
    return Sample(sample_id=item_id, images=(image,), turns=turns, independent_turns=True)


def _letter_token(encoder: SampleEncoder, image: ImageSource, letter: str) -> int:
    """The id a one-letter answer begins with, in its context after the prompt."""
    question = LETTER_PROMPT.format(a="a", b="b")
    encoded = encoder(_sample("letter", image, (Turn(question=question, answer=letter),)))
    return int(encoded.labels[encoded.supervised_rows[0]])


def _batches(items: Sequence[Item], size: int, what: str) -> Iterator[Sequence[Item]]:
    """Slices of at most ``size`` items, with a progress bar on a terminal."""
    with progress(what, total=len(items), unit="item", keep=False) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            bar.update(len(batch))
