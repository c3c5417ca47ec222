"""Answers that the teacher writes itself, turn by turn, before they are scored like a data set's.

A shard is the unit again: its prompts form batches by length, each with random numbers of its own, so the answers,
like every other byte of a shard, do not depend on who builds it or what was built before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.errors import ModelError, SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.data.sample import Sample, Turn, with_answers
from vlm_distill_cache.data.text.collate import joinable, length_buckets
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.data.text.generation import Generated, Sampling, generate_answers
from vlm_distill_cache.stage1_teacher.loop.forward import halves, one_checkpoint
from vlm_distill_cache.stage1_teacher.loop.spool import Spool
from vlm_distill_cache.stage1_teacher.loop.work import Build, told
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard

ANSWERS = AnswersCodec.signal


@dataclass
class _Conversation:
    """A sample while it is answered."""

    sample: Sample
    answers: list[str] = field(default_factory=list)

    def next_prompt(self) -> Sample | None:
        """What is asked next: all earlier turns with their new answers, or an independent turn alone."""
        if len(self.answers) == len(self.sample.turns):
            return None
        asked = self.sample.turns[len(self.answers)].question
        earlier = () if self.sample.independent_turns else self.sample.turns[: len(self.answers)]
        turns = [Turn(question=turn.question, answer=a) for turn, a in zip(earlier, self.answers, strict=False)]
        return replace(self.sample, turns=(*turns, Turn(question=asked, answer="x")), independent_turns=False)


def answer_shard(work: Build, positions: Sequence[int], *, index: int, batch_size: int) -> EncodedShard:
    """Let the teacher answer the samples of one shard, and encode them with its answers.

    Args:
        batch_size: Most prompts in one batch.

    Returns:
        The shard; a sample that the teacher did not answer (nothing, or no end in time) is a recorded failure.
    """
    shard, spool = EncodedShard(index=index), Spool(work.scratch)
    open_, order = {}, []
    for position in positions:
        sample_id = work.dataset.sample_ids[position]
        try:
            with told(f"sample {sample_id!r}"):
                written = [] if work.kept is None else work.kept.answers(sample_id)  # those stay
                open_[sample_id] = _Conversation(work.dataset[position], written)
            order.append(sample_id)
        except SampleError as error:
            shard.fail(sample_id, str(error))
    for turn in range(max((len(talk.sample.turns) for talk in open_.values()), default=0)):
        _answer_turn(work, shard, open_, turn=turn, batch_size=batch_size)
    for sample_id in order:
        if sample_id in open_:
            talk = open_[sample_id]
            try:
                shard.samples.append(spool.put_away(work.encoder(with_answers(talk.sample, talk.answers))))
                shard.answers[sample_id] = tuple(talk.answers)
            except SampleError as error:
                shard.fail(sample_id, f"with the teacher's answer: {error}")
    return shard


def _answer_turn(
    work: Build, shard: EncodedShard, open_: dict[str, _Conversation], *, turn: int, batch_size: int
) -> None:
    """Answer one turn of every conversation that has it; those that fail leave ``open_``.

    Raises:
        ModelError: If the teacher has read no sample at all.
    """
    codec: AnswersCodec = work.codecs[ANSWERS]
    prompts, spool = list[EncodedSample](), Spool(work.scratch)
    for sample_id, talk in list(open_.items()):
        try:
            asked = talk.next_prompt()
            if asked is not None:
                prompts.append(spool.put_away(work.encoder(asked, prompt_only=True)))
        except SampleError as error:
            shard.fail(sample_id, str(error))
            del open_[sample_id]
    unread: list[tuple[str, ModelError]] = []
    for number, bucket in enumerate(length_buckets([len(prompt) for prompt in prompts], batch_size)):
        for part, chosen in enumerate(joinable([prompts[place] for place in bucket])):
            seed = _seed(codec.seed, shard.index, turn, number, *([part] if part else []))
            for prompt, found in zip(chosen, _answers_of(work, shard, chosen, seed), strict=True):
                if isinstance(found, ModelError):
                    unread.append((prompt.sample_id, found))
                elif found.problem:
                    shard.fail(prompt.sample_id, f"the teacher's answer to turn {turn + 1} {found.problem}")
                    del open_[prompt.sample_id]
                else:
                    open_[prompt.sample_id].answers.append(found.text)
    for sample_id, fault in unread:
        if not work.teacher.has_read:  # that is no matter of a sample
            raise fault
        shard.fail(sample_id, f"teacher: {fault}")
        del open_[sample_id]


@dataclass(frozen=True)
class _Answer:
    """One answer, and what is wrong with it."""

    text: str
    problem: str = ""


def _answers_of(
    work: Build, shard: EncodedShard, prompts: Sequence[EncodedSample], seed: int
) -> list[_Answer | ModelError]:
    """The answer to each prompt; where the teacher cannot read a batch, each has another try alone.

    A batch for which memory does not suffice is answered in halves.
    """
    codec: AnswersCodec = work.codecs[ANSWERS]
    made: Generated | None
    try:
        with one_checkpoint(work, prompts):
            made = _generate(work, codec, prompts, seed)
    except ModelError as error:
        if len(prompts) == 1:
            return [error]
        return [found for prompt in prompts for found in _answers_of(work, shard, [prompt], seed)]
    except torch.OutOfMemoryError:
        made = None  # behind this block its tensors are gone
    if made is None:
        return [found for part in halves(shard, prompts) for found in _answers_of(work, shard, part, seed)]
    work.teacher.has_read = True
    answers: list[_Answer | ModelError] = []
    for answer, finished, finite in zip(made.texts, made.finished, made.finite, strict=True):
        problem = ""
        if not finite:
            problem = "has logits that are no finite numbers; try dtype=bfloat16 or float32"
        elif not finished:
            problem = f"has no end within {codec.max_new_tokens} tokens; raise max_new_tokens"
        elif not answer:
            problem = "is empty"
        answers.append(_Answer(answer, problem))
    return answers


@torch.inference_mode()
def _generate(work: Build, codec: AnswersCodec, prompts: Sequence[EncodedSample], seed: int) -> Generated:
    sampling = None
    if codec.temperature:
        sampling = Sampling(temperature=codec.temperature, top_p=codec.top_p, seed=seed)
    for prompt in prompts:
        work.teacher.check_ids(torch.from_numpy(prompt.input_ids))
    return generate_answers(
        work.teacher.model,
        work.encoder,
        prompts,
        max_new_tokens=codec.max_new_tokens,
        sampling=sampling,
        inputs=partial(_inputs, work.teacher),
        draw=work.teacher.draw,
    )


def _inputs(teacher: Any, prompts: Sequence[EncodedSample], pad_id: int, device: torch.device) -> Any:
    return teacher.family.generation_inputs(
        teacher.config, prompts, pad_id, device, dtype=getattr(torch, teacher.dtype)
    )


def _seed(*numbers: int) -> int:
    """A seed of a batch's own; the library's generators take 63 bits."""
    return int(fingerprint(list(numbers))[:15], 16)
