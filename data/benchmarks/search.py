"""From a folder to the benchmarks in it: every file is looked at, and what none of the layouts knows is said."""

import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.errors import DataError, DistillError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.benchmarks import captions, choices, short_answers, yes_no
from vlm_distill_cache.data.benchmarks.documents import ODD_VALUES, Document, documents_in, open_document, writable
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.data.benchmarks.layouts import Found, Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import Pictures

_NO_NAME = re.compile(r"[^\w.+-]+")
# The first that recognises a file reads it: the more keys a layout is told by, the earlier it stands.
LAYOUTS: tuple[Layout, ...] = (*captions.LAYOUTS, *yes_no.LAYOUTS, *choices.LAYOUTS, *short_answers.LAYOUTS)

_UNREADABLE = (DistillError, *ODD_VALUES)
# Files of a folder, then those alone whose beginnings look like a benchmark: a chart or a page of text each has its own in some,
# thousands of them.
_LOOKED_AT = 50
_BEGINNING = 4096  # bytes
_KEYS = re.compile(rb'"([\w -]{1,40})"\s*:')
_WORDS = re.compile(rb"question|query|caption|foil|sentence|statement|image|file_?name|annotations", re.IGNORECASE)


def find_benchmarks(folder: Path, *, images: Sequence[Path] = ()) -> Found:
    """Read all benchmarks below a folder.

    Args:
        folder: Its files in any arrangement; a folder for each benchmark keeps pictures of one name apart.
        images: Further folders of pictures.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder that holds the files of the benchmarks")
    pictures = Pictures([folder, *images])
    of_layout: dict[str, list[Document]] = defaultdict(list)
    unread: dict[str, str] = {}
    strangers: dict[str, list[str]] = defaultdict(list)  # files of a folder and an ending
    for paths in documents_in(folder):
        one = Path(writable(paths[0].relative_to(folder)))
        shown = str(one.with_name("*.txt") if len(paths) > 1 and one.suffix.lower() == ".txt" else one)
        alike = str(Path(shown).with_name("*" + paths[0].suffix))
        if len(strangers[alike]) >= _LOOKED_AT and not _speaks(paths[0]):
            strangers[alike].append(shown)
            continue
        try:
            document = open_document(paths, shown)
            layout = next((layout for layout in LAYOUTS if layout.recognises(document)), None)
        except _UNREADABLE as error:
            unread[shown] = _why(error).removeprefix(f"{shown} ")
        else:
            if layout is not None:
                of_layout[layout.name].append(document)
                continue
            unread[shown] = _unknown(document)
        strangers[alike].append(shown)
    for alike, files in strangers.items():
        if len(files) > _LOOKED_AT:
            left = sum(file not in unread for file in files)
            first = {unread[file]: None for file in files[:_LOOKED_AT]}
            reasons = [unread.pop(file) for file in files if unread.get(file) in first]
            unread[alike] = (
                f"{len(reasons)} files make no benchmark, and {left} more were not opened, as their beginnings name no question, "
                f"caption or picture: {reasons[0]}"
            )
    benchmarks: dict[str, Benchmark] = {}
    for layout in LAYOUTS:
        documents = of_layout[layout.name]
        for found in _read(layout, documents, pictures):
            if isinstance(found, Unread):
                unread[found.document.shown] = f"{layout.title}: {found.why}"
            else:
                name = _free(found.name, benchmarks)
                gone = [each.missing for each in documents if each.missing and each.shown in found.files]
                benchmarks[name] = replace(found, name=name, notes=[*found.notes, *gone])
    return Found(benchmarks=benchmarks, unread=unread)


def _speaks(path: Path) -> bool:
    """Whether a file's beginning has a key, or its first line a column, that is called like what benchmarks hold."""
    try:
        with path.open("rb") as file:
            head = file.read(_BEGINNING)
    except OSError:
        return False
    if path.suffix.lower() in (".csv", ".tsv"):
        return bool(_WORDS.search(head.partition(b"\n")[0]))
    return path.suffix.lower() not in (".json", ".jsonl", ".ndjson") or any(map(_WORDS.search, _KEYS.findall(head)))


def _read(layout: Layout, documents: Sequence[Document], pictures: Pictures) -> Sequence[Benchmark | Unread]:
    """What a layout makes of its documents; those that stop it are left out, and all others read."""
    if not documents:
        return []
    try:
        return layout.read(documents, pictures)
    except _UNREADABLE as error:
        why = _why(error)
    for left in documents if len(documents) > 1 else ():
        with suppress(*_UNREADABLE):
            return [*layout.read([each for each in documents if each is not left], pictures), Unread(left, why)]
    kept: list[Document] = []
    read: Sequence[Benchmark | Unread] = []
    unread = []
    for document in documents:
        try:
            read = layout.read([*kept, document], pictures)
            kept.append(document)
        except _UNREADABLE as error:
            unread.append(Unread(document, _why(error)))
    return [*read, *unread]


def _why(error: Exception) -> str:
    if isinstance(error, DistillError):
        return str(error)
    return f"its entries hold other things than this layout has there ({type(error).__name__}: {one_line(str(error))})"


def _unknown(document: Document) -> str:
    top = document.top.keys() if isinstance(document.top, dict) and not document.rows else ()
    keys = ", ".join([one_line(str(key), limit=40) for key in sorted(document.columns or top, key=str)][:12])
    return f"no known layout; it has {keys or 'no rows of named values'}; layouts and what each is told by: docs/benchmarks.md"


def _free(name: str, taken: dict[str, Benchmark]) -> str:
    """A name that no other benchmark has, and that a folder may have: it may come from a file."""
    name = _NO_NAME.sub("-", name).strip("-.") or "benchmark"
    free, number = name, 2
    while free in taken:
        free, number = f"{name}.{number}", number + 1
    return free
