"""Break `distill run` before some of its file operations, run it again, compare with an undisturbed run.

Run as ``python break_run.py HOW STRIDE FOLDER [PLACE ...]``: a process of its own, which forks the runs that it
breaks. HOW is ``kill`` (the process dies) or ``full`` (this and every later operation that needs space fails); the
places are those named, each of them in the run that the one before it left, or every STRIDE-th, each in a run of its
own. Prints the number of places.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import tqdm
from break_everywhere import KILLED, break_before
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.stage2_student.cli import main as distill

FAILED = 1
OPTIONS = (
    "phases=[dft]", "dft.steps=2", "dft.batch_size=2", "checkpoint_every=1", "keep_checkpoints=1", "device=cpu",
    "evaluation.limit=1", "evaluation.letters=false", "evaluation.agreement_samples=2", "evaluation.overlays=1",
    "num_workers=0",
)  # fmt: skip
TIMES = ("step_s", "samples_per_s", "data_wait")


def run(cache, output):
    arguments = [
        "run",
        "--student",
        "mobilevlm-tiny",
        "--data",
        DATA,
        "--cache",
        str(cache),
        "--output",
        str(output),
    ]
    distill([*arguments, *(part for option in OPTIONS for part in ("--set", option))])


def break_at(place, how, cache, output):
    break_before(place, how, output)
    run(cache, output)


def in_child(log, function, *arguments):
    """Exit code, and all that was said."""
    child = os.fork()
    if child == 0:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.fsync = lambda descriptor: None  # no machine crashes here, only processes die
        code = 99
        try:
            function(*arguments)
        except SystemExit as done:
            code = done.code or 0
        finally:
            if code == 99:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def left(output):
    """What a run leaves, without times and the names of folders; of a checkpoint and TensorBoard, that it is there."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.is_dir() or "tensorboard" in name:
            continue
        content = path.read_bytes()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            content = [{key: line[key] for key in line if key not in TIMES} for line in lines]
        elif path.name == "distillation.json":
            content = json.loads(content)
            content = {key: content[key] for key in ("fingerprint", "caches", "encoder")}
        elif "checkpoints" in path.parts or path.name in ("run.json", "config.yaml", "report.html"):
            content = None
        found[name] = content
    return found


def main():
    how, stride, folder, *places = sys.argv[1:]
    folder, stride = Path(folder), int(stride)
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread of ours may live through a fork
    cache, log = folder / "cache", folder / "said.txt"
    build_tiny_cache(cache)
    gc.freeze()  # what is loaded needs no collecting in the forks
    code, said = in_child(log, run, cache, folder / "whole")
    assert code == 0, said
    expected = left(folder / "whole")
    remaining = iter([int(place) for place in places] or range(1, 10_000, stride))
    broken = 0
    for place in remaining:
        output = folder / (f"run-{place}" if not places else "run")
        code, said = in_child(log, break_at, place, how, cache, output)
        assert "Traceback" not in said, f"place {place}: {said}"
        if code == 0:
            assert not places, f"a run has fewer than {place} places"
            break
        assert code == {"kill": KILLED, "full": FAILED}[how], f"place {place}: exit code {code}: {said}"
        assert how == "kill" or "then run the same command again" in said, f"place {place}: {said}"
        broken += 1
        if places and broken < len(places):
            continue
        code, said = in_child(log, run, cache, output)
        assert code == 0, f"place {place}: {said}"
        found = left(output)
        differing = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
        assert found == expected, f"place {place}: {sorted(expected.keys() ^ found.keys())} {differing}"
        shutil.rmtree(output)
    sys.stdout.write(f"{broken}\n")


if __name__ == "__main__":
    main()
