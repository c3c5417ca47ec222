"""The parts of `gpu_check`, each run in a process of its own: ``gpu_check_parts NAME FOLDER OUTPUT [--tiny]``."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import vlm_distill_cache.data.families.models as family_models
import vlm_distill_cache.stage2_student.train as training
from tests.benchmarks.bench_stage_one import bare_pass, batches_of, save_random_llava, write_conversations
from tests.benchmarks.bench_training import LOSSES, step_seconds
from tests.benchmarks.full_size_models import MOBILEVLM, TOWER, write_llava, write_mobilevlm
from tests.benchmarks.train_student import train_student
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.codecs.live import _top_by_lowest_id
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard
from vlm_distill_cache.stage1_teacher.planning.batch_size import (
    MEMORY_SHARE,
    free_memory,
    longest_input,
    pass_bytes,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_build

Figures = dict[str, Any]
ROUNDS = 3
NO_CUDA = "needs a CUDA device"  # why tests skip that are for a GPU


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part works, and with models of which size."""

    folder: Path
    tiny: bool

    @property
    def device(self) -> str:
        """The device of all parts."""
        return "cpu" if self.tiny else "cuda"

    def written(self, name: str, write: Callable[[Path], Any]) -> Path:
        """A folder that a part before may have written."""
        folder = self.folder / name
        if not (folder / "written").is_file():
            write(folder)
            (folder / "written").touch()
        return folder

    def small_teacher(self) -> Path:
        """A LLaVA of 135M parameters."""
        return builtin_teacher_directory() if self.tiny else self.written("small-teacher", save_random_llava)

    def conversations(self) -> Path:
        """Pictures with seven questions and answers each, as LLaVA writes them."""
        samples = 6 if self.tiny else 96
        return self.written("data", lambda folder: write_conversations(folder, samples=samples, turns=7)) / "data.json"

    def config(self, teacher: Path, cache: str, **options: Any) -> BuildConfig:
        """Options of a build of the conversations."""
        settings = {"template": "short", "shard_size": 4 if self.tiny else 32, "fidelity_samples": 2, **options}
        settings |= {"teacher": str(teacher), "data": str(self.conversations()), "device": self.device}
        return BuildConfig(cache=str(self.folder / cache), **settings)


def machine(place: Place) -> Figures:
    """What is measured on."""
    found: Figures = {"device": "CPU", "torch": torch.__version__, "transformers": transformers.__version__}
    if not place.tiny:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        found |= {"capability": f"{properties.major}.{properties.minor}", "devices": torch.cuda.device_count()}
    return {**found, "python": sys.version.split()[0], "cores": len(os.sched_getaffinity(0))}


def stage_one(place: Place) -> Figures:
    """LLaVA-1.5-7B in bfloat16: a build over bare passes, the float32 projection, the memory probe and the measured peak."""
    teacher = place.small_teacher() if place.tiny else place.written("teacher", write_llava)
    found, bare, size = _bare_passes(place, teacher)
    _free()
    summary = extract(place.config(teacher, "cache", dtype="bfloat16", batch_size=size))
    found["stage one / bare forward"] = summary.seconds / bare
    found["samples/s"] = summary.samples / summary.seconds
    return found


def _bare_passes(place: Place, teacher: Path) -> tuple[Figures, float, int]:
    """Figures of the teacher alone, the seconds of bare passes over all samples, and how many run at once."""
    began = time.perf_counter()
    work = open_build(place.config(teacher, "none", dtype="bfloat16"))
    found: Figures = {"batch size": work.plan.batch_size, "opening and probing, s": time.perf_counter() - began}
    found["parameters"] = sum(parameter.numel() for parameter in work.teacher.model.parameters())
    if gpus := work.teacher.gpus:
        found |= _probed(work, gpus)
    size = min(work.plan.batch_size, work.plan.shard_size)
    batches = list(batches_of(replace(work, plan=replace(work.plan, batch_size=size))))

    def bare() -> float:
        started = time.perf_counter()
        for batch in batches:
            bare_pass(work.teacher, batch)
        _wait(place)
        return time.perf_counter() - started

    bare()  # warm-up
    exact = statistics.median(bare() for _ in range(ROUNDS))
    with patch.object(family_models, "_float32_projection", lambda _: nullcontext()):
        rounded = statistics.median(bare() for _ in range(ROUNDS))
    found["float32 projection / bfloat16 projection, bare pass"] = exact / rounded
    return found, exact, size


