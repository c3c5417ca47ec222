"""Data of many samples: what opening, fingerprinting, joining and sealing them costs a sample. ``make bench-scale``.

Archives of tiny text samples (1 kB each) and files of the same samples as JSON lines, a JSON list and CSV are written,
looked at in fresh processes, and joined with a cache that is described, not filled. What is found is kept, however small
the files. Processor time is what is compared: it does not depend on what else a machine does.
"""

import argparse
import csv
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
from vlm_distill_cache.data.sources.kept import store
store.KEPT_FROM = 0
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.common.opening import open_cache
import numpy as np
import webdataset.shardlists
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.stage2_student.batches.sampler import ShardShuffle
from vlm_distill_cache.stage2_student.batches.dataset import join_cache
folder, samples = Path(sys.argv[1]), int(sys.argv[2])
TARS, CACHE, LINES, LIST, ROWS, MIXTURE = (
    str(folder / name) for name in ("tars", "cache", "lines.jsonl", "list.json", "rows.csv", "mixture.yaml")
)
def used():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM:"))
    return sum(os.times()[:4]), int(line.split()[1]) / 1000
before = used()
def told():
    now = used()
    print(json.dumps({"seconds": now[0] - before[0], "peak_mb": now[1] - before[1]}))
"""
STEPS = {
    "open, nothing kept": "data = open_dataset(TARS); told()",
    "open and fingerprint by files": "data = open_dataset(TARS + '/*.tar:streaming=true'); data.survey(); told()",
    "fingerprint by texts, nothing kept": "data = open_dataset(TARS); before = used(); data.survey(); told()",
    "open and fingerprint by texts, kept": "data = open_dataset(TARS); data.survey(); told()",
    "open JSON lines, nothing kept": "data = open_dataset(LINES); told()",
    "open JSON lines, kept": "data = open_dataset(LINES); told()",
    "open a JSON list, nothing kept": "data = open_dataset(LIST); told()",
    "open a JSON list, kept": "data = open_dataset(LIST); told()",
    "open CSV, nothing kept": "data = open_dataset(ROWS); told()",
    "open CSV, kept": "data = open_dataset(ROWS); told()",
    "fingerprint of CSV by texts, nothing kept": "data = open_dataset(ROWS); before = used(); data.survey(); told()",
    "open and fingerprint of CSV by texts, kept": "data = open_dataset(ROWS); data.survey(); told()",
    "open a mixture of JSON lines, nothing kept": "data = open_dataset(MIXTURE); told()",
    "open a mixture of JSON lines, kept": "data = open_dataset(MIXTURE); told()",
    "fingerprint of a mixture by texts, nothing kept": "data = open_dataset(MIXTURE); before = used(); data.survey(); told()",
    "open and fingerprint of a mixture by texts, kept": "data = open_dataset(MIXTURE); data.survey(); told()",
    "seal the cache": "seal(Path(CACHE)); told()",
    "open the cache": "cache = open_cache(Path(CACHE)); told()",
    "join": "cache = open_cache(Path(CACHE)); data = open_dataset(TARS); before = used(); "
    "join = join_cache(cache, data); told(); assert len(join.places) == len(data)",
    "order of an epoch": "shards = np.split(np.arange(samples), range(4096, samples, 4096)); before = used(); "
    "ShardShuffle(shards=shards, seed=0).take(0, 64); told()",
}


def write_tars(folder: Path, samples: int) -> None:
    """Write archives of text samples."""
    folder.mkdir()
    for start in range(0, samples, SAMPLES_IN_A_TAR):
        with (folder / f"{start // SAMPLES_IN_A_TAR:06d}.tar").open("wb") as file:
            file.writelines(_members(range(start, min(start + SAMPLES_IN_A_TAR, samples))))
            file.write(b"\0" * 10240)


def write_files(folder: Path, samples: int) -> None:
    """Write the same samples as JSON lines, as a JSON list, as CSV, and as a mixture of two files of JSON lines."""
    write_lines(folder / "lines.jsonl", range(samples))
    for part in range(2):
        write_lines(folder / f"part-{part}.jsonl", range(part, samples, 2))
    (folder / "mixture.yaml").write_text("- part-0.jsonl\n- part-1.jsonl\n")
    with (folder / "list.json").open("w") as file:
        json.dump([_named(number) for number in range(samples)], file)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _named(0))
        writer.writeheader()
        writer.writerows(map(_named, range(samples)))


def write_lines(path: Path, numbers: range) -> None:
    """Write samples as JSON lines."""
    with path.open("w") as file:
        for number in numbers:
            file.write(json.dumps(_named(number)) + "\n")


def _named(number: int) -> dict[str, str | None]:
    return {"id": f"sample/{number:08d}"} | _entry(number)


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
        write_tars(Path(scratch) / "tars", options.samples)
        write_files(Path(scratch), options.samples)
        describe_cache(Path(scratch) / "cache", options.samples, 4096)
        environment = os.environ | {"VLM_DISTILL_CACHE_DIR": f"{scratch}/kept"}
        for name, step in STEPS.items():
            if "by texts" in name and not options.texts:
                continue
            command = [sys.executable, "-c", _BEGIN + step, scratch, str(options.samples)]
            found = json.loads(
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            )
            each = found["seconds"] / options.samples * 1e6
            print(
                f"{name:48s} {found['seconds']:9.2f} s {each:8.2f} us a sample {found['peak_mb']:8.1f} MB", flush=True
            )


if __name__ == "__main__":
    main()
