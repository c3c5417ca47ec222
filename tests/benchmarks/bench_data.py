"""Data of many samples: what opening, fingerprinting, joining and sealing them costs a sample. ``make bench-scale``.

Archives of tiny text samples (1 kB each) and a file of JSON lines are written, looked at in fresh processes, and joined with a
cache that is described, not filled. Processor time is what is compared: it does not depend on what else a machine does.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bench_scale import describe_cache

SAMPLES_IN_A_TAR = 10_000

_BEGIN = """
import json, os, sys, time
from pathlib import Path
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.common.opening import open_cache
import numpy as np
import webdataset.shardlists
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.stage2_student.batches.sampler import ShardShuffle
from vlm_distill_cache.stage2_student.batches.dataset import join_cache
def used():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM:"))
    return sum(os.times()[:4]), int(line.split()[1]) / 1000
before = used()
def told():
    now = used()
    print(json.dumps({"seconds": now[0] - before[0], "peak_mb": now[1] - before[1]}))
"""
STEPS = {
    "open, nothing kept": "data = open_dataset(sys.argv[1]); told()",
    "open and fingerprint by files": "data = open_dataset(sys.argv[1] + '/*.tar:streaming=true'); data.survey(); told()",
    "fingerprint by texts, nothing kept": "data = open_dataset(sys.argv[1]); before = used(); data.survey(); told()",
    "open and fingerprint by texts, kept": "data = open_dataset(sys.argv[1]); data.survey(); told()",
    "open JSON lines, nothing kept": "data = open_dataset(sys.argv[3]); told()",
    "open JSON lines, kept": "data = open_dataset(sys.argv[3]); told()",
    "seal the cache": "seal(Path(sys.argv[2])); told()",
    "open the cache": "cache = open_cache(Path(sys.argv[2])); told()",
    "join": "cache = open_cache(Path(sys.argv[2])); data = open_dataset(sys.argv[1]); before = used(); "
    "join = join_cache(cache, data); told(); assert len(join.places) == len(data)",
    "order of an epoch": "shards = np.split(np.arange(int(sys.argv[4])), range(4096, int(sys.argv[4]), 4096)); before = used(); "
    "ShardShuffle(shards=shards, seed=0).take(0, 64); told()",
}


def write_tars(folder: Path, samples: int) -> None:
    """Write archives of text samples."""
    folder.mkdir()
    for start in range(0, samples, SAMPLES_IN_A_TAR):
        with (folder / f"{start // SAMPLES_IN_A_TAR:06d}.tar").open("wb") as file:
            file.writelines(_members(range(start, min(start + SAMPLES_IN_A_TAR, samples))))
            file.write(b"\0" * 10240)


def write_lines(path: Path, samples: int) -> None:
    """Write the same samples as JSON lines."""
    with path.open("w") as file:
        for number in range(samples):
            file.write(json.dumps({"id": f"sample/{number:08d}"} | _entry(number)) + "\n")


def _entry(number: int) -> dict[str, str | None]:
    return {"question": f"What is {number}?", "answer": f"A number, {number}.", "image": None}


def _members(numbers: range) -> Iterator[bytes]:
    for number in numbers:
        data = json.dumps(_entry(number)).encode()
        info = tarfile.TarInfo(f"sample/{number:08d}.json")
        info.size = len(data)
        yield info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


def main() -> None:
    """Measure and print, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--texts", action="store_true", help="fingerprint by texts, too, which takes most of the time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data, cache, lines = (Path(scratch) / name for name in ("data", "cache", "lines.jsonl"))
        write_tars(data, options.samples)
        write_lines(lines, options.samples)
        describe_cache(cache, options.samples, 4096)
        environment = os.environ | {"VLM_DISTILL_CACHE_DIR": f"{scratch}/kept"}
        for name, step in STEPS.items():
            if "by texts" in name and not options.texts:
                continue
            command = [sys.executable, "-c", _BEGIN + step, str(data), str(cache), str(lines), str(options.samples)]
            found = json.loads(
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            )
            each = found["seconds"] / options.samples * 1e6
            print(
                f"{name:40s} {found['seconds']:9.2f} s {each:8.2f} us a sample {found['peak_mb']:8.1f} MB", flush=True
            )


if __name__ == "__main__":
    main()
