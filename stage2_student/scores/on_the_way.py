"""What a training that was scored on the way left: its scores, step by step, and the best student. Imports no torch."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.document_rules import EVALUATION
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import parse_json, read_bounded
from vlm_distill_cache.common.files.rules import FLAG, check, record, text, whole
from vlm_distill_cache.common.files.signed import refuse_out_of_reach
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.stage2_student.final_folder import BEST, look_at_final

EVALUATIONS = "evaluation.jsonl"
_LOWER_IS_BETTER = ("teacher/kl",)
_LINE = record({"step": whole(1, 1 << 60), "phase": text(100), "best": FLAG}, free=True)
_MOST_BYTES = 1 << 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which student lies in ``best``.

    Attributes:
        step: Optimizer steps of the run that it has had.
        by: The score that it is best by.
        value: That score.
        of: Fingerprint of how and on what it was scored: others cannot be compared.
        run: Fingerprint of the run.
    """

    step: int
    by: str
    value: float
    of: str
    run: str

    def beats(self, other: "Kept | None") -> bool:
        """Whether this student takes the other's place."""
        if other is None or other.of != self.of:
            return True
        return self.value < other.value if self.by in _LOWER_IS_BETTER else self.value > other.value


def read_evaluations(output: Path) -> list[dict[str, Any]]:
    """The scores of a training's steps, in order: of each ``step``, ``phase``, ``split``, ``limit``, ``best``, ``scores``.

    What cannot be read is left out, and said in a line; the unfinished last line of a killed training is nothing to mention.

    Raises:
        ConfigError: If the system does not let it be read.
    """
    path = output / EVALUATIONS
    try:
        lines = read_bounded(path, max_bytes=_MOST_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except CacheFormatError as error:
        refuse_out_of_reach(path, error)
        _log.warning("scores while training are left out: %s", error)
        return []
    found: dict[int, dict[str, Any]] = {}
    for number, written in enumerate(filter(None, lines), 1):
        try:
            line = parse_json(written, f"{path}, line {number}")
            for rule in (EVALUATION, _LINE):
                check(line, rule, str(path))
            found[line["step"]] = line
        except CacheFormatError:
            if written is not lines[-1]:
                _log.warning("%s: line %d is damaged and left out; this changes no student", path, number)
    return [found[step] for step in sorted(found)]


def read_kept(output: Path, *, runs: Collection[str] = (), name: str = BEST) -> Kept | None:
    """What lies in ``best``, or a folder of another ``name``; None if there is nothing, or it is damaged, which is said.

    ``runs`` are the fingerprints of runs that it may be of; none: of any.

    Raises:
        ConfigError: If it is of another run, or nothing that was kept on the way.
    """
    folder = output / name
    try:
        found, damage = look_at_final(folder)
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds no student that was kept while this one trained; move it away") from None
        return None
    if damage:
        _log.warning("%s: damaged, and written again where a step is better than none: %s", folder, damage[0])
        return None
    if "best" not in found or (runs and found["best"]["run"] not in runs):
        raise ConfigError(
            f"{folder} belongs to another run (configuration, cache or data differ); use another --output, or delete that folder"
        )
    return Kept(**found["best"])


def best_on_the_way(output: Path, scores: Sequence[Mapping[str, Any]]) -> tuple[Kept | None, list[str]]:
    """The best student that a training kept, and what is to be said of it, a line each.

    Args:
        output: The training's folder.
        scores: Its scored steps, as of `read_evaluations`; none: it was not scored on the way.

    Raises:
        ConfigError: As `read_kept`.
    """
    kept = read_kept(output) if scores else None
    if kept is None:
        return None, []
    said = f"Best on the way: {output / BEST}, after step {kept.step}, by {kept.by} {kept.value:.3f}"
    how = next((line for line in scores if line["step"] == kept.step), None)
    if how is None:  # its line is damaged
        return kept, [said]
    split, limit = (quoted(str(how.get(name))) for name in ("split", "limit"))
    lines = [f"{said} (distill evaluate {quoted(output / BEST)} --split {split} --limit {limit})"]
    own, last = how["scores"].get(kept.by), scores[-1]["scores"].get(kept.by)
    if own and last and scores[-1]["step"] != kept.step and own["low"] <= last["value"] <= own["high"]:
        lines.append(
            f"  the last step's {last['value']:.3f} lies in the interval of that, [{own['low']:.3f}, {own['high']:.3f}]: the "
            "choice may be chance; evaluation.items=N scores more items, evaluation.best=SCORE chooses by another score"
        )
    return kept, lines
