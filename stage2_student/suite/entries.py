"""What is told of a benchmark's measures, and of what was left out: plain values for JSON."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.stage2_student.suite.measures import Measure, score

SHOWN_REASONS = 5
_MOSTLY = 0.5  # from this share on answers that say nothing are worth a note
_NAMES = re.compile(r"""'[^']*'|"[^"]*"|\S*[\d/\\.]\S*""")  # what differs between two items of one fault


def counted(measure: Measure, others: Mapping[str, Measure]) -> dict[str, Any]:
    """A measure's value with its interval, as the summary has it; ``others`` by name, among which its parts are."""
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


def unparsed_note(measures: Sequence[Mapping[str, Any]], instruction: str) -> list[str]:
    """A note where most answers were not understood: the scores of answers then tell the form, not what the model knows."""
    found = next((measure for measure in measures if measure["name"] == "unparsed"), None)
    if found is None or found["value"] is None or found["value"] < _MOSTLY:
        return []
    hint = "measures by likelihood or P(yes) do not depend on that"
    if instruction:
        hint += (
            "; a model that was never shown such instructions may answer with --prompts plain (and another --output)"
        )
    return [f"{found['value']:.0%} of the answers could not be used ({found['heading']}): {hint}"]


def unit_by_unit(measure: Measure) -> dict[str, Any]:
    """All of a measure, so that two models can be compared in pairs."""
    stored = {name: getattr(measure, name) for name in ("name", "heading", "factor", "gains", "summed")}
    counts = {"hits": [float(value) for value in measure.hits], "of": [float(value) for value in measure.of]}
    return {**stored, "units": list(measure.units), **counts, "parts": list(measure.parts)}


def reasons_of(left_out: Mapping[str, str]) -> list[str]:
    """Of each kind of reason the first, with its item and how many more there are; kinds differ in more than names."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, why in left_out.items():
        kinds[_NAMES.sub("", why)].append(name)
    shown = []
    for first, *more in sorted(kinds.values(), key=len, reverse=True)[:SHOWN_REASONS]:
        alike = f" (and {len(more):,} more alike)" if more else ""
        shown.append(f"{one_line(first, limit=60)}: {one_line(left_out[first])}{alike}")
    return shown


def refuse_repeats(benchmark: Benchmark) -> None:
    """Raise a DataError where two items have one id: results are kept by item, so that the two would count as one."""
    repeated = [name for name, count in Counter(item.item_id for item in benchmark.items).items() if count > 1]
    if repeated:
        shown = ", ".join(one_line(name, limit=60) for name in repeated[:3])
        raise DataError(
            f"{', '.join(benchmark.files)}: items of {benchmark.name} have an id that another one has, too; {len(repeated)} such "
            f"ids ({shown}); are two copies of a file below the folder? Take one away"
        )