def _probed(work: Build, gpus: list[torch.device]) -> Figures:
    """What the probe allowed, and what a batch of that many of the longest input takes."""
    torch.cuda.empty_cache()
    room = free_memory(gpus[0]) * MEMORY_SHARE
    taken = pass_bytes(work, longest_input(work), work.plan.batch_size, gpus)[0]
    if taken > room:
        raise AssertionError(f"a pass takes {taken / 1e9:.1f} GB; the probe allows {room / 1e9:.1f} GB")
    return {"probe allows, GB": room / 1e9, "pass of the longest input takes, GB": taken / 1e9}


def stage_two(place: Place) -> Figures:
    """MobileVLM-1.7B in bfloat16: a distilled step over one of plain fine-tuning of the same student, all of it trained."""
    cache = place.folder / "cache"
    if not (cache / MANIFEST).is_file():  # the part before failed
        extract(place.config(place.small_teacher(), "cache", batch_size=4), overwrite=True)
    student: dict[str, Any] = {"student": "mobilevlm-tiny", "dtype": "float32"}
    phase: dict[str, Any] = {"steps": 2, "batch_size": 4, "micro_batch_size": 2}
    if not place.tiny:
        student = {"student": str(place.written("student", write_mobilevlm)), "dtype": "bfloat16"}
        phase = {"steps": 15, "batch_size": 16, "micro_batch_size": 8}
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for name, losses in LOSSES.items():
        if not place.tiny:
            torch.cuda.reset_peak_memory_stats()
        with _nothing_saved():
            result = train_student(
                **student, data=str(place.conversations()), cache=str(cache), output=str(place.folder / f"run-{name}"),
                device=place.device, phases=["dft"], dft={**phase, "losses": losses, "trainable": "all"},
            )  # fmt: skip
        seconds[name] = step_seconds(result.log)
        peaks[name] = 0.0 if place.tiny else torch.cuda.max_memory_allocated() / 1e9
        del result
        _free()
    found: Figures = {f"dft step: {name} / SFT": seconds[name] / seconds["SFT"] for name in LOSSES if name != "SFT"}
    return {**found, "dft step: SFT, ms": 1e3 * seconds["SFT"], "peak memory, GB": peaks}


@contextmanager
def _nothing_saved() -> Iterator[None]:
    """Checkpoints of a student of full size take longer than its steps."""
    with patch.object(training, "save", lambda *_: None), patch.object(training, "export", lambda *_: Path()):
        yield


def out_of_memory(place: Place) -> Figures:
    """A batch that does not fit under a cap: it runs in halves, and nothing is lost."""
    size = 4 if place.tiny else 32
    work = open_build(
        place.config(place.small_teacher(), "none", batch_size=size, max_length=300 if place.tiny else 2048)
    )
    sample = longest_input(work)
    shard = EncodedShard(index=0, samples=[sample] * size)
    with _cramped(place, work, size):
        done = sum(len(batch) for batch, _ in run_shard(work, shard, size))
    if not shard.divided or done != size or shard.failed:
        raise AssertionError(
            f"{done} of {size} samples are there, divided batches: {shard.divided}, failed: {shard.failed}"
        )
    return {"batch": size, "divided": shard.divided}


