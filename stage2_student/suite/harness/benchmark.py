"""A benchmark of a folder as a task of lmms-eval: read, asked and counted by the code of `distill suite`.

A document is an item. The answers of a `Weigh` request are requests of their own, as lmms-eval wants them: what comes back
for one is its loss a token. Sums need the number of tokens, too, which our model tells and others do not: of theirs, only
the measures are told that no length can change.
"""

import ast
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task, TaskConfig
from loguru import logger

from vlm_distill_cache.common.errors import ConfigError, DataError, ModelError
from vlm_distill_cache.data.benchmarks.items import Benchmark, Item
from vlm_distill_cache.data.benchmarks.layouts import Found
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.stage2_student.suite.harness import NO_GREEDY, OPTIONAL
from vlm_distill_cache.stage2_student.suite.measures import Measure, score
from vlm_distill_cache.stage2_student.suite.metrics.table import METRICS
from vlm_distill_cache.stage2_student.suite.requests import Generate, Request, Result

FOLDER = "VLM_DISTILL_BENCHMARKS"  # environment: the folder of benchmarks
IMAGES = "VLM_DISTILL_IMAGES"  # environment: further folders of pictures, written as PATH is
SPLIT = "test"
_OPTIONS = frozenset({"task", "class", "metric", "benchmark", "folder", "images", "prompts"})
_TRIALS = 16  # of made-up lengths, each a power of 2 below
_MOST_DOUBLED = 11
_MOST_UNREAD = 5  # files that an error names


@dataclass(frozen=True)
class _Told:
    """What came back for one item.

    Attributes:
        item: Its place.
        results: Of each request; a weighed answer is ``[nats, tokens]``, or ``[nats a token, None]``.
    """

    item: int
    results: Sequence[Any]

    def __str__(self) -> str:  # in lmms-eval's log of samples, which has the results beside it
        return ""


