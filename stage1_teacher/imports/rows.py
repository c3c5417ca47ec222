"""Files of responses, a row a sample: found by sample id, and read one at a time however large they are.

Files are gone through once. What stays in memory is where each sample's rows lie.
"""

import json
import logging
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import xxhash

from vlm_distill_cache.common.config import read_yaml
from vlm_distill_cache.common.errors import ConfigError, DataError, SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.sources.json_text import decode, is_plain
from vlm_distill_cache.stage1_teacher.imports.distillkit import COMPRESSION, CONFIG_FILE, PACKED
from vlm_distill_cache.stage1_teacher.imports.forms import body_of, opened, tokens_of, why_not
from vlm_distill_cache.stage1_teacher.imports.served import shown

logger = logging.getLogger(__name__)

ID_NAMES = ("custom_id", "sample_id", "id", "request_id", "rid")
LONGEST_ROW = 1 << 28  # bytes of one row
PARQUET = ".parquet"
KINDS = (".jsonl", ".ndjson", PARQUET)
"""Files that are taken out of a folder; a file that is named may be called anything."""
_NAMED = 3  # rows that a message shows
_BATCH = 16  # rows of a parquet file at a time
Row = Mapping[str, Any]
Join = Callable[[Sequence[int | None]], list[str]]


@dataclass
class Noted:
    """How often something was met, and the first few of it."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(text)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row lies: byte and number of a line, or number of a row in a parquet file."""

    file: int
    start: int
    number: int


@dataclass
class ServedRows:
    """The rows of some files by sample id; a context manager, which holds the files open.

    Attributes:
        files: In the order given.
        places: Of each sample's rows; several where a request was repeated.
        models: What rows call the model, and how often.
        digest: Of the files' contents, in whatever order they were given.
        broken: Rows that could not be read, with the reasons.
        strangers: Rows of no sample of the data, with their ids.
        join: From the tokens of a row that has no sample's id to the samples that it is of.
    """

    files: Sequence[Path]
    places: dict[str, list[Place]] = field(default_factory=dict)
    models: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    broken: Noted = field(default_factory=Noted)
    strangers: Noted = field(default_factory=Noted)
    rows: int = 0
    join: Join | None = None
    _why: str = ""
    _settings: dict[Path, Any] = field(default_factory=dict)
    _open: dict[int, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _group: tuple[int, int, Any] | None = None

    @classmethod
    def of(cls, given: Sequence[Path], ids: Collection[str], *, join: Join | None = None) -> Self:
        """Look through files, or folders of such, for the rows of some samples.

        Raises:
            DataError: A file cannot be read, or no row is of these samples.
            ConfigError: What reads parquet files is not installed.
        """
        found = cls(files=_expand(given), join=join)
        wanted, digests = frozenset(ids), []
        for number, path in enumerate(found.files):
            digest = xxhash.xxh3_128()
            for place, row in _scan(path, number, digest, found.broken):
                found._add(place, row, wanted)
            digests.append(digest.hexdigest())
        found.digest = fingerprint(sorted(digests))
        found._refuse_nothing(ids)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, sample_id: str) -> Row:
        """The body of a sample's response.

        Raises:
            SampleError: There is none, its request failed, or several differ.
        """
        bodies: list[Row] = []
        problem: SampleError | None = None
        for place in self.places.get(sample_id, ()):
            try:
                body = body_of(self._with_settings(place, self._row(place)))
            except SampleError as error:
                problem = error
            else:
                if body not in bodies:
                    bodies.append(body)
        if len(bodies) > 1:
            at = " and ".join(self._named(place) for place in self.places[sample_id][:2])
            raise SampleError(f"two responses that differ have its id: {at}; keep one of them")
        if bodies:
            return bodies[0]
        raise problem or SampleError(missing_reason())

    def report(self) -> None:
        """Log what of the files is not used."""
        if self.broken.count:
            logger.warning(
                "%d rows cannot be read, so their samples count as missing: %s",
                self.broken.count, "; ".join(self.broken.first),
            )  # fmt: skip
        if self.strangers.count:
            logger.warning(
                "%d rows are of no sample of the data, for example of %s",
                self.strangers.count, ", ".join(map(shown, self.strangers.first)),
            )  # fmt: skip

    def _add(self, place: Place, row: Row, wanted: Collection[str]) -> None:
        self.rows += 1
        names = list(_ids_of(row))
        sample_id = next((name for name in names if name in wanted), None)
        tokens = tokens_of(row) if sample_id is None and self.join is not None else None
        if tokens is not None and self.join is not None and (owners := self.join(tokens)):
            for owner in owners:
                self.places.setdefault(owner, []).append(place)
            return
        if sample_id is None:
            self._why = self._why or why_not(row)
            self.strangers.add(names[0] if names else f"{self._named(place)} (no id)")
            return
        self.places.setdefault(sample_id, []).append(place)
        model = _model_of(row)
        if model:
            self.models[model] += 1

    def _refuse_nothing(self, ids: Collection[str]) -> None:
        if self.places:
            return
        if not self.rows:
            why = f": {self.broken.first[0]}" if self.broken.count else ""
            raise DataError(
                f"{self.files[0]}: no row can be read{why}; expected a JSON object a line, or a parquet file"
            )
        if self._why:
            raise DataError(f"{self.files[0]}: {self._why}")
        theirs, ours = (", ".join(map(shown, names)) for names in (self.strangers.first, list(ids)[:_NAMED]))
        raise DataError(
            f"{self.files[0]}: none of the {self.rows} rows is of a sample of the data: rows are of {theirs}, samples are "
            f"{ours}; each row needs its sample's id as {', '.join(ID_NAMES[:-1])} or {ID_NAMES[-1]} (rows of DistillKit and "
            "NeMo-Aligner: the tokens of a sample without a picture)"
        )

    def _named(self, place: Place) -> str:
        return f"{self.files[place.file].name}:{place.number}"

    def _row(self, place: Place) -> Row:
        path = self.files[place.file]
        if path.suffix.lower() == PARQUET:
            return self._parquet_row(place)
        if place.file not in self._open:
            self._open[place.file] = self._stack.enter_context(path.open("rb"))
        handle: BinaryIO = self._open[place.file]
        handle.seek(place.start)
        try:
            row = json.loads(handle.readline())
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{self._named(place)} changed while it was read: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise SampleError(f"{self._named(place)} changed while it was read")
        return row

    def _with_settings(self, place: Place, row: Row) -> Row:
        """A row with the settings that lie beside its file, if it is packed."""
        if not any(name in row for name in PACKED):
            return row
        path = self.files[place.file].parent / CONFIG_FILE
        if path not in self._settings:
            self._settings[path] = read_yaml(path) if path.is_file() else None
        return {**row, COMPRESSION: self._settings[path]}

    def _parquet_row(self, place: Place) -> Row:
        if place.file not in self._open:
            self._open[place.file] = self._stack.enter_context(_parquet(self.files[place.file]))
        file = self._open[place.file]
        if self._group is None or self._group[:2] != (place.file, place.start):
            with _sound(self.files[place.file]):
                self._group = (place.file, place.start, file.read_row_group(place.start))
        first = sum(file.metadata.row_group(group).num_rows for group in range(place.start))
        row: Row = _opened(self._group[2].slice(place.number - 1 - first, 1).to_pylist()[0])
        return row


