"""First contact with a GPU, in under 8 minutes: what no CPU can show, part by part, in one JSON.

    make gpu-check                                      # one GPU, 70 GB of memory or more; a shorter list fits less
    .venv/bin/python -m tests.benchmarks.gpu_check --tiny    # on any machine: that the parts themselves run

Each part is a process of its own, so that one that fails, or hangs, loses no other and leaves no memory taken. Models are of
published size with random weights (`full_size_models`): nothing is downloaded. Without a GPU nothing runs (exit code 2).
"""

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "results" / "gpu_check.json"
BUDGET_S = 460  # of all parts
NEEDED = (  # by import name; wheels are called alike but for those that follow the colon
    "torch", "transformers", "accelerate", "zarr", "numcodecs", "safetensors", "xxhash", "click", "numpy", "PIL:pillow",
    "yaml:pyyaml", "tokenizers", "sentencepiece", "google.protobuf:protobuf", "tqdm", "pytest", "hypothesis",
)  # fmt: skip
PARTS: dict[str, int] = {  # seconds that each may take; the order in which they run
    "machine": 60,
    "stage one": 150,
    "stage two": 120,
    "out of memory": 60,
    "fsdp2": 60,
    "selection": 40,
    "tests": 150,
}


def lacking() -> list[str]:
    """Packages that are not installed, by the names of their wheels."""
    missing = []
    for entry in NEEDED:
        module, _, wheel = entry.partition(":")
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            missing.append(wheel or module)
    return missing


def run_part(name: str, folder: Path, *, tiny: bool, limit_s: float) -> dict[str, Any]:
    """One part in a process of its own: its figures, or what went wrong."""
    told, began = folder / f"{name}.json", time.perf_counter()
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check_parts", name, str(folder), str(told)]
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True, timeout=limit_s, check=False
        )
        said, code = f"{done.stdout}\n{done.stderr}", done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = f"{_text(error.stdout)}\n{_text(error.stderr)}\nstopped after {limit_s:.0f} s", -1
    seconds = round(time.perf_counter() - began, 1)
    if code == 0 and told.is_file():
        return {"ok": True, "seconds": seconds, **json.loads(told.read_text(encoding="utf-8"))}
    return {"ok": False, "seconds": seconds, "error": said.strip()[-3000:]}


def _text(said: str | bytes | None) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def run_all(
    folder: Path, *, tiny: bool, parts: Mapping[str, int] = PARTS, run: Callable[..., dict[str, Any]] = run_part
) -> dict[str, Any]:
    """All parts within the budget, one after the other; those for which no time is left say so."""
    began, found = time.perf_counter(), dict[str, Any]()
    for name, most in parts.items():
        left = BUDGET_S - (time.perf_counter() - began)
        if tiny or left > 20:
            found[name] = run(name, folder, tiny=tiny, limit_s=600 if tiny else min(most, left))
        else:
            found[name] = {"ok": False, "seconds": 0.0, "error": "not run: no time was left"}
        state = "ok" if found[name]["ok"] else f"FAILED: {found[name]['error'].splitlines()[-1][:300]}"
        print(f"{name}: {found[name]['seconds']:.0f} s, {state}", flush=True)
    machine = found.get("machine", {}).get("figures", {})
    return {
        "device": machine.get("device", "unknown"),
        "seconds": round(time.perf_counter() - began, 1),
        "tiny": tiny,
        "parts": found,
    }


def scratch() -> Path | None:
    """Where models are written: in memory, where 40 GB are free; None: where temporary files go."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30 else None


def main() -> int:
    """Run the parts and store what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, on the CPU: tries the script, measures nothing"
    )
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--output", type=Path, help=f"JSON to write; default: {STORED.name} among the stored results")
    options = parser.parse_args()
    if missing := lacking():
        print(f"gpu-check needs packages that are not here; install their wheels: pip install {' '.join(missing)}")
        return 2
    if not options.tiny and not _has_gpu():
        print("gpu-check needs a CUDA GPU, and there is none here; --tiny tries the script on a CPU")
        return 2
    output = options.output or STORED
    if options.tiny and options.output is None:
        parser.error("--tiny measures nothing that is worth storing: say where with --output FILE")
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=None if options.tiny else scratch()) as folder:
        results = run_all(
            Path(folder), tiny=options.tiny, parts={name: PARTS[name] for name in PARTS if name in options.only}
        )
    results["python"] = platform.python_version()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, part in results["parts"].items() if not part["ok"]]
    print(
        f"{results['device']}: {results['seconds']:.0f} s, {len(failed)} of {len(results['parts'])} parts failed; "
        f"stored in {output}"
    )
    return 1 if failed else 0


def _has_gpu() -> bool:
    import torch  # seconds; --help does without

    return torch.cuda.is_available()  # makes no context: the parts have the whole memory


if __name__ == "__main__":
    sys.exit(main())