@contextmanager
def _cramped(place: Place, work: Build, size: int) -> Iterator[None]:
    """Room for a quarter of the batch and a little more; on a CPU by a pass that pretends."""
    if place.tiny:
        run = Build.run

        def limited(self: Build, batch: Any, inputs: Any = None) -> Any:
            if len(batch) > size // 4:
                raise torch.OutOfMemoryError
            return run(self, batch, inputs)

        with patch.object(Build, "run", limited):
            yield
        return
    gpus, sample = work.teacher.gpus, longest_input(work)
    few, all_ = (pass_bytes(work, sample, count, gpus)[0] for count in (size // 4, size))
    room = torch.cuda.memory_reserved() + few + (all_ - few) // 4
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fsdp2(place: Place) -> Figures:
    """A MobileVLM-1.7B sharded over one rank by hand: the losses of three steps are those without sharding."""
    backend = "gloo" if place.tiny else "nccl"
    dist.init_process_group(backend, init_method=f"file://{place.folder / 'meet'}", rank=0, world_size=1)
    try:
        plain, sharded = (_losses(place, sharded=sharded) for sharded in (False, True))
    finally:
        dist.destroy_process_group()
    error = max(abs(ours - theirs) / theirs for ours, theirs in zip(sharded, plain, strict=True))
    if error > (1e-5 if place.tiny else 0.02):
        raise AssertionError(f"sharded over one rank the losses are {sharded}, else {plain}")
    return {"losses": plain, "greatest relative difference": error}


def _losses(place: Place, *, sharded: bool) -> list[float]:
    settings = {
        name: MOBILEVLM[name]
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    }
    tower, vocabulary = dict(TOWER), 32_000
    if place.tiny:
        settings, vocabulary = dict.fromkeys(settings, 2) | {"hidden_size": 16, "intermediate_size": 32}, 100
        tower |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=vocabulary, **settings)
    config = MobileVLMConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**tower), projector_type="ldpnetv2"
    )
    torch.manual_seed(0)
    with torch.device(place.device):
        model = MobileVLMForConditionalGeneration(config)
        tokens = torch.randint(5, vocabulary, (2, 16 if place.tiny else 512))
    if sharded:
        half = torch.float32 if place.tiny else torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=half)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    rows = torch.ones(tokens.shape, dtype=torch.bool)
    rows[:, -1] = False
    autocast = nullcontext() if place.tiny or sharded else torch.autocast("cuda", torch.bfloat16)
    for _ in range(3):
        with autocast:
            logits = model(input_ids=tokens, supervised=rows, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    del model, optimizer, logits, loss
    _free()
    return losses


def selection(place: Place) -> Figures:
    """The top-k selection on 10,000 rows is the CPU's, ties included; and what it costs beside the library's `topk`."""
    random = torch.Generator().manual_seed(0)
    dense = torch.randint(0, 40, (10_000, 3_000), generator=random).float()
    dense[::3] = torch.randn(len(dense[::3]), 3_000, generator=random)
    dense[5::7] = 0.0
    if not torch.equal(_top_by_lowest_id(dense.to(place.device), 65).cpu(), _top_by_lowest_id(dense, 65)):
        raise AssertionError("another selection than the CPU's")
    rows = torch.randn(20 if place.tiny else 2048, 32_064, device=place.device)
    ours, theirs = (_median(call, place) for call in (lambda: _top_by_lowest_id(rows, 65), lambda: rows.topk(65)))
    return {"ms": 1e3 * ours, "ms, torch.topk": 1e3 * theirs, "ns a logit": 1e9 * ours / rows.numel()}


def _median(call: Callable[[], Any], place: Place) -> float:
    seconds = []
    for _ in range(1 + 2 * ROUNDS):
        began = time.perf_counter()
        call()
        _wait(place)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def tests(place: Place) -> Figures:
    """All tests that need a GPU."""
    root = Path(__file__).parents[1]
    files = [path for path in sorted(root.rglob("test_*.py")) if NO_CUDA in path.read_text(encoding="utf-8")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "gpu", *map(str, files)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stdout[-3000:])
    return {"files": [path.name for path in files], "said": done.stdout.strip().splitlines()[-1]}


def _wait(place: Place) -> None:
    if not place.tiny:
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


PARTS: Mapping[str, Callable[[Place], Figures]] = {
    "machine": machine,
    "stage one": stage_one,
    "stage two": stage_two,
    "out of memory": out_of_memory,
    "fsdp2": fsdp2,
    "selection": selection,
    "tests": tests,
}


def main(name: str, folder: str, output: str, *options: str) -> None:
    """Run one part and write its figures, numbers to four digits."""
    found = PARTS[name](Place(folder=Path(folder), tiny="--tiny" in options))
    kept = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
    Path(output).write_text(json.dumps({"figures": kept}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
