"""What a student comes from, in words for its card: caches, teachers, data, licences, phases, versions.

It is kept in the student's `PROVENANCE`, so that it travels with every copy, when caches and logs are gone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_distill_cache import __version__
from vlm_distill_cache.common.cache.counts import FailureCounts
from vlm_distill_cache.common.cache.plan import LONG_SAMPLES, Plan, built_with, hub_data_words
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import read_bounded
from vlm_distill_cache.common.files.versions import installed_versions
from vlm_distill_cache.common.files.yaml_text import YamlError, parse_yaml
from vlm_distill_cache.common.hub import CARD, public_name
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.data.sources.mixture import NAMED as BUILT_IN_DATA
from vlm_distill_cache.stage2_student.config import MODELS, TrainConfig
from vlm_distill_cache.stage2_student.pruned_folder import describe_cut, pruning_record
from vlm_distill_cache.stage2_student.training.log import NOT_LOSSES

UNKNOWN = "unknown: ask"
_MOST_FAILURES = 1000  # that are looked through for their reasons
_MOST_CARD = 4 << 20  # bytes
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy")
_BUILT_IN_TEACHER = "built-in"


def describe_origin(
    config: TrainConfig,
    caches: Mapping[str, TeacherCache],
    phases: Iterable[tuple[str, int, int, Mapping[Any, float]]],
    log: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a card tells beside the configuration; JSON, without time, host or secrets.

    Args:
        caches: By the place that the configuration names.
        phases: Name, steps, samples a step and peak learning rates of each.
        log: One record a step, as in ``log.jsonl``; phases without a step there state no losses.
    """
    return {
        "caches": [_cache(place, cache, images=bool(config.images)) for place, cache in caches.items()],
        "bases": _bases(config),
        "license": config.license,
        **({"cut": cut} if (cut := describe_cut(pruning_record(config.student))) else {}),
        "phases": [
            {"name": name, "steps": steps, "batch_size": size, "rates": dict(rates), "losses": _losses(name, log)}
            for name, steps, size, rates in phases
        ],
        "versions": {
            "vlm-distill-cache": __version__,
            "python": platform.python_version(),
            **installed_versions(_LIBRARIES),
        },
    }


def licence_of(folder: Path) -> str:
    """The licence that the card in a model's folder states; empty if none does. What a file says is a claim."""
    try:
        card = read_bounded(Path(os.path.realpath(folder / CARD)), max_bytes=_MOST_CARD).decode(errors="replace")
        head = card.lstrip("\ufeff \r\n").split("\n---")[0]
        told = parse_yaml(head.removeprefix("---")) if head.startswith("---") else {}
    except (OSError, CacheFormatError, YamlError):
        return ""
    named = [told.get(key) for key in ("license_name", "license")] if isinstance(told, dict) else []
    found = next((name for name in named if name and name != "other"), "")
    return one_line(", ".join(map(str, found)) if isinstance(found, list) else found)


def _cache(place: str, cache: TeacherCache, *, images: bool) -> dict[str, Any]:
    plan, totals = cache.plan, cache.manifest.totals
    failures = FailureCounts(islice(cache.failed.items(), _MOST_FAILURES))
    return {
        "place": public_location(place),
        "hash": cache.manifest_hash,
        "signals": sorted(plan.signals),
        **{f"teacher_{key}": plan.teacher.get(key) for key in ("name", "revision", "family", "dtype", "license")},
        "teacher_fingerprint": plan.fingerprints.get("teacher"),
        **{f"data_{key}": plan.data.get(key) for key in ("name", "repository", "revision", "license", "source")},
        "data_fingerprint": plan.fingerprints.get("data"),
        "cache_license": plan.data.get("cache_license"),
        "samples": totals["samples"],
        "rows": totals["rows"],
        "failed": len(cache.failed),
        "failures": [f"{count} x {reason}" for count, reason, _ in failures.rows()],
        "command": build_command(plan, images=images),
    }


