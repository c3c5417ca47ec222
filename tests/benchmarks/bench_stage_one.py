"""Stage one against a bare forward pass, and against eager attention with all its maps, as released code runs it.

*Bare* is the library's own pass with SDPA on the same, already collated batches, logits at supervised rows only: no
reading, no capture, no reduction, no writing. *Stage one* is the main loop of a whole build, reading and writing included.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.benchmarks.bench_measure import Seconds, Spread, Values, Watch, ratio
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data import builtin
from vlm_distill_cache.data.families.inputs import additive_mask
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.text.collate import Batch, collate, length_buckets
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.loop.signals import reduce_output
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.training.live_bytes import LiveBytes

SIZE = "135M parameters"
PICTURE = 336  # pixels; 24 x 24 patches
TEACHER_OPTIONS = {"template": "short", "batch_size": 2, "max_length": 4096}
TURN = ("is there a square ?", "yes there is a red square left of the circle")


def bench_stage_one(folder: Path) -> tuple[Values, Values]:
    """Measure stage one on the built-in teacher and on a LLaVA of SmolLM2-135M's shape with random weights.

    Args:
        folder: Scratch space, about 1 GB.

    Returns:
        Ratios (above 1: the first takes longer or more) and figures, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    ratios: Values = {}
    figures: Values = {}
    # The whole demonstration: its first shard's reading has nothing to hide behind, as in every build.
    overhead, rate = _againstbare_pass(folder / "built-in", rounds=7, threads=threads, batch_size=16)
    ratios["stage one / bare forward, built-in teacher"] = overhead
    figures["stage one, built-in teacher, samples/s"] = rate

    teacher = save_random_llava(folder / "teacher")
    options: dict[str, Any] = {"teacher": str(teacher), **TEACHER_OPTIONS}
    data = write_conversations(folder / "short", samples=4, turns=7)
    overhead, rate = _againstbare_pass(folder / "large", rounds=7, threads=threads, data=str(data), **options)
    ratios[f"stage one / bare forward, {SIZE}"] = overhead
    figures[f"stage one, {SIZE}, samples/s"] = rate
    for name, turns, rounds in (("short", 7, 7), ("long", 72, 3)):
        data = write_conversations(folder / name, samples=1, turns=turns)
        tokens, seconds, memory = _against_eager(folder / "eager", rounds=rounds, data=str(data), **options)
        ratios[f"eager output_attentions / stage one's pass, {SIZE}, {tokens} tokens"] = seconds
        ratios[f"eager output_attentions / stage one's pass, peak memory, {SIZE}, {tokens} tokens"] = memory
    return ratios, figures


def _againstbare_pass(folder: Path, *, rounds: int, threads: int, **options: Any) -> tuple[Spread, Spread]:
    """Main loop of a build over bare passes, pairs run in turn; and the build's samples a second."""
    settings: dict[str, Any] = {"fidelity_samples": 0, "threads": threads} | options

    def stage_one() -> Seconds:
        shutil.rmtree(folder, ignore_errors=True)
        summary = extract(BuildConfig(cache=str(folder), **settings))
        return Seconds(summary.seconds, summary.cpu_seconds)

    work = open_build(BuildConfig(cache=str(folder), **settings))
    work.teacher.model.set_attn_implementation("sdpa")
    batches = list(batches_of(work))

    def bare() -> Seconds:
        watch = Watch()
        for batch in batches:
            bare_pass(work.teacher, batch)
        return watch.seconds()

    bare_pass(work.teacher, batches[0])  # warm-up
    pairs = [(bare(), stage_one()) for _ in range(rounds)]
    samples = sum(map(len, batches))
    bares, builds = zip(*pairs, strict=True)
    return ratio(builds, bares), Spread.of(samples / seconds for seconds in builds)


def _against_eager(folder: Path, *, rounds: int, **options: Any) -> tuple[int, Spread, float]:
    """Tokens of one sample; eager attention over the captured pass in seconds, and in bytes alive at the peak."""
    tokens, theirs, ours, existing = eager_and_ours(folder, **options)

    def seconds(call: Callable[[], None]) -> Seconds:
        watch = Watch()
        call()
        return watch.seconds()

    def peak(call: Callable[[], None]) -> int:
        live = LiveBytes(*existing)
        with live:
            call()
        return int(live.peak)

    memory = peak(theirs) / peak(ours)  # the warm-up too
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    slow, fast = zip(*pairs, strict=True)
    return tokens, ratio(slow, fast), memory


def eager_and_ours(
    folder: Path, **options: Any
) -> tuple[int, Callable[[], None], Callable[[], None], list[torch.Tensor]]:
    """Tokens of one sample; its pass with eager attention and all maps, and with capture; the tensors of both models."""
    work = open_build(BuildConfig(cache=str(folder), **options))
    (batch,) = batches_of(work)
    dtype = getattr(torch, work.teacher.dtype)
    inputs = dict(work.teacher.family.model_inputs(work.teacher.config, batch, dtype=dtype))
    inputs["attention_mask"] = additive_mask(inputs["attention_mask"], dtype)
    eager: Any = LlavaForConditionalGeneration.from_pretrained(
        work.teacher.directory, dtype=dtype, attn_implementation="eager"
    ).eval()

    @torch.inference_mode()
    def ours() -> None:
        reduce_output(work.run(batch), batch, work.codecs)

    @torch.inference_mode()
    def theirs() -> None:
        eager(**inputs, use_cache=False, output_attentions=True)

    models = (work.teacher.model, eager)
    existing = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return max(batch.lengths), theirs, ours, existing


def batches_of(work: Build) -> Iterator[Batch]:
    """The batches that a build makes, in its order."""
    for index in range(work.plan.shard_count):
        samples = [work.encoder(work.dataset[position]) for position in work.plan.shard_range(index)]
        for bucket in length_buckets([len(sample) for sample in samples], work.plan.batch_size):
            yield collate([samples[place] for place in bucket], work.teacher.pad_token_id)


@torch.inference_mode()
def bare_pass(teacher: Teacher, batch: Batch) -> torch.Tensor:
    """The library's own pass over a batch: logits of its supervised rows, ``[A, V]``."""
    inputs = teacher.family.model_inputs(teacher.config, batch, dtype=getattr(torch, teacher.dtype))
    return row_logits(teacher.model, inputs, batch.labels != IGNORE_INDEX)


def save_random_llava(folder: Path) -> Path:
    """Save a LLaVA of SmolLM2-135M's shape behind a small CLIP tower of 576 patches, weights random."""
    tokenizer = builtin.load_tokenizer()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, image_size=PICTURE,
            patch_size=14, projection_dim=192,
        ),
        text_config=LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=576, tie_word_embeddings=True,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": PICTURE, "width": PICTURE}
    CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False).save_pretrained(folder)
    return folder


def write_conversations(folder: Path, *, samples: int, turns: int) -> Path:
    """Write a LLaVA JSON: a plain picture and a conversation of some turns each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(samples):
        Image.new("RGB", (200, 150), (20 * index, 80, 90)).save(folder / f"{index}.png")
        talk = []
        for turn in range(turns):
            question, answer = TURN
            talk += [
                {"from": "human", "value": question if turn else f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
        entries.append({"id": f"s{index}", "image": f"{index}.png", "conversations": talk})
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path
