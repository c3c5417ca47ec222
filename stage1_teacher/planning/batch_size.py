"""The automatic batch size: as many samples a forward pass as fit in memory, kept in the plan.

The batch size decides the last bits of what is cached, so it is found once, before the plan is written, and everybody
who builds or resumes the cache takes it from there.

On a GPU the teacher's real pass is tried at growing powers of two, on the longest input that the encoder admits: how
long a data set's longest sample is, is not known before all of it has been read, and a build that runs out of memory
after a day is worse than one whose batches are half as large. Beyond a few thousand tokens a batch no GPU computes faster
anyway. Of a teacher on several GPUs (``device_map``, ``tensor_parallel``) the memory of each counts. The input is made from
a real sample, so that every family gets the picture inputs that it wants: the one with the most visual tokens of a few, that
with the most pictures among them, its text repeated up to ``max_length``, every row behind the picture supervised. Pictures
of more tokens than these cost the vision tower more; that is what the head room is for.

On a CPU nothing is run: memory is rarely what limits it, and batches beyond 16 samples are no faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import DataError, ModelError, SampleError
from vlm_distill_cache.common.files.disk import free_main_memory
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.forward import run_once
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.teacher.ranks import Ranks

LARGEST = 64  # samples
CPU_LARGEST = 16
MEMORY_SHARE = 0.85  # of what is free on a GPU; the rest is head room
CPU_MEMORY_SHARE = 0.5
PROBE = 8  # samples looked at for the one with the most visual tokens
TRIED = 64  # samples tried before it is given up to find PROBE usable ones


def automatic_batch_size(work: Build, fullest: str = "") -> int:
    """Samples a forward pass that fit the memory of the teacher's device.

    Args:
        fullest: Id of the sample that shows most, if some show several pictures or a video.

    Raises:
        ModelError: If not even one sample fits.
        DataError: If no sample can be used.
    """
    device, ranks = work.teacher.device, work.teacher.ranks
    if device.type != "cuda":
        one, room = _activation_bytes(work, fullest), int(free_memory(device) * CPU_MEMORY_SHARE)
        room //= 1 if ranks is None else ranks.size  # of one machine
        return largest_batch(lambda size: [size * one], budget=[room], most=CPU_LARGEST)
    devices, sample = work.teacher.gpus, longest_input(work, fullest)

    def measure(batch_size: int) -> list[int]:
        return pass_bytes(work, sample, batch_size, devices)

    torch.cuda.empty_cache()
    if ranks is not None:
        budget = [int(free * MEMORY_SHARE) for free in ranks.free]
        return largest_batch(of_all_ranks(ranks, measure, budget), budget=budget)
    return largest_batch(measure, budget=[int(free_memory(gpu) * MEMORY_SHARE) for gpu in devices])


def of_all_ranks(
    ranks: Ranks, measure: Callable[[int], Sequence[int]], budget: Sequence[int]
) -> Callable[[int], Sequence[int]]:
    """What a pass takes of each rank's device, growing by twos; ``measure`` says it of the leader's.

    A pass that would not fit if it took twice of what half of it did is not tried: where memory runs out on ranks at unlike
    places, none can go on.
    """
    taken: list[int] = []

    def measure_all(batch_size: int) -> list[int]:
        doubled = [2 * before for before in taken]
        if any(used > room for used, room in zip(doubled, budget, strict=False)):
            return doubled
        own = max(measure(batch_size))
        taken[:] = [max(own, ranks.taken[0]), *ranks.taken[1:]]  # the leader also reduces what it found
        return [*taken]

    return measure_all


def pass_bytes(work: Build, sample: EncodedSample, batch_size: int, devices: Sequence[torch.device]) -> list[int]:
    """What a pass over so many copies of a sample takes of each GPU at its peak, in bytes beyond what was there.

    Raises:
        torch.OutOfMemoryError: If they do not fit in one pass.
    """
    before = [torch.cuda.memory_allocated(device) for device in devices]
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        run_once(work, [sample] * batch_size, checked=False)
        peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
        return [peak - held for peak, held in zip(peaks, before, strict=True)]
    finally:
        torch.cuda.empty_cache()


def largest_batch(measure: Callable[[int], Sequence[int]], *, budget: Sequence[int], most: int = LARGEST) -> int:
    """The largest power of two whose pass fits.

    Args:
        measure: From a number of samples to the bytes that their pass takes at its peak, of each device; raises
            ``torch.OutOfMemoryError`` where there are not so many.
        budget: Bytes that a pass may take of each.
        most: Samples beyond which nothing is tried.

    Raises:
        ModelError: If one sample does not fit.
    """
    best, size = 0, 1
    while size <= most:
        try:
            used = measure(size)
        except torch.OutOfMemoryError:
            break
        if any(taken > room for taken, room in zip(used, budget, strict=True)):
            break
        best, size = size, size * 2
    if not best:
        raise ModelError(
            "one sample of the greatest length does not fit beside the teacher "
            f"({' and '.join(f'{room / 1e9:.1f}' for room in budget)} GB may be used): set "
            "a smaller max_length, spread the teacher over several devices (device_map=auto), or quantise it "
            "(quantisation=8bit or 4bit)"
        )
    return best


def longest_input(work: Build, fullest: str = "") -> EncodedSample:
    """The longest input that the encoder admits: the text of a sample with large or many pictures, repeated, all supervised.

    Raises:
        DataError: If no sample can be used.
    """
    found: list[EncodedSample] = []
    reason = "the data set is empty"
    total = len(work.dataset)
    first = [work.dataset.sample_ids.index(fullest)] if fullest else []
    for position in (*first, *range(0, total, max(1, total // TRIED))):
        try:
            found.append(work.encoder(work.dataset[position]))
        except SampleError as error:
            reason = str(error)
        if len(found) == PROBE:
            break
    if not found:
        raise DataError(f"no sample of {work.dataset.name} can be used; the last one: {reason}")
    return lengthen(max(found, key=lambda sample: int(sample.visual_mask.sum())), work.encoder.max_length)


def lengthen(sample: EncodedSample, length: int) -> EncodedSample:
    """A sample with its last token repeated up to a length, every row behind its picture supervised.

    Args:
        sample: With one text token at least behind its picture.
        length: In tokens; a sample that is no shorter keeps its own.
    """
    more = max(0, length - len(sample))
    input_ids = np.concatenate([sample.input_ids, np.repeat(sample.input_ids[-1:], more)])
    visual_mask = np.concatenate([sample.visual_mask, np.zeros(more, dtype=bool)])
    behind = np.arange(len(input_ids)) >= np.flatnonzero(visual_mask)[-1] if visual_mask.any() else True
    last = sample.position_ids[-1:]
    return replace(
        sample,
        input_ids=input_ids,
        visual_mask=visual_mask,
        labels=np.where(behind, np.append(input_ids[1:], input_ids[-1]), IGNORE_INDEX),
        position_ids=np.concatenate([sample.position_ids, last + 1 + np.arange(more)]),
        segment_ids=np.concatenate([sample.segment_ids, np.repeat(sample.segment_ids[-1:], more)]),
    )


def _visual_tokens(work: Build, fullest: str) -> int:
    """About how many a sample has that has the most."""
    if not fullest:
        return work.teacher.image_encoder.token_count
    try:
        return int(work.encoder(work.dataset[work.dataset.sample_ids.index(fullest)]).visual_mask.sum())
    except SampleError:
        return work.encoder.max_length


def _activation_bytes(work: Build, fullest: str = "") -> int:
    """About what one sample of the greatest length takes at the peak of its pass, in bytes."""
    teacher, length = work.teacher, work.encoder.max_length
    text = text_config(teacher.config)
    width = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", 0) or 4 * width)
    value = torch.finfo(getattr(torch, teacher.dtype)).bits // 8
    # A layer at work: the residual, its norm, queries, keys, values, output and sums; gate, up and their product.
    layer = length * (8 * width + 3 * inner) * value
    # All rows supervised: dense logits in float32, top-k of them; copies are chunked.
    logits = length * int(text.vocab_size) * 4
    visual = _visual_tokens(work, fullest)
    held = (
        EXTRACTORS[name].held_bytes(codec, length=length, visual=visual, width=value)
        for name, codec in work.codecs.items()
        if name in EXTRACTORS
    )
    return max(layer, logits) + sum(held)


def free_memory(device: torch.device) -> int:
    """Bytes that a new pass can have: on a GPU its own, else main memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_main_memory()