class BenchmarkTask(Task):
    """The benchmark of a folder that a task's YAML names.

    Its keys: ``metric`` (which metric it is counted by), ``benchmark`` (its name, or a pattern), or both; ``folder`` and
    ``images`` in place of the environment's; and ``prompts: plain`` for questions without published instructions.
    """

    VERSION = 1

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the benchmark.

        Raises:
            ConfigError: The YAML has other keys, or no folder is named.
            DataError: The folder holds no such benchmark, or several; or what is right is kept secret.
        """
        self.task_name = str(config["task"])
        if unknown := sorted(config.keys() - _OPTIONS):
            raise ConfigError(
                f"task {self.task_name}: unknown {', '.join(unknown)}; known: {', '.join(sorted(_OPTIONS))}"
            )
        prompts = config.get("prompts", "published")
        if prompts not in ("published", "plain"):
            raise ConfigError(f"task {self.task_name}: prompts: {prompts!r}; it is published or plain")
        self.benchmark = _open(config)
        if prompts == "plain":
            self.benchmark = replace(self.benchmark, instruction="")
        self.items = self.benchmark.items
        self.metric = METRICS[self.benchmark.metric]
        self.asked = [self.metric.requests(item, self.benchmark.instruction) for item in self.items]
        self._kept: dict[tuple[int, ...], dict[str, Measure]] = {}
        self._said: set[str] = set()
        self._by_item: dict[int, list[Instance]] | None = None
        super().__init__()  # calls download
        # The fingerprint keeps lmms-eval's cache of responses from answering for other files.
        told = {NO_GREEDY: True, "benchmark": self.benchmark.name, "fingerprint": self.benchmark.fingerprint}
        self._config = TaskConfig(
            task=self.task_name,
            test_split=SPLIT,
            num_fewshot=0,
            generation_kwargs={"until": []},
            metadata=told,
        )
        if not self.known:
            raise DataError(
                f"task {self.task_name}: {self._from} tells of no item what is right, so nothing can be counted"
            )
        for item, why in self.benchmark.left_out.items():
            logger.warning(f"task {self.task_name}: item {item} of {self._from} is left out: {why}")

    @property
    def _from(self) -> str:
        return ", ".join(self.benchmark.files) or self.benchmark.name

    def download(self, data_dir: Any = None, cache_dir: Any = None, download_mode: Any = None) -> None:
        """Nothing is downloaded: the documents are the items, without their pictures."""
        documents = [_document(place, item) for place, item in enumerate(self.items)]
        self.dataset = self.dataset_no_image = {SPLIT: documents}

    def get_config(self, key: str) -> Any:
        """An option, as lmms-eval asks for it."""
        return getattr(self.config, key, None)

    def has_training_docs(self) -> bool:
        """No."""
        return False

    def has_validation_docs(self) -> bool:
        """No."""
        return False

    def has_test_docs(self) -> bool:
        """All are test documents."""
        return True

    def test_docs(self) -> Sequence[Mapping[str, Any]]:
        """All items."""
        return self.dataset[SPLIT]

    @property
    def eval_docs_no_media(self) -> Sequence[Mapping[str, Any]]:
        """All items."""
        return self.dataset[SPLIT]

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """What is asked first."""
        return str(self.asked[doc["place"]][0].question)

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """The item's id, for the log of samples: what is right stands in the document beside it."""
        return str(doc["item_id"])

    def fewshot_context(self, doc: Any, shots: int = 0, system: str | None = None, *others: Any) -> str:
        """Nothing stands in front of what is asked.

        Raises:
            ConfigError: There should be.
        """
        if shots or system:
            raise ConfigError(
                f"task {self.task_name} is asked as published: leave out --num_fewshot and --system_instruction"
            )
        return ""

    def construct_requests(self, doc_id: int, ctx: str, **more: Any) -> list[Instance]:
        """The requests of one item's metric; each answer that is weighed is a request of its own."""
        shows: dict[int, Callable[[Any], list[PIL.Image.Image]]] = {}
        made: list[Instance] = []

        def add(kind: Any, request: Request, what: Any, **said: Any) -> None:
            show = shows.setdefault(id(request.image), partial(_show, request.image))  # the same one: a model may pack
            arguments = (request.question, what, show, doc_id, self.task_name, SPLIT)
            metadata = {**more.get("metadata", {}), **said}
            made.append(Instance(request_type=kind, arguments=arguments, idx=len(made), metadata=metadata))

        for request in self.asked[doc_id]:
            if isinstance(request, Generate):
                options = {"max_new_tokens": request.max_tokens, "do_sample": False, "temperature": 0.0, "num_beams": 1}
                options |= self.config.generation_kwargs  # --gen_kwargs
                add("generate_until", request, options)
            else:
                for answer in request.answers:
                    add("loglikelihood", request, answer, **{OPTIONAL: request.optional})
        return made

    def process_results(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, _Told]:
        """What came back, for each measure.

        Raises:
            ModelError: A model gave no loss.
        """
        place = doc["place"]
        back = iter(zip(results, self._instances_of(place), strict=True))
        told: list[Any] = []
        for request in self.asked[place]:
            if isinstance(request, Generate):
                text, _ = next(back)
                told.append(str(text[0] if isinstance(text, list) else text).strip())
            else:
                found = [next(back) for _ in request.answers]
                lost = request.optional and any(result == "" for result, _ in found)
                told.append([] if lost else [self._weighed(*each) for each in found])
        return dict.fromkeys(self.told, _Told(place, told))

    def aggregation(self) -> dict[str, Callable[[Sequence[_Told]], float]]:
        """From what came back to a measure, or a bound of its interval."""
        return {name: partial(self._counted, measure, bound) for name, (measure, bound) in self.told.items()}

    def higher_is_better(self) -> dict[str, bool | None]:
        """Of each measure."""
        return {name: self.known[measure].gains for name, (measure, _) in self.told.items()}

    @cached_property
    def known(self) -> dict[str, Measure]:
        """The measures that these items have, by name, of answers that say nothing."""
        nothing: list[list[Result]] = [
            ["" if isinstance(request, Generate) else [[-1.0, 1.0] for _ in request.answers] for request in asked]
            for asked in self.asked
        ]
        return {measure.name: measure for measure in self.metric.measures(self.items, nothing)}

    @cached_property
    def told(self) -> dict[str, tuple[str, str]]:
        """What lmms-eval shows: each measure; of those that are of no subset, the bounds of the interval, too."""
        shown = {}
        for name in self.known:
            for bound in ("value",) if "/" in name else ("value", "low", "high"):
                shown[name if bound == "value" else f"{name}_{bound}"] = (name, bound)
        return shown

    def _counted(self, name: str, bound: str, told: Sequence[_Told]) -> float:
        measured = self._measured(tuple(sorted(told, key=lambda one: one.item)))
        found = score(measured[name], measured) if name in measured else None
        return math.nan if found is None else float(getattr(found, bound))

    def _measured(self, told: tuple[_Told, ...]) -> dict[str, Measure]:
        """All measures of some items; where weighed answers have no lengths, those that are the same for any."""
        places = tuple(one.item for one in told)
        if places not in self._kept:
            items = [self.items[place] for place in places]

            def measured(draw: np.random.Generator | None) -> dict[str, Measure]:
                results = [[_with_lengths(result, draw) for result in one.results] for one in told]
                return {measure.name: measure for measure in self.metric.measures(items, results)}

            found = measured(None)
            if any(_no_lengths(result) for one in told for result in one.results):
                draw = np.random.default_rng(0)
                trials = [measured(draw) for _ in range(_TRIALS)]
                lost = {name for name in found for trial in trials if not _same(found[name], trial.get(name))}
                lost |= {name for name, measure in found.items() if lost.intersection(measure.parts)}
                found = {name: measure for name, measure in found.items() if name not in lost}
                self._say_lost(lost)
            self._kept[places] = found
        return self._kept[places]

    def _say_lost(self, lost: set[str]) -> None:
        if new := sorted(lost - self._said):
            logger.warning(
                f"task {self.task_name}: the model tells no token counts, so that no sum of log-probabilities is known; without "
                f"{', '.join(new)}. --model distill tells them, unless --use_cache answers for it"
            )
            self._said |= lost

    def _instances_of(self, place: int) -> list[Instance]:
        if self._by_item is None:
            self._by_item = defaultdict(list)
            for instance in self.instances:
                self._by_item[instance.doc_id].append(instance)
        return sorted(self._by_item[place], key=lambda instance: instance.idx)

    def _weighed(self, result: Any, instance: Instance) -> list[float | None]:
        """``[nats, tokens]``, or ``[nats a token, None]``, of one answer."""
        try:
            loss, _ = ast.literal_eval(result) if isinstance(result, str) else result  # lmms-eval makes texts of pairs
            loss = float(loss)
        except (SyntaxError, TypeError, ValueError):
            loss = math.nan
        if math.isnan(loss):
            raise ModelError(
                f"task {self.task_name}, document {instance.doc_id}: expected a loss and whether it is greedy, got {result!r}"
            )
        counts = instance.token_counts[0] if instance.token_counts else None
        tokens = counts.output_tokens if counts else None
        return [-loss, None] if tokens is None else [-loss * tokens, float(tokens)]