def build_command(plan: Plan, *, images: bool = False) -> str:
    """The command that writes a cache like this one, as far as its plan tells; words in capitals are for the reader.

    ``images``: whether its pictures lie in a folder of their own.
    """
    if "derived" in plan.extra:
        return "cachectl select ...  # or merge: made from other caches, as its own card tells"
    teacher, data, logits = plan.teacher, plan.data, plan.signals.get(LogitCodec.signal, {})
    name = str(teacher.get("name") or "")
    known = str(data.get("name") or "DATA").partition("[")[0]
    drawn = known.partition(":")[0] in BUILT_IN_DATA
    options = {"--cache": "CACHE"}
    if not (drawn and name.startswith(_BUILT_IN_TEACHER)):
        options["--teacher"] = f"{name}@{teacher['revision']}" if teacher.get("revision") else "TEACHER"
    options["--data"] = known if drawn or not data.get("name") else f"PATH_TO/{known}"
    if images:
        options["--images"] = "IMAGES"
    if data.get("repository"):
        options["--data"] = hub_data_words(data)
    written: Mapping[str, Any] = next((how for how in plan.signals.values() if "max_new_tokens" in how), {})
    options["--signals"] = ",".join(sorted(name for name, how in plan.signals.items() if how is not written))
    low, high = logits.get("min_k"), logits.get("max_k")
    presets = [name for name, how in LOGIT_PRESETS.items() if how.items() <= logits.items()]
    hidden: Mapping[str, Any] = max(  # the projector's output has the number 0
        (how for how in plan.signals.values() if "layers" in how),
        key=lambda how: list(how["layers"]) != [0],
        default={},
    )
    drawn_map: Mapping[str, Any] = next((how for how in plan.signals.values() if "preset" in how), {})
    attention = [how for how in plan.signals.values() if "groups" in how]
    exact = any(how.get("exact") is True or how.get("preset") == "f4" for how in attention)
    grid = next((how["grid"] for how in attention if isinstance(how.get("grid"), list | tuple)), (0, 0))
    settings = {
        "split": data.get("split"),
        "limit": data.get("limit"),
        "logits": next(iter(presets), f"fixed:{low}" if low and low == high else None),
        "temperatures": logits.get("temperatures"),
        "attention_dtype": "f4" if exact else None,
        "grid": grid[0] if grid[0] == grid[-1] else None,
        "map_preset": None if exact else drawn_map.get("preset"),
        "map_grid": drawn_map.get("grid"),
        "hidden_layers": hidden.get("layers"),
        "hidden_dtype": "f4" if hidden.get("exact") else None,
        "max_new_tokens": written.get("max_new_tokens"),
        **{f"answer_{key}": written.get(key) for key in ("temperature", "top_p", "seed")},
        "groups": len(teacher.get("groups") or ()),
        "layers": teacher.get("layer_choice") if isinstance(teacher.get("layer_choice"), str) else None,
        "dtype": teacher.get("dtype"),
        "quantisation": teacher.get("quantisation"),
        "template": plan.template.get("name"),
        "max_length": plan.extra.get("max_length"),
        "long_samples": plan.extra.get(LONG_SAMPLES),
        "store": plan.store,
        "batch_size": plan.batch_size,
        "shard_size": plan.shard_size,
    }
    words = [f"{option} {quoted(value)}" for option, value in options.items()]
    words += ["--set answers=generate"] if written else []
    words += [f"--set {quoted(f'{option}={value}')}" for option, value in settings.items() if value]
    return " ".join([built_with(plan), *words])


def _bases(config: TrainConfig) -> dict[str, str]:
    """The models that a student begins from, by name, with their licences; empty strings are not stated."""
    names = [name for name in MODELS if name != "teacher" or pruning_record(config.student)]
    places = dict.fromkeys(place for name in names if (place := getattr(config, name)) and Path(place).is_dir())
    return {public_name(place): licence_of(Path(place)) for place in places}


def _losses(phase: str, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The losses of a phase's last step, to four digits: the last bits depend on the number of processes."""
    last: Mapping[str, Any] = next((record for record in reversed(log) if record.get("phase") == phase), {})
    return {name: float(f"{value:.4g}") for name, value in last.items() if name not in NOT_LOSSES}
