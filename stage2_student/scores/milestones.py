"""Scores while a student trains: a line each in ``evaluation.jsonl``, and the best student so far as a folder of its own.

Whatever happens here, the training stays what it is, to the last bit: random numbers are put back, adapters taken out
again. A step is scored before its checkpoint is written, so that a training which goes on from there knows the scores of all
steps before; lines of later steps are cut away then, and come again. The folder ``best`` says itself of which step it is, and
the best student of the steps before a checkpoint stays beside it, as ``best-before``, until a checkpoint holds that step.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.common.files.atomic import remove, write_bytes_atomic
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.stage2_student.final_folder import BEFORE, BEST
from vlm_distill_cache.stage2_student.scores.on_the_way import EVALUATIONS, Kept, read_evaluations, read_kept
from vlm_distill_cache.stage2_student.scores.results import DETAILS, HEADLINE, EvaluationReport
from vlm_distill_cache.stage2_student.training.checkpoint import Position, kept_random_numbers
from vlm_distill_cache.stage2_student.training.log import TrainingLog

# Without the scores of kinds, whose names are a data set's: services allow few characters.
_DRAWN = [name for name, _, _ in (*HEADLINE, *DETAILS) if name and not name.endswith("/")]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How a student is scored and kept, on the main process.

    Attributes:
        as_finished: In its block the student is as it would be if its training ended here.
        score: Scores it.
        keep: Writes it into a folder, which says so; told the position and the log so far.
        by: The score that the best one is chosen by.
        described: What each line says of how it was scored.
        of: Fingerprint of that.
    """

    as_finished: Callable[[], AbstractContextManager[None]]
    score: Callable[[], EvaluationReport]
    keep: Callable[[Path, Kept, Position, Sequence[Mapping[str, Any]]], None]
    by: str
    described: Mapping[str, Any]
    of: str


class Milestones:
    """The steps of a training at which its student is scored; all processes pass by, the main one scores.

    Attributes:
        lines: Of all steps so far, those before a resume included; the main process's.
    """

    def __init__(
        self, output: Path, accelerator: Accelerator, scorer: Scorer | None, *, every: int | None, last: int, run: str
    ) -> None:
        """Begin, in a fresh training.

        Args:
            output: The training's folder.
            accelerator: Of all its processes.
            scorer: The main process's; None: the others, or nothing is scored.
            every: Steps between two; None: there are none.
            last: The last step of the run, which is one.
            run: Fingerprint of the run.
        """
        self._output, self._accelerator, self._scorer = output, accelerator, scorer
        self._every, self._last, self._run = every, last, run
        self.lines: list[dict[str, Any]] = []
        self._best: Kept | None = None
        self._saved = 0  # the step of the newest checkpoint
        self._seconds = 0.0

    def resume(self, position: Position, *, earlier: str | None) -> None:
        """Go on behind a position: lines of later steps are cut away.

        Args:
            position: Of the checkpoint; the first one of a fresh training.
            earlier: Fingerprint of a shorter training that is gone on with.

        Raises:
            ConfigError: If ``best`` is of another run.
        """
        if self._scorer is None:
            return
        self._saved = position.total_steps
        self.lines = [line for line in read_evaluations(self._output) if line["step"] <= self._saved]
        if self._saved >= self._last and (not self.lines or self.lines[-1]["step"] < self._last):
            _log.warning(
                "evaluation.every: this training is finished, so that no step is left to be scored on the way; `distill "
                "evaluate` scores its student"
            )
            return
        self._output.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_bytes_atomic(self._output / EVALUATIONS, content.encode())
        self._best = self._best_so_far({self._run, *([earlier] if earlier else [])})

    def _best_so_far(self, runs: Collection[str]) -> Kept | None:
        """The best student of the steps that the training goes on behind; later ones come again, and may score otherwise."""
        best, before = (read_kept(self._output, runs=runs, name=name) for name in (BEST, BEFORE))
        if before is not None and before.step <= self._saved and (best is None or best.step > self._saved):
            remove(self._output / BEST)
            best = before
            (self._output / BEFORE).rename(self._output / BEST)
        remove(self._output / BEFORE)
        if best is None or best.step <= self._saved:
            return best
        _log.info(
            "%s is of step %d, and the training goes on behind step %d: chosen anew", BEST, best.step, self._saved
        )
        return None

    def saved(self, position: Position) -> None:
        """A checkpoint holds this position: no kill leads back behind it any more."""
        self._saved = position.total_steps
        if self._scorer is not None:
            remove(self._output / BEFORE)

    def seconds(self) -> float:
        """How long the last one took; 0 from then on."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def reach(self, position: Position, phase: str, log: TrainingLog, bring_back: Callable[[], None]) -> None:
        """Score the student, if it is time; every process calls this after every step.

        ``bring_back`` lets it be what is trained of it; it is called by every process, too.
        """
        step = position.total_steps
        if self._every is None or (step % self._every and step != self._last):
            return
        log.flush()  # of all processes, and so that trackers are told of steps in their order
        began = time.perf_counter()
        bring_back()
        if self._scorer is not None:
            with kept_random_numbers(), self._scorer.as_finished():
                self._score(self._scorer, position, phase, log)
        self._accelerator.wait_for_everyone()
        self._seconds += time.perf_counter() - began

    def _score(self, scorer: Scorer, position: Position, phase: str, log: TrainingLog) -> None:
        began, step = time.perf_counter(), position.total_steps
        try:
            report = scorer.score()
        except DistillError as error:  # a picture that is gone, say: no reason to lose a training
            _log.warning("step %d: not scored: %s", step, error)
            return
        if unfit := [name for name, score in report.scores.items() if not math.isfinite(score.value)]:
            _log.warning("step %d: not scored: %s is no finite number; the student has diverged", step, unfit[0])
            return
        scores = report.to_dict()["scores"]
        found = Kept(step=step, by=scorer.by, value=report.scores[scorer.by].value, of=scorer.of, run=self._run)
        if is_best := found.beats(self._best):
            if self._best is not None and self._best.step <= self._saved:
                with contextlib.suppress(FileNotFoundError):
                    (self._output / BEST).rename(self._output / BEFORE)
            scorer.keep(self._output / BEST, found, position, log.records)
            self._best = found
        line = {"step": step, "phase": phase, **scorer.described, "seconds": round(time.perf_counter() - began, 3)}
        if report.unreadable:
            line["unreadable"] = dict(report.unreadable)
        self.lines.append({**line, "best": is_best, "scores": scores})
        with (self._output / EVALUATIONS).open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        drawn = {name: float(report.scores[name].value) for name in _DRAWN if name in report.scores}
        log.draw("eval", drawn, step=step)
        shown = [
            (heading, factor, report.scores[name].value) for name, heading, factor in HEADLINE if name in report.scores
        ]
        said = ", ".join(f"{heading.removesuffix(', %')} {factor * value:.1f} %" for heading, factor, value in shown)
        where = f"; the best so far: {quoted(self._output / BEST)}" if is_best else ""
        _log.info("step %d of %d: %s%s", step, self._last, said, where)