def _no_lengths(result: Any) -> bool:
    return isinstance(result, list) and any(tokens is None for _, tokens in result)


def _with_lengths(result: Any, draw: np.random.Generator | None) -> Any:
    """The result with made-up lengths in place of unknown ones: 1, or powers of 2, which keep equal means equal."""
    if not _no_lengths(result):
        return result
    lengths = np.ones(len(result)) if draw is None else 2.0 ** draw.integers(_MOST_DOUBLED, size=len(result))
    return [[nats * length, float(length)] for (nats, _), length in zip(result, lengths.tolist(), strict=True)]


def _same(one: Measure, other: Measure | None) -> bool:
    return other is not None and (list(one.hits), list(one.of)) == (list(other.hits), list(other.of))


def _show(image: ImageSource | None, document: Any) -> list[PIL.Image.Image]:
    """What a model calls with a document: the picture of one request."""
    return [] if image is None else [image.load()]


def _document(place: int, item: Item) -> dict[str, Any]:
    """An item as JSON, without its pictures."""
    texts = {field.name: getattr(item, field.name) for field in fields(item) if not field.name.startswith("image")}
    return {"place": place, **texts}


def _open(config: Mapping[str, Any]) -> Benchmark:
    folder = config.get("folder") or os.environ.get(FOLDER)
    if not folder:
        raise ConfigError(
            f"task {config['task']}: no folder of benchmarks; name it in the environment: export {FOLDER}=FOLDER"
        )
    images = config.get("images") or os.environ.get(IMAGES, "").split(os.pathsep)
    found = _find(Path(folder), tuple(Path(one) for one in ([images] if isinstance(images, str) else images) if one))
    metric, pattern = config.get("metric"), config.get("benchmark")
    chosen = [
        benchmark
        for benchmark in found.benchmarks.values()
        if metric in (None, benchmark.metric) and fnmatch(benchmark.name, pattern or "*")
    ]
    if len(chosen) == 1:
        return chosen[0]
    wanted = " and ".join(f"{key} {value}" for key, value in (("metric", metric), ("name", pattern)) if value)
    if chosen:
        raise DataError(
            f"task {config['task']}: {folder} holds {len(chosen)} benchmarks with {wanted}: "
            f"{', '.join(benchmark.name for benchmark in chosen)}; let {FOLDER} be a folder that "
            f"holds one of them, or copy the task's file and write `benchmark: {chosen[0].name}`"
        )
    there = ", ".join(f"{benchmark.name} ({benchmark.metric})" for benchmark in found.benchmarks.values()) or "none"
    unread = "".join(f"\n  not read: {file}: {why}" for file, why in list(found.unread.items())[:_MOST_UNREAD])
    raise DataError(
        f"task {config['task']}: {folder} holds no benchmark with {wanted or 'a name'}; it holds {there}{unread}"
    )


@cache
def _find(folder: Path, images: tuple[Path, ...]) -> Found:
    return find_benchmarks(folder, images=images)
