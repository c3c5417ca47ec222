"""Where a training's numbers are shown beside its log: TensorBoard's files, and services, through accelerate's trackers.

A service is told on the main process alone and decides nothing: one that fails while a student trains is left out from
then on, and a line says so. A resumed training goes on with the run that the service has of it: ``OUTPUT/trackers.json``
holds its name there. Where a service keeps its files, who logs in and whether it is online, its own variables say
(``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ``TRACKIO_SPACE_ID``, ...).
"""

import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import parse_json, read_bounded, write_json_atomic
from vlm_distill_cache.common.printing import hide_secrets, one_line
from vlm_distill_cache.stage2_student.config import Tracker
from vlm_distill_cache.stage2_student.training.checkpoint import kept_random_numbers

KNOWN = "trackers.json"
PROJECT = "vlm-distill-cache"
OPTION = "--log-with (report_to)"
# How a service keeps its files on this machine. MLflow's own advice, a data base, is refused by mlflow-skinny.
_HERE: Mapping[Tracker, str] = {
    "wandb": "; WANDB_MODE=offline keeps its files here",
    "mlflow": "; MLFLOW_TRACKING_URI=FOLDER MLFLOW_ALLOW_FILE_STORE=true keeps its files here",
}
_MOST_SAID = 1000  # characters
_WANDB_WAITS_S = 30.0  # for its service to answer; 90 by default
_MOST_BYTES = 1 << 16
_log = logging.getLogger(__name__)


def refuse_missing(names: Sequence[Tracker]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: With the command that installs it.
    """
    # A folder of that name, as wandb leaves one in the working directory, is no package.
    missing = [
        name
        for name in names
        if name != "tensorboard" and ((spec := importlib.util.find_spec(name)) is None or spec.origin is None)
    ]
    if missing:
        are, them = ("are", "them") if len(missing) > 1 else ("is", "it")
        rest = ",".join(name for name in names if name not in missing) or "none"
        raise ConfigError(
            f"{OPTION}: {', '.join(missing)} {are} not installed: run `pip install {' '.join(missing)}`, or leave {them} out "
            f"(--log-with {rest})"
        )


class Trackers:
    """The trackers of one training, on its main process."""

    def __init__(self, names: Sequence[Tracker], output: Path, *, done: int, settings: Mapping[str, Any]) -> None:
        """Open them.

        Args:
            names: Which.
            output: The training's folder.
            done: Steps that the training goes on behind; later ones that were shown before are shown again.
            settings: What the training is, for the services: nested plain values without secrets.

        Raises:
            ConfigError: If one of the services cannot be reached or refuses.
        """
        self._open: list[GeneralTracker] = []
        known = _read_known(output) if done else {}
        for name in names:
            if name == "tensorboard":
                tracker: GeneralTracker = TensorBoardTracker(name, output, purge_step=done + 1)
                tracker.start()
                self._open.append(tracker)
                continue
            tracker = _service(name, output, known.get(name))
            try:
                with kept_random_numbers():  # which names of runs are drawn from
                    tracker.start()
                if name not in known:  # services may not let anybody change what a run was begun with
                    tracker.store_init_configuration(_flat(settings))
            except Exception as error:
                gone = f" (if its run is gone there: delete {output / KNOWN})" if name in known else ""
                rest = ",".join(other for other in names if other != name) or "none"
                said = one_line(str(error).strip().rstrip("."), limit=_MOST_SAID)  # services say at the end what helps
                raise ConfigError(
                    f"{OPTION}: {name} does not start: {said}; mend that{gone}, or leave {name} out (--log-with {rest})"
                    + _HERE.get(name, "")
                ) from error
            self._open.append(tracker)
            known[name] = _name_there(tracker)
        if known:
            write_json_atomic(output / KNOWN, known)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Show numbers of an optimizer step, counted from 1."""
        for tracker in list(self._open):
            if tracker.name == "tensorboard":  # a disk that is full ends the training, as for the log
                tracker.log(dict(values), step=step)
                continue
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # noqa: BLE001 - a service's own, of any class: it must not end a training
                self._leave_out(tracker, error)

    def close(self) -> None:
        """Send what is left."""
        for tracker in list(self._open):
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001 - as above
                self._leave_out(tracker, error)
        self._open.clear()

    def _leave_out(self, tracker: GeneralTracker, error: Exception) -> None:
        self._open.remove(tracker)
        _log.warning(
            "%s fails and is told no more of this training, whose log has all: %s",
            tracker.name, hide_secrets(one_line(str(error))),
        )  # fmt: skip


def _service(name: Tracker, output: Path, known: str | None) -> GeneralTracker:
    """A service's tracker, which goes on with a known run."""
    shown = "/".join(output.absolute().parts[-2:])
    if name == "wandb":
        identity: dict[str, Any] = {"id": known or secrets.token_hex(8), "resume": "allow"}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            identity["settings"] = {"init_timeout": _WANDB_WAITS_S}
        return WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=shown, dir=str(output), **identity)
    if name == "trackio":
        there = known or f"{shown.replace('/', '-')}-{secrets.token_hex(4)}"
        return TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), name=there, resume="allow")
    return MLflowTracker(PROJECT, run_id=known, run_name=shown)


def _name_there(tracker: GeneralTracker) -> str:
    """What a service calls the run: what brings it back."""
    run: Any = tracker.tracker
    return str(
        {"wandb": lambda: run.id, "trackio": lambda: run.name, "mlflow": lambda: run.info.run_id}[tracker.name]()
    )


def _read_known(output: Path) -> dict[str, str]:
    try:
        found = parse_json(read_bounded(output / KNOWN, max_bytes=_MOST_BYTES), str(output / KNOWN))
    except FileNotFoundError:
        return {}
    except CacheFormatError as error:
        _log.warning("%s; services get a new run", error)
        return {}
    return (
        {name: name_there for name, name_there in found.items() if isinstance(name_there, str)}
        if isinstance(found, dict)
        else {}
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | int | bool | None]:
    """Nested values under dotted names; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat
