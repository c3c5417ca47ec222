"""Models of full size through both stages on a CPU: peak memory, bytes and seconds, beside what was estimated.

    make full-size      # opt-in: about an hour on 2 cores; 24 GiB of memory and 45 GB of disk

Weights are random, in the layouts of the hub (`full_size_models`): no published weights are needed, and none were used.
Each teacher writes a cache of four samples in bfloat16; each student makes two steps with adapters, in float32. A part
that is done is kept in ``build/full-size`` until its model is.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
import transformers

from tests.benchmarks.full_size_models import WRITERS
from vlm_distill_cache.common.files.hashing import file_checksum, fingerprint

ROOT = Path("build/full-size")
STORED = Path(__file__).parent / "results" / "full_size.json"
PAGE = Path("docs/results.md")
BEGIN, END = "<!-- full-size -->\n", "<!-- /full-size -->\n"
SAMPLES, STEPS = 4, 2
PROBED = 2  # samples of the estimate, which carries them over to all, and of the fidelity card: 1
STUDENTS = {  # by the teacher whose cache they learn from
    "LLaVA-1.5-7B": "MobileVLM-V2-1.7B",
    "Qwen2.5-VL-3B": "Qwen2.5-VL-3B",
}
TEACHERS = (*STUDENTS, "MobileVLM-V2-1.7B")
ANSWER = (
    "The picture shows {count} shapes on a plain ground. The largest of them is {colour} and stands to the left of the "
    "middle; the others are smaller, and two of them touch. Nothing is written anywhere, and nobody is to be seen."
)
COLOURS = ("red", "green", "blue", "orange")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command took.

    Attributes:
        seconds: By the clock.
        peak: Most private memory at a moment, bytes: what is mapped from files, as weights may be, does not count.
        resident: Most memory at a moment, bytes, mapped files included.
    """

    seconds: float
    peak: int
    resident: int


def measured(command: Sequence[str], log: Path) -> Run:
    """Run a command of this project and watch its memory; what it prints goes to ``log``.

    Raises:
        SystemExit: If it fails.
    """
    started = time.perf_counter()
    most = {"RssAnon": 0, "VmRSS": 0}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]], stdout=file, stderr=file
        )
        watching = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, most, watching))
        watcher.start()
        code = process.wait()
        watching.set()
        watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return Run(seconds=time.perf_counter() - started, peak=most["RssAnon"], resident=most["VmRSS"])


def _watch(process: int, most: dict[str, int], ended: threading.Event) -> None:
    """Note the most of each figure of a process's status, every twentieth of a second."""
    status = Path(f"/proc/{process}/status")
    while not ended.wait(0.05):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for name, value in (line.split(":", 1) for line in lines if ":" in line):
            if name in most:
                most[name] = max(most[name], 1024 * int(value.split()[0]))


