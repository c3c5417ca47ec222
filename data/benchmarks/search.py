"""From a folder to the benchmarks in it: every file is looked at, and what none of the layouts knows is said."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.benchmarks import captions, choices, short_answers, yes_no
from vlm_distill_cache.data.benchmarks.documents import Document, documents_in, open_document
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.data.benchmarks.layouts import Found, Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import Pictures

# The first that recognises a file reads it: the more keys a layout is told by, the earlier it stands.
LAYOUTS: tuple[Layout, ...] = (*captions.LAYOUTS, *yes_no.LAYOUTS, *choices.LAYOUTS, *short_answers.LAYOUTS)


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
    for paths in documents_in(folder):
        shown = str(paths[0].relative_to(folder))
        try:
            document = open_document(paths, shown)
            layout = next((layout for layout in LAYOUTS if layout.recognises(document)), None)
        except DataError as error:
            unread[shown] = str(error)
            continue
        if layout is None:
            unread[shown] = _unknown(document)
        else:
            of_layout[layout.name].append(document)
    benchmarks: dict[str, Benchmark] = {}
    for layout in LAYOUTS:
        try:
            for found in layout.read(of_layout[layout.name], pictures) if layout.name in of_layout else ():
                if isinstance(found, Unread):
                    unread[found.document.shown] = f"{layout.title}: {found.why}"
                else:
                    name = _free(found.name, benchmarks)
                    benchmarks[name] = replace(found, name=name)
        except DataError as error:
            unread |= {document.shown: f"{layout.title}: {error}" for document in of_layout[layout.name]}
    return Found(benchmarks=benchmarks, unread=unread)


def _unknown(document: Document) -> str:
    top = document.top.keys() if isinstance(document.top, dict) and not document.rows else ()
    keys = ", ".join([one_line(str(key), limit=40) for key in sorted(document.columns or top, key=str)][:12])
    return f"no known layout; it has {keys or 'no rows of named values'}; layouts and what each is told by: docs/benchmarks.md"


def _free(name: str, taken: dict[str, Benchmark]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name}.{number}", number + 1
    return free