def missing_reason() -> str:
    """Why a sample without a row cannot be used."""
    return "no row of the files has its id"


def _expand(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS)
            if not inside:
                raise DataError(f"{path}: no .jsonl and no .parquet file is in this folder")
            files += inside
        else:
            files.append(path)
    if len(set(files)) != len(files):
        raise DataError(f"a file is given twice: {', '.join(str(f) for f, n in Counter(files).items() if n > 1)}")
    return files


def _scan(path: Path, file: int, digest: Any, broken: Noted) -> Iterator[tuple[Place, Row]]:
    """Go through the rows of a file; those that cannot be read are added to ``broken``."""
    if path.suffix.lower() == PARQUET:
        yield from _scan_parquet(path, file, digest)
        return
    if path.suffix.lower() == ".array_record":
        raise DataError(
            f"{path}: records of MaxText are pickles, which can run code and are not read here, and hold logits of the likeliest "
            "tokens without the sum over all; write JSON lines of tokens, labels, topk_token_ids, topk_logits and "
            "log_sum_exp_logits, one sequence each"
        )
    with path.open("rb") as handle:
        _refuse_other(path, handle)
        number = 0
        while True:
            start = handle.tell()
            line = handle.readline(LONGEST_ROW)
            if not line:
                return
            number += 1
            digest.update(line)
            if len(line) == LONGEST_ROW:
                raise DataError(
                    f"{path}:{number}: a line of more than {LONGEST_ROW >> 20} MiB; expected a JSON object a line"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                broken.add(f"{path.name}:{number} is nested too deeply")
                continue
            except ValueError as error:
                cut = "" if line.endswith(b"\n") else " (the file ends in the middle of it)"
                broken.add(f"{path.name}:{number} is no JSON{cut}: {one_line(error, limit=100)}")
                continue
            if isinstance(row, dict):
                yield Place(file, start, number), row
            else:
                broken.add(f"{path.name}:{number} is {shown(row)}, expected an object")


def _refuse_other(path: Path, handle: BinaryIO) -> None:
    """Refuse a file that is no text of JSON lines."""
    head = handle.read(64)
    begins = len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0
    handle.seek(begins)
    head = head[begins:]
    if not is_plain(head) or head[:1] not in (b"", b"{", b" ", b"\t", b"\r", b"\n"):
        if not head.startswith(b"["):
            decode(head, where=str(path))  # says what else it is
            raise DataError(f"{path}: expected a JSON object a line, in UTF-8")
        raise DataError(f"{path} is one JSON list; write an object a line (jq -c '.[]' OLD > NEW.jsonl)")


def _scan_parquet(path: Path, file: int, digest: Any) -> Iterator[tuple[Place, Row]]:
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    number = 0
    with _parquet(path) as table:
        for group in range(table.num_row_groups):
            batches = iter(table.iter_batches(batch_size=_BATCH, row_groups=[group]))
            while True:
                with _sound(path):
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist()
                for row in rows:
                    number += 1
                    yield Place(file, group, number), _opened(row)
                if batch is None:
                    break


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"{path}: parquet files are read with pyarrow, which is not installed; run `pip install 'vlm-distill-cache[hf]'`, or "
            "give JSON lines"
        ) from error
    with _sound(path):
        return ParquetFile(path)


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Say which parquet file is damaged, whatever its reader makes of it."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a parquet file: {one_line(error)}; write it again") from error


def _opened(row: Row) -> Row:
    """A row of a table, of which cells may be JSON texts."""
    return {name: opened(cell) for name, cell in row.items()}


def _ids_of(row: Row) -> Iterator[str]:
    """What may be the sample's id in a row, the likeliest first."""
    inside = [
        row,
        *(part for part in (row.get("response"), row.get("metadata"), row.get("meta_info")) if isinstance(part, dict)),
    ]
    for part in inside:
        for name in ID_NAMES:
            value = part.get(name)
            if isinstance(value, float) and value.is_integer():  # what a table makes of numbers beside nothing
                value = int(value)
            if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
                yield str(value)


def _model_of(row: Row) -> str:
    try:
        name = body_of(row).get("model")
    except SampleError:
        return ""
    return name if isinstance(name, str) else ""