def write_data(folder: Path) -> Path:
    """Four pictures of photographs' size with a question and an answer of some 40 words each, as LLaVA writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(SAMPLES):
        picture = PIL.Image.new("RGB", (640, 480), "white")
        draw = PIL.ImageDraw.Draw(picture)
        for shape in range(number + 3):
            left, top = 40 + 90 * shape, 60 + 70 * (shape * (number + 1) % 5)
            draw.ellipse((left, top, left + 80, top + 80), fill=COLOURS[shape % 4])
        picture.save(folder / f"{number}.jpg")
        told = ANSWER.format(count=number + 3, colour=COLOURS[number])
        turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": told}]
        entries.append({"id": f"sample-{number}", "image": f"{number}.jpg", "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def run_teacher(name: str, model: Path, data: Path, cache: Path) -> dict[str, Any]:
    """Estimate, then build; both load the teacher anew."""
    options = ["--teacher", str(model), "--data", str(data), "--cache", str(cache)]
    options += ["--set", "dtype=bfloat16", "--set", "fidelity_samples=1"]
    said = ROOT / f"{name}-estimate.json"
    estimated = measured(
        ["teacher-cache", "estimate", *options, "--samples", str(PROBED), "--json", str(said)],
        ROOT / f"{name}-estimate.log",
    )
    built = measured(["teacher-cache", "build", *options], ROOT / f"{name}-build.log")
    measured(["cachectl", "verify", str(cache)], ROOT / f"{name}-verify.log")
    told = json.loads(said.read_text(encoding="utf-8"))
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    return {
        "model_bytes": size_of(model),
        "build": asdict(built),
        "estimate": asdict(estimated),
        "estimated_seconds": told["stage_one_hours"] * 3600,
        "estimated_bytes": told["cache_bytes"],
        "estimated_memory": told["probe"]["host_memory"],
        "cache_bytes": size_of(cache),
        "tokens_a_sample": told["probe"]["tokens"],
        "rows": manifest["totals"]["rows"],
    }


def run_student(model: Path, data: Path, cache: Path, output: Path, log: Path) -> dict[str, Any]:
    """Two steps of distilled fine-tuning with adapters, from a cache."""
    options = {
        "phases": "[dft]", "dft.steps": STEPS, "dft.epochs": "null", "dft.batch_size": SAMPLES, "dft.micro_batch_size": 1,
        "dtype": "bfloat16", "gradient_checkpointing": "true", "num_workers": 0,
    }  # fmt: skip
    given = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    command = [
        "distill",
        "train",
        "--student",
        str(model),
        "--cache",
        str(cache),
        "--data",
        str(data),
        "--output",
        str(output),
    ]
    trained = measured([*command, *given], log)
    losses = [json.loads(line) for line in next(output.rglob("log.jsonl")).read_text(encoding="utf-8").splitlines()]
    return {"train": asdict(trained), "steps": len(losses), "student_bytes": size_of(output / "final")}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(results: Mapping[str, Any]) -> str:
    """The page's table: a row a run."""
    machine = results["machine"]
    lines = [
        f"| {machine['processor']}, {machine['cores']} cores, torch {machine['torch']} | weights, GB | peak memory, GB | estimated "
        "| seconds | estimated | cache, kB | estimated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in results["teachers"].items():
        lines.append(
            f"| teacher {name}, {SAMPLES} samples, bfloat16 | {_gigabytes(run['model_bytes'])} | {_memory(run['build'])} | "
            f"{_gigabytes(run['estimated_memory'])} | {run['build']['seconds']:.0f} | {run['estimated_seconds']:.0f} | "
            f"{run['cache_bytes'] / 1e3:,.0f} | {run['estimated_bytes'] / 1e3:,.0f} |"
        )
    for teacher, run in results["students"].items():
        lines.append(
            f"| student {STUDENTS[teacher]} from {teacher}'s cache, {STEPS} steps with adapters, float32 weights | "
            f"{_gigabytes(results['teachers'][STUDENTS[teacher]]['model_bytes'])} | {_memory(run['train'])} | | "
            f"{run['train']['seconds']:.0f} | | | |"
        )
    return "\n".join(lines) + "\n"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _memory(run: Mapping[str, Any]) -> str:
    """Resident memory, and the private part of it."""
    return f"{_gigabytes(run['resident'])} ({_gigabytes(run['peak'])} private)"


def rewrite_page(results: Mapping[str, Any]) -> None:
    """Put the table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Write models, run them through both stages, store the figures and the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=TEACHERS, choices=TEACHERS, help="teachers to run; others are not stored"
    )
    parser.add_argument("--keep", action="store_true", help="keep the models that were written")
    options = parser.parse_args()
    ROOT.mkdir(parents=True, exist_ok=True)
    data = write_data(ROOT / "data")
    done = ROOT / "done.json"
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__, "code": code_of_now()}
    results: dict[str, Any] = json.loads(done.read_text()) if done.is_file() else {}
    if results.get("made_by") != made_by:  # of other code
        results = {"made_by": made_by, "teachers": {}, "students": {}}
    for name in options.only:
        cache = ROOT / f"{name}-cache"
        if name not in results["teachers"]:
            shutil.rmtree(cache, ignore_errors=True)
            results["teachers"][name] = run_teacher(name, written(name), data, cache)
            done.write_text(json.dumps(results, indent=1))
            print(f"teacher {name}: {results['teachers'][name]}", flush=True)
        if not options.keep and STUDENTS.get(name) != name:
            shutil.rmtree(ROOT / name, ignore_errors=True)
        if name in STUDENTS and name not in results["students"]:
            output = ROOT / f"{name}-student"
            shutil.rmtree(output, ignore_errors=True)
            log = ROOT / f"{name}-student.log"
            results["students"][name] = run_student(written(STUDENTS[name]), data, cache, output, log)
            done.write_text(json.dumps(results, indent=1))
            print(f"student of {name}: {results['students'][name]}", flush=True)
            shutil.rmtree(output)
        if not options.keep and STUDENTS.get(name) == name:
            shutil.rmtree(ROOT / name, ignore_errors=True)
    if set(results["teachers"]) == set(TEACHERS) and set(results["students"]) == set(STUDENTS):
        name = platform.processor() or platform.machine()
        results["machine"] = {"processor": name, "cores": os.cpu_count(), **made_by}
        STORED.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        rewrite_page(results)
    print(f"stored in {STORED}" if "machine" in results else f"kept in {done}; run the other parts too")


def code_of_now() -> str:
    """Fingerprint of the code that is measured."""
    files = sorted(
        path for name in ("common", "data", "stage1_teacher", "stage2_student") for path in Path(name).rglob("*.py")
    )
    return fingerprint({str(path): file_checksum(path) for path in files})


def written(name: str) -> Path:
    """A model's folder; it is written where there is none."""
    folder = ROOT / name
    if not (folder / "written").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        WRITERS[name](folder)
        (folder / "written").touch()
    return folder


if __name__ == "__main__":
    main()
