"""A folder of benchmarks asked of one model: block by block, so that a kill at any time costs a block.

``OUTPUT/distill-suite.json`` says whose results the folder holds. A block of items is asked in one go and then published
whole, so that several processes share a benchmark without talking to each other, and what is asked anew after a kill gives
the same numbers. Once all blocks of a benchmark are there they become ``OUTPUT/NAME/results.jsonl``. Scores are counted from
what was answered each time, without the model.
"""

import json
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, DataError, ModelError, SampleError
from vlm_distill_cache.common.files.atomic import (
    clean_stale,
    hold_folder,
    new_directory,
    read_json,
    remove,
    write_bytes_atomic,
    write_json_atomic,
)
from vlm_distill_cache.common.files.disk import nearest_there
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.processes import run_processes
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.data.benchmarks.documents import writable
from vlm_distill_cache.data.benchmarks.drawn import write_drawn
from vlm_distill_cache.data.benchmarks.items import Benchmark, Item, item_digest
from vlm_distill_cache.data.benchmarks.layouts import Found
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.stage2_student.suite.answer_file import answer_lines, submissions
from vlm_distill_cache.stage2_student.suite.entries import (
    SHOWN_REASONS,
    counted,
    reasons_of,
    refuse_repeats,
    unit_by_unit,
    unparsed_note,
)
from vlm_distill_cache.stage2_student.suite.limits import take
from vlm_distill_cache.stage2_student.suite.metrics.table import METRICS
from vlm_distill_cache.stage2_student.suite.opened import Model, load_model
from vlm_distill_cache.stage2_student.suite.owner import FORMAT, STAMP, check_stamp
from vlm_distill_cache.stage2_student.suite.requests import Generate, Request, Result, Weigh, is_result
from vlm_distill_cache.stage2_student.suite.seen import seen, seen_again, watched

