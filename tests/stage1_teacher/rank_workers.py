"""Two ranks that hold teachers together, beside one process. Run as ``python rank_workers.py FOLDER TEACHER...``.

A process of its own, because it forks, which is what makes two ranks cheap. Prints what was found as JSON: of two teachers
also of builds with the first.
"""

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards, read_sidecar
from vlm_distill_cache.common.errors import ProcessFailedError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage1_teacher import extract as extracting
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.loop import forward
from vlm_distill_cache.stage1_teacher.planning.leases import Leases
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.parts import ANY
from vlm_distill_cache.stage1_teacher.teacher import ranks as together
from vlm_distill_cache.stage1_teacher.teacher.follow import follow
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

SIGNALS = ("logits", "answer_attention", "visual_columns", "hidden")


def write_data(folder: Path) -> None:
    """Four pictures, each with one question, so that every family can read them."""
    folder.mkdir()
    entries = []
    for number in range(4):
        name = f"{number}.png"
        Image.new("RGB", (40 + number, 30), (60 * number, 200, 90)).save(folder / name)
        said = [
            ("human", f"<image>\nWhat is in picture {number}?"),
            ("gpt", "nothing but one colour"[: 10 + 3 * number]),
        ]
        entries.append(
            {"id": name, "image": name, "conversations": [{"from": who, "value": text} for who, text in said]}
        )
    (folder / "data.json").write_text(json.dumps(entries))


def options(cache: Path, teacher: Path, **others: Any) -> BuildConfig:
    settings = {
        "data": str(cache.parents[1] / "data" / "data.json"),
        "template": "auto", "limit": 4, "shard_size": 2, "batch_size": 2, "fidelity_samples": 0, "signals": SIGNALS,
        "logits": "exact", "attention_dtype": "f4", "hidden_dtype": "f4", "threads": 1, "num_workers": 0,
    }  # fmt: skip
    return BuildConfig(cache=str(cache), teacher=str(teacher), **(settings | others))


def with_ranks(folder: Path, lead: Callable[[], Any], *, doing: Callable[[], Any] = lambda: None) -> Any:
    """What ``lead`` returns in rank 0 of two, and how both ended; ``doing`` is done in rank 1 before it follows."""
    folder.mkdir()
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                os.fsync = lambda descriptor: None
                logging.disable(logging.WARNING)
                store = dist.FileStore(str(folder / "meet"), 2)
                group = together._form(store, rank=rank, size=2, device=torch.device("cpu"))
                if rank:
                    doing()
                    follow(group)
                else:
                    (folder / "found").write_text(json.dumps(lead()))
                    group.leave()
                code = 0
            except ProcessFailedError as error:
                (folder / f"said-{rank}").write_text(str(error))
            finally:
                if code and sys.exception() is not None:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [text.read_text() if (text := folder / f"said-{rank}").exists() else "" for rank in range(2)]
    found = json.loads((folder / "found").read_text()) if (folder / "found").exists() else None
    return {"codes": codes, "said": said, "found": found}


def outputs(work: Any) -> dict[str, Tensor]:
    samples = [work.encoder(work.dataset[index]) for index in range(2)]
    _, found, _ = forward.run_once(work, samples)
    return {name: value.float() for name, value in found.items()}


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Of numbers above 1 as a share of the largest."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def drawn(work: Any) -> list[int]:
    prompts = [work.encoder(work.dataset[0], prompt_only=True)]
    teacher = work.teacher
    arguments = teacher.family.generation_inputs(teacher.config, prompts, 0, torch.device("cpu"), dtype=torch.float32)
    made = teacher.draw(arguments, max_new_tokens=5, sampling=None, pad_id=0, end=[2])
    return made.tokens.flatten().tolist()


