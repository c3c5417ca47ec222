"""One library's reader of records: writes what it reads, or reads an epoch. ``bench_peers`` runs it in the library's environment.

    python peer_readers.py READER write|read FOLDER

``FOLDER/records`` has the records in plain numpy files: of each field ``NAME.npy``, all samples one after the other, and
``NAME.lengths.npy``; ``order.npy`` is the order of an epoch. A reading prints seconds of processor and of clock, opening
included, and a sum that only whole records give. Nothing here needs this project but its own two readers.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Record = dict[str, np.ndarray]
KEPT_IN_ORDER = 2048  # samples that webdataset shuffles among: about what two of our shards hold


def read_records(folder: Path) -> list[Record]:
    """The records of a folder, in order."""
    names = sorted(path.name.removesuffix(".lengths.npy") for path in folder.glob("*.lengths.npy"))
    parts = {}
    for name in names:
        ends = np.cumsum(np.load(folder / f"{name}.lengths.npy"))[:-1]
        parts[name] = np.split(np.load(folder / f"{name}.npy"), ends)
    return [dict(zip(names, arrays, strict=True)) for arrays in zip(*parts.values(), strict=True)]


def sum_of(records: Iterable[Record]) -> tuple[int, int]:
    """Records, and the sum of their token ids: what was read is what was written, in whatever order."""
    count = total = 0
    for record in records:
        count += 1
        total += int(record["token_ids"].sum(dtype=np.int64))
    return count, total


def _litdata_record(record: Record) -> Record:
    return record


class LitData:
    """Optimised chunks of 64 MB, read as a stream that it shuffles itself; by index it takes a hundred times as long."""

    def write(self, records: list[Record], folder: Path) -> None:
        """Write them as the library's own command does."""
        import litdata

        litdata.optimize(
            fn=_litdata_record, inputs=records, output_dir=str(folder), chunk_bytes="64MB", num_workers=1, verbose=False
        )

    def read(self, folder: Path, order: list[int]) -> Iterator[Record]:
        """Read them in an order of its own."""
        import litdata

        yield from litdata.StreamingDataset(str(folder), shuffle=True)


def _without_vision() -> None:
    """Import `streaming` without its data sets of pictures, which nobody reads here: they import torchvision.

    PyPI's torchvision is built for CUDA, and does not load beside a torch of CPUs alone.
    """
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))


class Mosaic:
    """MDS shards of 64 MB without compression, mapped by index."""

    def write(self, records: list[Record], folder: Path) -> None:
        """Write them; arrays keep dtype and shape."""
        _without_vision()
        from streaming import MDSWriter

        columns = {name: f"ndarray:{array.dtype.name}" for name, array in records[0].items()}
        with MDSWriter(out=str(folder), columns=columns, hashes=["xxh128"], size_limit=1 << 26) as writer:
            for record in records:
                writer.write(record)

    def read(self, folder: Path, order: list[int]) -> Iterator[Record]:
        """Read them in an order."""
        _without_vision()
        from streaming import LocalDataset

        found = LocalDataset(str(folder))
        for place in order:
            yield found[place]


class WebDataset:
    """Tars of 1,024 samples, each one pickled member, read as a stream and shuffled in a buffer.

    A ``.npy`` for each field, of which a record has some twenty, takes many times as long.
    """

    def write(self, records: list[Record], folder: Path) -> None:
        """Write them with the library's own writer."""
        import webdataset

        with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=1024, verbose=0) as writer:
            for i, record in enumerate(records):
                writer.write({"__key__": f"{i:08d}", "pyd": record})

    def read(self, folder: Path, order: list[int]) -> Iterator[Record]:
        """Read them in an order of its own: a stream has no other."""
        import webdataset

        tars = sorted(map(str, folder.glob("*.tar")))
        stream = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(KEPT_IN_ORDER).decode()
        for sample in stream:
            yield sample["pyd"]


class Ours:
    """A cache, every shard checked against its checksums when it is first read from."""

    def read(self, folder: Path, order: list[int]) -> Iterator[Record]:
        """Read them in an order."""
        from vlm_distill_cache.common.opening import open_cache

        cache = open_cache(folder, open_shards=4)
        names = list(cache.sample_ids)
        for place in order:
            yield cache.read(names[place])


READERS: dict[str, Callable[[], Any]] = {
    "ours, zarr": Ours, "ours, tar": Ours, "litdata": LitData, "mosaicml-streaming": Mosaic, "webdataset": WebDataset,
}  # fmt: skip


def main(reader: str, what: str, place: str) -> None:
    """Write or read one library's data in a folder."""
    folder, library = Path(place), READERS[reader]()
    if what == "write":
        library.write(read_records(folder / "records"), folder / reader)
        return
    order = np.load(folder / "order.npy").tolist()
    sum_of(library.read(folder / reader, order[:64]))  # imports, and what a first read prepares
    cpu, clock = time.process_time(), time.perf_counter()
    count, total = sum_of(library.read(folder / reader, order))
    seconds = {"cpu": time.process_time() - cpu, "clock": time.perf_counter() - clock}
    sys.stdout.write(json.dumps({**seconds, "count": count, "sum": total}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
