"""Readers of other libraries beside ours: ``make bench-peers`` (opt-in; 3 GB in ``build/peers``).

All hold the same records, those of the built-in cache, and are read by one process in the same shuffled order (litdata and
webdataset in orders of their own, in which they are fastest), in turn, each time by a fresh process. Each library has an
environment of its own, made once from PyPI. Figures are of processor time, which neighbours on the machine change least; the
clock's are stored beside.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_docs import ROOT, table_in
from tests.benchmarks.bench_results import describe_machine, rounded
from tests.benchmarks.bench_storage import build_builtin_cache
from tests.benchmarks.peer_readers import READERS
from vlm_distill_cache.common.files.disk import folder_bytes
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.stage2_student.batches.sampler import epoch_order

FOLDER = Path("build/peers")
STORED = Path(__file__).parent / "results" / "bench_peers.json"
BEGIN, END = "<!-- bench-peers -->\n", "<!-- /bench-peers -->\n"
PACKAGES = {
    "litdata": "litdata==0.2.76",
    "mosaicml-streaming": "mosaicml-streaming==0.13.0",
    "webdataset": "webdataset==1.0.2",
}


def environment_of(reader: str) -> Path:
    """The Python that a reader runs in; a library's is made if it is not there."""
    if reader not in PACKAGES:
        return Path(sys.executable)
    folder, wanted = FOLDER / f"venv-{reader}", PACKAGES[reader]
    made = folder / "made"
    if not made.is_file() or made.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        asked = [wanted, "numpy", *(["torch==2.13.0"] if reader != "webdataset" else [])]
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *asked], check=True)
        made.write_text(wanted)
    return folder / "bin" / "python"


def write_records(cache_dir: Path, folder: Path) -> None:
    """Put a cache's records, and an epoch's order, into plain numpy files for `peer_readers`."""
    cache = open_cache(cache_dir)
    records = [cache.read(sample_id) for sample_id in cache.sample_ids]
    (folder / "records").mkdir(parents=True)
    for name in (field.name for field in cache.fields):
        arrays = [record[name] for record in records]
        np.save(folder / "records" / f"{name}.npy", np.concatenate(arrays))
        np.save(folder / "records" / f"{name}.lengths.npy", np.array([len(array) for array in arrays]))
    starts = np.cumsum([0, *(shard.samples for shard in cache.manifest.shards)])
    blocks = [np.arange(a, b) for a, b in pairwise(starts)]
    np.save(folder / "order.npy", epoch_order(blocks, seed=0, epoch=0, window=2))


def _run(reader: str, what: str, folder: Path) -> str:
    command = [environment_of(reader), ROOT / "tests" / "benchmarks" / "peer_readers.py", reader, what, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def measure(cache_dir: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Write the records for every reader, and read them in turn.

    Args:
        cache_dir: A finished cache in Zarr shards.
        folder: Empty.
        rounds: Epochs of each.

    Returns:
        Of each reader thousand records a second of processor (``cpu``) and of clock time (``clock``), a number each round, and
        ``megabytes`` on disk.
    """
    write_records(cache_dir, folder)
    (folder / "ours, zarr").symlink_to(cache_dir.resolve(), target_is_directory=True)
    convert(cache_dir, folder / "ours, tar", "webdataset")
    for reader in PACKAGES:
        (folder / reader).mkdir()
        _run(reader, "write", folder)
    found: dict[str, Any] = {reader: defaultdict(list) for reader in READERS}
    sums = set()
    for _ in range(rounds):
        for reader, values in found.items():
            seen = json.loads(_run(reader, "read", folder).splitlines()[-1])
            sums.add((seen["count"], seen["sum"]))
            for clock in ("cpu", "clock"):
                values[clock].append(rounded(1e-3 * seen["count"] / seen[clock]))
    if len(sums) != 1:
        raise AssertionError(f"the readers did not read the same records: {sums}")
    sizes = {reader: rounded(1e-6 * folder_bytes((folder / reader).resolve())) for reader in READERS}
    return {reader: {**values, "megabytes": sizes[reader]} for reader, values in found.items()}


def table(stored: dict[str, Any]) -> str:
    """The results as a table of Markdown; empty without any."""
    if not stored.get("readers"):
        return ""
    machine, versions = stored["machine"], {name: line.partition("==")[2] for name, line in PACKAGES.items()}
    head = f"{machine['processor']}, {machine['cores']} cores, load {machine['load']}"
    lines = [f"| {head} | thousand records a second of processor time | of clock time | MB |", "|---|---|---|---|"]
    for reader, values in stored["readers"].items():
        cells = [f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in (values["cpu"], values["clock"])]
        lines.append(
            f"| {reader} {versions.get(reader, '')} | {' | '.join(cells)} | {values['megabytes']:.1f} |".replace(
                "  ", " "
            )
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, store, write the page's table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for reader in PACKAGES:
        environment_of(reader)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "built").mkdir()
        cache = build_builtin_cache(Path(scratch) / "built")[1]
        readers = measure(cache, Path(scratch) / "data", rounds=arguments.rounds)
    stored = {"machine": describe_machine(), "packages": PACKAGES, "readers": readers}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    page = Path("docs/results.md")
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + table(stored) + END))
    sys.stdout.write(table(stored))


if __name__ == "__main__":
    main()