def compare(folder: Path, teachers: list[Path], dtype: str) -> Any:
    """The largest difference of what each teacher gives, and the answers of both."""

    def lead() -> dict[str, Any]:
        found = {}
        for place in teachers:
            config = options(folder / "none", place, dtype=dtype)
            whole = open_build(config)
            expected, one = outputs(whole), drawn(whole)
            divided = open_build(options(folder / "none", place, dtype=dtype, tensor_parallel=2))
            values = outputs(divided)
            found[place.name] = {
                "rounded": float((values["logits"].bfloat16().float() == values["logits"]).float().mean()),
                "differences": {name: largest_difference(values[name], expected[name]) for name in expected},
                "answers": [one, drawn(divided)],
                "weights": [sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in w.teacher.model.parameters())
                            for w in (whole, divided)],
                "fingerprints": whole.plan.fingerprints == divided.plan.fingerprints,
            }  # fmt: skip
        return found

    return with_ranks(folder, lead)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def builds(folder: Path, teacher: Path) -> Any:
    """A cache by two ranks, beside that of one process, and again where it was left half built."""

    def lead() -> dict[str, Any]:
        one, two, again = folder / "one", folder / "two", folder / "again"
        extract(options(one, teacher))
        extract(options(two, teacher, tensor_parallel=2), part=ANY)
        worst: dict[str, float] = {}
        caches = [open_cache(place) for place in (one, two)]
        for sample_id, record in caches[0].items():
            other = caches[1].read(sample_id)
            for name, value in record.items():
                difference = np.abs(np.asarray(value, np.float64) - np.asarray(other[name], np.float64))
                worst[name] = max(worst.get(name, 0.0), float(difference.max(initial=0.0)))
        shutil.copytree(two, again)
        for name in ("manifest.json", "shards/00001.json"):
            (again / name).unlink()
        built = extract(options(again, teacher)).built  # the plan says how many ranks
        first, second = tree(two), tree(again)
        return {
            "worst": worst, "extra": read_plan(two).extra, "built": built,
            "differing": sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)),
        }  # fmt: skip

    return with_ranks(folder, lead)


def lack(rank: int, batch: int) -> None:
    """Let memory not suffice on a rank for so many samples, in the middle of a pass."""
    run = Teacher._run

    def cramped(teacher: Teacher, inputs: Any) -> Any:
        layer = teacher.language_model.layers[1].mlp

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        group = teacher.ranks
        if group is None or group.rank != rank or len(inputs.rows) < batch:
            return run(teacher, inputs)
        hook = layer.register_forward_pre_hook(full)
        try:
            return run(teacher, inputs)
        finally:
            hook.remove()

    Teacher._run = cramped


def out_of_memory(folder: Path, teacher: Path, *, on: list[int]) -> Any:
    """A cache where memory does not suffice for two samples on some ranks."""
    together.ALONE = timedelta(seconds=2)

    def lead() -> Any:
        if 0 in on:
            lack(0, 2)
        cache = folder / "cache"
        extract(options(cache, teacher, tensor_parallel=2))
        return [read_sidecar(cache, shard).divided for shard in range(2)]

    return with_ranks(folder, lead, doing=lambda: lack(1, 2) if 1 in on else None)


def killed(folder: Path, teacher: Path) -> Any:
    """The follower is killed in the second shard; what is free then, and what the same command makes of it."""
    cache = folder / "cache"

    def lead() -> None:
        def slowly(work: Any, shard: Any, size: int) -> Any:
            if shard.index == 1:
                (folder / "second").touch()
            yield from run_shard(work, shard, size)

        run_shard, extracting.run_shard = extracting.run_shard, slowly
        extract(options(cache, teacher, tensor_parallel=2), part=ANY)

    def doing() -> None:
        run = Teacher._run

        def dying(teacher: Teacher, inputs: Any) -> Any:
            if (folder / "second").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return run(teacher, inputs)

        Teacher._run = dying

    found = with_ranks(folder, lead, doing=doing)
    leases = Leases(cache)
    found["missing"] = missing_shards(cache, read_plan(cache))
    found["held"] = [lease for lease in leases.newest().values() if leases.is_held(lease)]
    return found


def main(folder: Path, teachers: list[Path]) -> None:
    write_data(folder / "data")
    found = {"float32": compare(folder / "float32", teachers, "float32")}
    if len(teachers) == 2:
        found |= {
            "bfloat16": compare(folder / "bfloat16", teachers[:1], "bfloat16"),
            "build": builds(folder / "build", teachers[0]),
            "all lack": out_of_memory(folder / "all", teachers[0], on=[0, 1]),
            "one lacks": out_of_memory(folder / "one", teachers[0], on=[1]),
            "killed": killed(folder / "killed", teachers[0]),
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
