"""A folder of benchmarks asked of one model: block by block, so that a kill at any time costs a block.

``OUTPUT/suite.json`` says whose results the folder holds. A block of items is asked in one go and then published whole, so
that several processes share a benchmark without talking to each other, and what is asked anew after a kill gives the same
numbers. Once all blocks of a benchmark are there they become ``OUTPUT/NAME/results.jsonl``. Scores are counted from what
was answered each time, without the model.
"""

import json
import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
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
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.processes import run_processes
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.data.benchmarks.documents import OWN_STAMP
from vlm_distill_cache.data.benchmarks.drawn import write_drawn
from vlm_distill_cache.data.benchmarks.items import Benchmark, Item, item_digest
from vlm_distill_cache.data.benchmarks.layouts import Found
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.stage2_student.suite.answer_file import answer_lines, submissions
from vlm_distill_cache.stage2_student.suite.measures import Measure, score
from vlm_distill_cache.stage2_student.suite.metrics.table import METRICS
from vlm_distill_cache.stage2_student.suite.opened import Model, load_model
from vlm_distill_cache.stage2_student.suite.requests import Generate, Request, Result, Weigh

STAMP, SUMMARY, RESULTS, MEASURES = OWN_STAMP, "summary.json", "results.jsonl", "measures.json"
ANSWERS, SUBMISSION = "answers.jsonl", "submission"  # for outside scorers
BLOCKS = "blocks"
DRAWN = "drawn"  # benchmarks of drawn scenes, written where they are asked for
BLOCK = 64  # items
FORMAT = 1
SHOWN_REASONS = 5
_NAMES = re.compile(r"""'[^']*'|"[^"]*"|\S*[\d/\\.]\S*""")  # what differs between two items of one fault
_ASKED = re.compile(r"^sample '(?:request|prompt)': ")  # how an error calls what is asked; the item's id says more
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is asked of which model.

    Attributes:
        benchmarks: Folder of their files.
        images: Further folders of pictures.
        only: Names of benchmarks or of layouts; empty: all.
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

    def missing(self) -> list[int]:
        """The blocks that are still to be asked; none once their results are joined."""
        if self.is_asked():
            return []
        return [number for number in range(self.blocks) if not self.block(number).exists()]

    def is_there(self) -> bool:
        """Whether all results are joined, and are these."""
        with suppress(ConfigError):
            return self.is_asked()
        return False

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
    known = {*found.benchmarks, *(benchmark.layout for benchmark in found.benchmarks.values())}
    if unknown := [name for name in suite.only if name not in known]:
        raise ConfigError(
            f"--only: no benchmark {unknown[0]!r} in {suite.benchmarks}; there are {', '.join(found.benchmarks)}"
        )
    tasks = []
    for name, benchmark in found.benchmarks.items():
        wanted = not suite.only or bool({name, benchmark.layout} & {*suite.only})
        if not wanted and not (suite.output / name / RESULTS).exists():
            continue
        _refuse_repeats(benchmark)
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


def _refuse_repeats(benchmark: Benchmark) -> None:
    """Results are kept by item, so that two of one name would count as one."""
    repeated = [name for name, count in Counter(item.item_id for item in benchmark.items).items() if count > 1]
    if repeated:
        shown = ", ".join(one_line(name, limit=60) for name in repeated[:3])
        raise DataError(
            f"{', '.join(benchmark.files)}: {len(repeated)} items of {benchmark.name} have an id that another one has, too "
            f"({shown}); are two copies of a file below the folder? Take one away"
        )


def take(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first items of each kind in turn, whole groups, until there are ``limit``; in the order of the benchmark.

    The last group may be cut nowhere: it is left out where it does not fit, unless it is the first.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    kinds: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for place, item in enumerate(items):
        kinds[item.kind].setdefault(f"g{item.group}" if item.group else f"i{item.item_id}", []).append(place)
    queues = [iter(groups.values()) for groups in kinds.values()]
    taken: list[int] = []
    while queues:
        for queue in list(queues):
            group = next(queue, None)
            if group is None:
                queues.remove(queue)
            elif not taken or len(taken) + len(group) <= limit:
                taken += group
            elif len(group) == 1:
                return [items[place] for place in sorted(taken)]
    return [items[place] for place in sorted(taken)]


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
        _stamp(suite)
        if suite.benchmarks == suite.output / DRAWN and not suite.benchmarks.is_dir():
            with new_directory(suite.benchmarks) as folder:
                write_drawn(folder)
        found, tasks = find_tasks(suite)
        missing = sum(len(task.missing()) for task in tasks)
        if missing:
            asked = sum(len(task.items_of(number)) for task in tasks for number in task.missing())
            say(f"asking {suite.model.name} about {asked:,} items of {len(tasks)} benchmarks")
            _ask_all(suite, tasks, processes=min(processes, missing))
        summary = _summarise(suite, found, tasks)
        write_json_atomic(suite.output / SUMMARY, summary)
    if not any(entry["items"] for entry in summary["benchmarks"].values()):
        reasons = [why for entry in summary["benchmarks"].values() for why in entry["left_out"]["reasons"]]
        shown = "; ".join(reasons[:SHOWN_REASONS]) or "the files hold no items"
        raise DataError(f"{suite.benchmarks}: no item of {len(tasks)} benchmarks could be asked: {shown}")
    return summary


def outlook(suite: Suite) -> dict[str, Any]:
    """What would be asked, without asking it or writing anything."""
    found, tasks = find_tasks(suite)
    said = {}
    for task in tasks:
        benchmark = task.benchmark
        requests = [request for item in task.items for request in task.requests(item)]
        said[benchmark.name] = {
            "layout": benchmark.layout,
            "title": benchmark.title,
            "metric": benchmark.metric,
            "files": list(benchmark.files),
            "items": len(task.items),
            "of": len(benchmark.items) + len(benchmark.left_out),
            "left_out": {"items": len(benchmark.left_out), "reasons": _reasons(benchmark.left_out)},
            "notes": list(benchmark.notes),
            "to_ask": sum(len(task.items_of(number)) for number in task.missing()),
            "generated": sum(isinstance(request, Generate) for request in requests),
            "weighed": sum(len(request.answers) for request in requests if isinstance(request, Weigh)),
        }
    return {"student": suite.model.name, "limit": suite.limit, "benchmarks": said, "unread": _unread(found)}


def _unread(found: Found) -> dict[str, str]:
    return {file: one_line(why) for file, why in found.unread.items()}


def _stamp(suite: Suite) -> None:
    """Claim the folder for one model and one way of asking."""
    stamp = {
        "format": FORMAT,
        "student": suite.model.fingerprint,
        "prompts": suite.prompts,
        "limit": suite.limit,
    }
    path = suite.output / STAMP
    try:
        stored = read_json(path)
    except FileNotFoundError:
        if foreign := sorted(entry.name for entry in suite.output.iterdir() if entry.name != STAMP):
            raise ConfigError(
                f"{suite.output} holds other things ({foreign[0]}), and no {STAMP}; give a new folder, or that of a suite"
            ) from None
        write_json_atomic(path, stamp)
        return
    except CacheFormatError as error:
        raise ConfigError(f"{error}; give another --output, or delete {suite.output}") from error
    stored = stored if isinstance(stored, dict) else {}
    if differs := [name for name, value in stamp.items() if stored.get(name) != value]:
        shown = "; ".join(f"{name}: {stored.get(name)} there, {stamp[name]} now" for name in differs)
        raise ConfigError(f"{suite.output} holds results of something else ({shown}); give another --output")


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
            items = task.items_of(number)
            requests = [task.requests(item) for item in items]
            try:
                results = iter(ask(loaded, encoder, [request for of_item in requests for request in of_item]))
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{model.name}: the accelerator has no memory left for a batch of {MOST_TOKENS:,} tokens; end what else runs "
                    "there, take fewer processes (--nproc), or run it on the CPU (CUDA_VISIBLE_DEVICES= in front of the command)"
                ) from error
            lines = [_line(item, list(islice(results, len(of)))) for item, of in zip(items, requests, strict=True)]
            path = task.block(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, {"seconds": time.monotonic() - began, "items": lines})
            bar.update(len(items))


def _line(item: Item, results: Sequence[Result | SampleError]) -> dict[str, Any]:
    """What is kept of an item: its results, or why there are none."""
    error = next((result for result in results if isinstance(result, SampleError)), None)
    if error is not None:
        return {"item": item.item_id, "left_out": _ASKED.sub("", str(error))}
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
    entry = {
        "layout": benchmark.layout,
        "title": benchmark.title,
        "metric": benchmark.metric,
        "items": len(answered),
        "of": len(benchmark.items) + len(benchmark.left_out),
        "left_out": {"items": len(left_out), "reasons": _reasons(left_out)},
        "notes": list(benchmark.notes),
        "instruction": task.instruction,
        "fingerprint": benchmark.fingerprint,
        "seconds": head["seconds"],
        "measures": [_counted(measure, by_name) for measure in measures],
    }
    asked = {item.item_id: item_digest(item) for item in answered}
    stored = [_unit_by_unit(measure) for measure in measures]
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


def _counted(measure: Measure, others: Mapping[str, Measure]) -> dict[str, Any]:
    found = score(measure, others)
    return {
        "name": measure.name,
        "heading": measure.heading or measure.name,
        "factor": measure.factor,
        "gains": measure.gains,
        "mean_of": 0 if measure.summed else len(measure.parts),
        "value": None if found is None else found.value,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "units": len(measure.units) if found is None else found.items,
    }


def _unit_by_unit(measure: Measure) -> dict[str, Any]:
    """All of a measure, so that two models can be compared in pairs."""
    stored = {name: getattr(measure, name) for name in ("name", "heading", "factor", "gains", "summed")}
    counts = {"hits": [float(value) for value in measure.hits], "of": [float(value) for value in measure.of]}
    return {**stored, "units": list(measure.units), **counts, "parts": list(measure.parts)}


def _reasons(left_out: Mapping[str, str]) -> list[str]:
    """Of each kind of reason the first, with its item and how many more there are; kinds differ in more than names."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, why in left_out.items():
        kinds[_NAMES.sub("", why)].append(name)
    shown = []
    for first, *more in sorted(kinds.values(), key=len, reverse=True)[:SHOWN_REASONS]:
        alike = f" (and {len(more):,} more alike)" if more else ""
        shown.append(f"{one_line(first, limit=60)}: {one_line(left_out[first])}{alike}")
    return shown


def _read(task: Task) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    path = task.folder / RESULTS
    try:
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        names = [line["item"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it: its items are then asked again") from error
    if names != [item.item_id for item in task.items]:
        raise ConfigError(f"{path} is damaged: it lacks items; delete it: its items are then asked again")
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
        "student": {"name": model.name, "fingerprint": model.fingerprint, "place": str(model.folder), **model.said},
        "prompts": suite.prompts,
        "limit": suite.limit,
        "files": {
            "benchmarks": "shapes" if suite.benchmarks == suite.output / DRAWN else str(suite.benchmarks),
            "images": [str(folder) for folder in suite.images],
            "only": list(entries) if suite.only else [],
        },
        "benchmarks": entries,
        "unread": _unread(found),
    }