SUMMARY, RESULTS, MEASURES = "summary.json", "results.jsonl", "measures.json"
ANSWERS, SUBMISSION = "answers.jsonl", "submission"  # for outside scorers
BLOCKS = "blocks"
DRAWN = "drawn"  # benchmarks of drawn scenes, written where they are asked for
BLOCK = 64  # items
_ASKED = re.compile(r"^sample '(?:request|prompt)': ")  # how an error calls what is asked; the item's id says more
# What to do about a text that is too long: settings of a training, which are not asked for here.
_LONGER = re.compile(r"; (?:raise max_length|shorten the conversation).*", re.DOTALL)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is asked of which model.

    Attributes:
        benchmarks: Folder of their files.
        images: Further folders of pictures.
        only: Names or titles of benchmarks, or names of layouts, in any case; empty: all.
        limit: Most items of each benchmark, taken from all of its kinds; None: all.
        prompts: ``published``: with the instructions of published evaluations; ``plain``: without.
    """

    model: Model
    benchmarks: Path
    output: Path
    images: tuple[Path, ...] = ()
    only: tuple[str, ...] = ()
    limit: int | None = None
    prompts: str = "published"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark as it is asked.

    Attributes:
        items: Those that are asked, in their order.
        identity: Hash of the model and of all that is asked of it; no results of another one are taken.
        folder: For its results.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    instruction: str
    identity: str
    folder: Path

    @property
    def blocks(self) -> int:
        """How many blocks the items make."""
        return -(-len(self.items) // BLOCK)

    def block(self, number: int) -> Path:
        """Where the results of a block are published."""
        return self.folder / BLOCKS / f"{self.identity[:16]}-{number:06d}.json"

    def items_of(self, number: int) -> Sequence[Item]:
        """The items of a block."""
        return self.items[number * BLOCK : (number + 1) * BLOCK]

    def requests(self, item: Item) -> tuple[Request, ...]:
        """What is asked about one item."""
        return METRICS[self.benchmark.metric].requests(item, self.instruction)

    def asked_of(self, item: Item) -> str:
        """Hash of an item and of all that is asked about it, pictures apart; the folder is one model's."""
        return fingerprint([item_digest(item), [_described(request) for request in self.requests(item)]])[:16]

    def missing(self) -> list[int]:
        """The blocks that are still to be asked; none once their results are joined."""
        if self.is_asked():
            return []
        return [number for number in range(self.blocks) if not self.block(number).exists()]

    def is_there(self) -> bool:
        """Whether all results are joined, and are these."""
        with suppress(ConfigError):
            return self.is_asked() and len(self.kept()[0]) == self.blocks
        return False

    def kept(self) -> tuple[dict[int, dict[str, Any]], bool]:
        """The blocks that were answered about the pictures as they are now, and whether that is all and as it is stored.

        Raises:
            ConfigError: Results are damaged, or of something else.
        """
        others = self._of_other_items()
        if others is None and self.is_asked():
            head, lines = _read(self)
            share = head["seconds"] / max(len(lines), 1)
            parts = {number: lines[number * BLOCK : (number + 1) * BLOCK] for number in range(self.blocks)}
            stored = {number: {"seconds": share * len(part), "items": part} for number, part in parts.items()}
        else:
            share, known = others or (0.0, {})
            by_block = {n: [known.get(item.item_id) for item in self.items_of(n)] for n in range(self.blocks)}
            stored = {
                n: {"seconds": share * len(part), "items": part} for n, part in by_block.items() if None not in part
            }
            if not (self.folder / RESULTS).exists():
                stored |= {
                    number: read_json(path) for number in range(self.blocks) if (path := self.block(number)).exists()
                }
        found = {}
        for number, block in stored.items():
            if not isinstance(block, dict) or len(block.get("items", ())) != len(self.items_of(number)):
                continue
            pairs = zip(block["items"], self.items_of(number), strict=True)
            lines = [{**line, "pictures": seen_again(line.get("pictures"), item)} for line, item in pairs]
            if all(line["pictures"] is not None for line in lines):
                found[number] = {**block, "items": lines}
        return found, others is None and found == stored

    def _of_other_items(self) -> tuple[float, dict[str, dict[str, Any]]] | None:
        """Results by item, with the seconds of each, of a time when other items could be asked and all else was the same.

        Of joined results all must be answers to what is asked now; of blocks those that are count.
        """
        try:
            if (self.folder / RESULTS).exists():
                with (self.folder / RESULTS).open(encoding="utf-8") as file:
                    head = json.loads(file.readline())
                    if head["of"] == self.identity:
                        return None
                    known, seconds = {line["item"]: line for line in map(json.loads, file)}, float(head["seconds"])
            else:
                blocks = [read_json(path) for path in self._other_blocks()]
                known = {line["item"]: line for block in blocks for line in block["items"]}
                seconds = sum(float(block["seconds"]) for block in blocks)
            there = [item for item in self.items if item.item_id in known]
            same = {item.item_id for item in there if known[item.item_id].get("asked") == self.asked_of(item)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CacheFormatError):
            return None  # `is_asked` says what is wrong
        if not same or ((self.folder / RESULTS).exists() and len(same) < len(there)):
            return None
        return seconds / len(known), {name: known[name] for name in same}

    def _other_blocks(self) -> list[Path]:
        blocks = sorted((self.folder / BLOCKS).glob("*.json"))
        return [path for path in blocks if not path.name.startswith(self.identity[:16])]

    def put_aside(self) -> int:
        """Take back what was answered about other pictures or items, so that it is asked again; how many items these are."""
        kept, as_stored = self.kept()
        if as_stored:
            return 0
        joined = (self.folder / RESULTS).exists()
        stale = {number for number in range(self.blocks) if joined or self.block(number).exists()} - kept.keys()
        for number, block in kept.items():
            self.block(number).parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.block(number), block)
        for number in stale:
            self.block(number).unlink(missing_ok=True)
        for path in self._other_blocks():
            path.unlink()
        (self.folder / RESULTS).unlink(missing_ok=True)
        return sum(len(self.items_of(number)) for number in stale)

    def is_asked(self) -> bool:
        """Whether all results are joined.

        Raises:
            ConfigError: Those that are there are of something else.
        """
        path = self.folder / RESULTS
        try:
            with path.open(encoding="utf-8") as file:
                stored = json.loads(file.readline())["of"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it: its items are then asked again") from error
        if stored != self.identity:
            raise ConfigError(
                f"{path}: these are answers to other questions (the benchmark's files, or what is asked about them, have changed "
                f"since); give another --output, or delete {self.folder}"
            )
        return True


def find_tasks(suite: Suite) -> tuple[Found, list[Task]]:
    """Read the benchmarks, and say how each is asked: those of ``only``, and others whose results are there.

    Raises:
        DataError: There is no benchmark.
        ConfigError: One of ``only`` is not among them.
    """
    found = find_benchmarks(suite.benchmarks, images=suite.images)
    if not found.benchmarks:
        looked = "".join(f"\n  {file}: {why}" for file, why in islice(found.unread.items(), 20))
        more = f"\n  and {len(found.unread) - 20} more files" if len(found.unread) > 20 else ""
        raise DataError(
            f"{suite.benchmarks}: no benchmark of a known layout; layouts and what each is told by: docs/benchmarks.md. "
            + (
                f"Files that were looked at:{looked}{more}"
                if found.unread
                else "No JSON, CSV, TSV or parquet file is there"
            )
        )
    names = {
        name: {word.casefold() for word in (name, each.layout, each.title)} for name, each in found.benchmarks.items()
    }
    only = {name.casefold() for name in suite.only}
    if unknown := [name for name in suite.only if not any(name.casefold() in words for words in names.values())]:
        raise ConfigError(
            f"--only: no benchmark {unknown[0]!r} in {suite.benchmarks}; there are {', '.join(found.benchmarks)}"
        )
    tasks = []
    for name, benchmark in found.benchmarks.items():
        wanted = not only or bool(names[name] & only)
        if not wanted and not (suite.output / name / RESULTS).exists():
            continue
        refuse_repeats(benchmark)
        instruction = benchmark.instruction if suite.prompts == "published" else ""
        task = Task(
            benchmark=benchmark,
            items=take(benchmark.items, suite.limit),
            instruction=instruction,
            identity="",
            folder=suite.output / name,
        )
        asked = [[item.item_id, [_described(request) for request in task.requests(item)]] for item in task.items]
        identity = fingerprint({"model": suite.model.fingerprint, "benchmark": benchmark.fingerprint, "asked": asked})
        task = replace(task, identity=identity)
        if wanted or task.is_there():
            tasks.append(task)
    return found, tasks


def _described(request: Request) -> list[Any]:
    if isinstance(request, Generate):
        return ["generate", request.image is not None, request.question, request.max_tokens]
    return ["weigh", request.image is not None, request.question, list(request.answers)]


def run_suite(suite: Suite, *, processes: int = 1, say: Callable[[str], None] = _log.info) -> dict[str, Any]:
    """Ask what is not asked yet, count all, and write what `summary.json` holds.

    Returns:
        The summary.

    Raises:
        ConfigError: The folder holds results of another model, or of other questions; or another process works there.
        DataError: There is no benchmark, or none of which an item could be asked; or two items have one id.
        ModelError: The model cannot be opened, or gives no numbers.
    """
    suite.output.mkdir(parents=True, exist_ok=True)
    with hold_folder(suite.output, busy="another process works there; wait for it, or give another --output"):
        clean_stale(suite.output)
        if (stamp := check_stamp(suite.output, suite.model, prompts=suite.prompts, limit=suite.limit)) is not None:
            write_json_atomic(suite.output / STAMP, stamp)
        if suite.benchmarks == suite.output / DRAWN and not suite.benchmarks.is_dir():
            with new_directory(suite.benchmarks) as folder:
                write_drawn(folder)
        found, tasks = find_tasks(suite)
        _move(_homes(suite, tasks))
        for task in tasks:
            if again := task.put_aside():
                say(
                    f"{task.benchmark.name}: pictures or items have changed since they were asked about; {again:,} "
                    "items are asked now"
                )
        missing = sum(len(task.missing()) for task in tasks)
        if missing:
            asked = sum(len(task.items_of(number)) for task in tasks for number in task.missing())
            say(f"asking {suite.model.name}; items to ask: {asked:,}; benchmarks: {len(tasks)}")
            _ask_all(suite, tasks, processes=min(processes, missing))
        summary = _summarise(suite, found, tasks)
        write_json_atomic(suite.output / SUMMARY, summary)
    if not any(entry["items"] for entry in summary["benchmarks"].values()):
        reasons = [why for entry in summary["benchmarks"].values() for why in entry["left_out"]["reasons"]]
        shown = "; ".join(reasons[:SHOWN_REASONS]) or "the files hold no items"
        raise DataError(f"{suite.benchmarks}: no item of {len(tasks)} benchmarks could be asked: {shown}")
    return summary


def outlook(suite: Suite) -> dict[str, Any]:
    """What would be asked, without asking it or writing anything; raises what `run_suite` would before it asks."""
    check_stamp(suite.output, suite.model, prompts=suite.prompts, limit=suite.limit)
    place = nearest_there(suite.output)
    try:
        with tempfile.TemporaryFile(dir=place):  # has no name on Linux; rights say nothing to root, nor of /proc
            pass
    except OSError as error:
        raise ConfigError(
            f"{place} cannot be written ({error.strerror}); give another --output, or make it writable"
        ) from error
    found, tasks = find_tasks(suite)
    homes = _homes(suite, tasks)
    said = {}
    for task in tasks:
        benchmark = task.benchmark
        kept, _ = replace(task, folder=homes.get(task.folder, task.folder)).kept()
        requests = [request for item in task.items for request in task.requests(item)]
        said[benchmark.name] = {
            "layout": benchmark.layout,
            "title": benchmark.title,
            "metric": benchmark.metric,
            "files": list(benchmark.files),
            "items": len(task.items),
            "of": len(benchmark.items) + len(benchmark.left_out),
            "left_out": {"items": len(benchmark.left_out), "reasons": reasons_of(benchmark.left_out)},
            "notes": _notes(task, task.items),
            "to_ask": sum(len(task.items_of(number)) for number in range(task.blocks) if number not in kept),
            "generated": sum(isinstance(request, Generate) for request in requests),
            "weighed": sum(len(request.answers) for request in requests if isinstance(request, Weigh)),
        }
    return {"student": suite.model.name, "limit": suite.limit, "benchmarks": said, "unread": _unread(found)}


def _homes(suite: Suite, tasks: Sequence[Task]) -> dict[Path, Path]:
    """Where results are of benchmarks that were called otherwise, with others beside them: by the folder that they belong in."""
    folders = sorted(path for path in suite.output.iterdir() if path.is_dir()) if suite.output.is_dir() else []
    free = [path for path in folders if not any(path == task.folder and _is_of(task, path) for task in tasks)]
    homes: dict[Path, Path] = {}
    for task in tasks:
        if not _is_of(task, task.folder) and (home := next((path for path in free if _is_of(task, path)), None)):
            homes[task.folder] = home
            free.remove(home)
    return homes


def _is_of(task: Task, folder: Path) -> bool:
    """Whether a folder holds a benchmark's results, or some of its blocks."""
    there = replace(task, folder=folder)
    return any(there.block(number).exists() for number in range(task.blocks)) or there.is_there()


def _move(homes: Mapping[Path, Path]) -> None:
    """Bring results home. They may have to change places; whatever is in the way and nobody's now stays under another name."""
    moving = {target: home.rename(_unused(target, "moving")) for target, home in homes.items()}
    for target, there in moving.items():
        if target.exists():
            target.rename(_unused(target, "before"))
        there.rename(target)


def _unused(folder: Path, word: str) -> Path:
    names = (folder.with_name(f"{folder.name}.{word}{number or ''}") for number in count())
    return next(name for name in names if not name.exists())


def _elsewhere(suite: Suite, told: Collection[str]) -> list[str]:
    """Notes about folders with results that are not told."""
    others = sorted(path.parent.name for path in suite.output.glob(f"*/{RESULTS}") if path.parent.name not in told)
    return [
        f"{writable(suite.output / name)} holds results of a benchmark that is not there now, or has changed; they are not told"
        for name in others
    ]


def _notes(task: Task, items: Sequence[Item]) -> list[str]:
    """What a reader of the scores must know: of the benchmark, and of the items that are asked."""
    notes = list(task.benchmark.notes)
    known = sum(item.has_answer for item in items)
    if 0 < known < len(items):
        have = "has" if len(items) - known == 1 else "have"
        notes.append(f"{len(items) - known:,} of {len(items):,} items {have} no right answer in the files: not scored")
    if len(task.items) < len(task.benchmark.items):
        asked = Counter(item.group for item in task.items)
        whole = Counter(item.group for item in task.benchmark.items)
        if any(group and count < whole[group] for group, count in asked.items()):
            notes.append("the limit is less than a group of items that are counted together, and one was cut")
    return notes


def _unread(found: Found) -> dict[str, str]:
    return {file: one_line(why) for file, why in found.unread.items()}


def _ask_all(suite: Suite, tasks: Sequence[Task], *, processes: int) -> None:
    if processes == 1:
        _ask_blocks(suite.model, tasks, 0, 1)
        return
    total, done = sum(len(task.missing()) for task in tasks), 0
    with progress("suite", total=total, unit="block") as bar:

        def look() -> None:
            nonlocal done
            now = total - sum(len(task.missing()) for task in tasks)
            bar.update(now - done)
            done = now

        jobs = [(f"part {rank}/{processes}", (suite, rank, processes)) for rank in range(processes)]
        run_processes(ask_part, jobs, on_wait=look, kept="finished blocks of items are kept")
        look()


def ask_part(suite: Suite, rank: int, processes: int) -> None:
    """Ask the blocks of one of several processes."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    _ask_blocks(suite.model, find_tasks(suite)[1], rank, processes, device=device)


def _ask_blocks(model: Model, tasks: Sequence[Task], rank: int, processes: int, *, device: str | None = None) -> None:
    import torch

    from vlm_distill_cache.stage2_student.suite.ask import MOST_TOKENS, ask

    blocks = [(task, number) for task in tasks for number in range(task.blocks)]
    missing = {task.identity: set(task.missing()) for task in tasks}
    own = blocks[rank::processes]
    jobs = [(task, number) for task, number in own if number in missing[task.identity]]
    loaded, encoder = load_model(model, device=device)
    total = sum(len(task.items_of(number)) for task, number in jobs)
    with progress("suite", total=total, unit="item", keep=False) as bar:
        for task, number in jobs:
            began = time.monotonic()
            items = watched(task.items_of(number))
            requests = [task.requests(item) for item in items]
            try:
                results = iter(ask(loaded, encoder, [request for of_item in requests for request in of_item]))
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{model.name}: the accelerator has no memory left for a batch of {MOST_TOKENS:,} tokens; end what else runs "
                    "there, take fewer processes (--nproc), or run it on the CPU (CUDA_VISIBLE_DEVICES= in front of the command)"
                ) from error
            lines = [
                {**_line(item, list(islice(results, len(of)))), "asked": task.asked_of(item), "pictures": seen(item)}
                for item, of in zip(items, requests, strict=True)
            ]
            path = task.block(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, {"seconds": time.monotonic() - began, "items": lines})
            bar.update(len(items))


def _line(item: Item, results: Sequence[Result | SampleError]) -> dict[str, Any]:
    """What is kept of an item: its results, or why there are none."""
    error = next((result for result in results if isinstance(result, SampleError)), None)
    if error is not None:
        why = _LONGER.sub("; this model takes no longer ones", _ASKED.sub("", str(error)))
        return {"item": item.item_id, "left_out": writable(why)}
    return {"item": item.item_id, "results": list(results)}


def _join(task: Task) -> None:
    """Make one file of a benchmark's blocks."""
    blocks = [read_json(task.block(number)) for number in range(task.blocks)]
    head = {"of": task.identity, "items": len(task.items), "seconds": sum(block["seconds"] for block in blocks)}
    lines = [head, *(line for block in blocks for line in block["items"])]
    task.folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes_atomic(task.folder / RESULTS, text.encode())
    remove(task.folder / BLOCKS)


def _count(suite: Suite, task: Task) -> dict[str, Any]:
    """Count one benchmark's results, write its files, and say what the summary holds of it."""
    benchmark, head, lines = task.benchmark, *_read(task)
    results = {line["item"]: line["results"] for line in lines if "results" in line}
    left_out = {**benchmark.left_out, **{line["item"]: line["left_out"] for line in lines if "left_out" in line}}
    answered = [item for item in task.items if item.item_id in results]
    given = [results[item.item_id] for item in answered]
    measures = METRICS[benchmark.metric].measures(answered, given) if answered else []
    by_name = {measure.name: measure for measure in measures}
    assert len(by_name) == len(measures), f"{benchmark.metric}: two measures of one name"
    told = [counted(measure, by_name) for measure in measures]
    entry = {
        "layout": benchmark.layout,
        "title": benchmark.title,
        "metric": benchmark.metric,
        "items": len(answered),
        "scored": sum(item.has_answer for item in answered),
        "of": len(benchmark.items) + len(benchmark.left_out),
        "left_out": {"items": len(left_out), "reasons": reasons_of(left_out)},
        "notes": [*_notes(task, answered), *unparsed_note(told, task.instruction)],
        "instruction": task.instruction,
        "fingerprint": benchmark.fingerprint,
        "seconds": head["seconds"],
        "measures": told,
    }
    asked = {item.item_id: item_digest(item) for item in answered}
    stored = [unit_by_unit(measure) for measure in measures]
    groups = {item.item_id: item.group for item in answered if item.group}
    write_json_atomic(task.folder / MEASURES, {**entry, "asked": asked, "groups": groups, "measures": stored})
    requests = [task.requests(item) for item in answered]
    whole = replace(benchmark, items=answered)
    lines_out = answer_lines(whole, requests, given, suite.model.name)
    write_bytes_atomic(task.folder / ANSWERS, "".join(f"{line}\n" for line in lines_out).encode())
    remove(task.folder / SUBMISSION)
    # Of a part a server counts the rest as wrong, and scorers that go by the line take every later answer for another one's.
    if not left_out and len(answered) == len(benchmark.items):
        for name, text in submissions(whole, requests, given).items():
            path = task.folder / SUBMISSION / Path(name).name
            path.parent.mkdir(exist_ok=True)
            write_bytes_atomic(path, text.encode())
    return entry


def _read(task: Task) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    path = task.folder / RESULTS
    try:
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        names = [line["item"] for line in lines]
        head["seconds"] = float(head["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it: its items are then asked again") from error
    if names != [item.item_id for item in task.items]:
        raise ConfigError(f"{path} is damaged: it lacks items; delete it: its items are then asked again")
    for item, line in zip(task.items, lines, strict=True):
        given, requests = line.get("results"), task.requests(item)
        fits = isinstance(given, list) and len(given) == len(requests) and all(map(is_result, given, requests))
        if not (fits or ("results" not in line and isinstance(line.get("left_out"), str))):
            shown = one_line(item.item_id, limit=60)
            raise ConfigError(
                f"{path} is damaged: item {shown} has no result for each of {len(requests)} requests; delete it: its items are "
                "then asked again"
            )
    return head, lines


def _summarise(suite: Suite, found: Found, tasks: Sequence[Task]) -> dict[str, Any]:
    """Count every benchmark and write its files."""
    entries = {}
    for task in tasks:
        clean_stale(task.folder)
        if not task.is_asked():
            _join(task)
        entries[task.benchmark.name] = _count(suite, task)
    model = suite.model
    return {
        "format": FORMAT,
        "student": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "place": writable(model.folder),
            **model.said,
        },
        "prompts": suite.prompts,
        "limit": suite.limit,
        "files": {
            "benchmarks": "shapes" if suite.benchmarks == suite.output / DRAWN else writable(suite.benchmarks),
            "images": [writable(folder) for folder in suite.images],
            "only": list(entries) if suite.only else [],
        },
        "benchmarks": entries,
        "notes": _elsewhere(suite, entries),
        "unread": _unread(found),
    }
