"""Checkpoints that are whole or absent, and resume a run bit for bit.

``checkpoints/step-00000120/`` holds ``tensors.pt`` (trained parts, optimizer, random state) and ``state.json``. The
folder is written under a temporary name, flushed and renamed, so that a killed run leaves either a complete
checkpoint or one that is not looked at. The learning rate and the order of samples are pure functions of the
position: a phase, a step and a count of samples are all the state there is.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, NoRoomError
from vlm_distill_cache.common.files.atomic import clean_stale, json_bytes, new_directory, remove, write_durably
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.files.hashing import file_checksum

CHECKPOINTS = "checkpoints"
STATE = "state.json"
TENSORS = "tensors.pt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, after a finished optimizer step.

    Attributes:
        phase: Index of the phase in the run's order, from 0.
        step: Optimizer steps finished in that phase.
        samples: Samples consumed in that phase, over all processes.
        total_steps: Optimizer steps finished in the run.
        total_samples: Samples consumed in the run.
    """

    phase: int = 0
    step: int = 0
    samples: int = 0
    total_steps: int = 0
    total_samples: int = 0

    def advance(self, samples: int) -> "Position":
        """The position one optimizer step of ``samples`` samples later."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            total_steps=self.total_steps + 1,
            total_samples=self.total_samples + samples,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    position: Position
    fingerprint: str
    checksum: str


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - libraries draw from it
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(np.array(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": (version, list(internal), gauss_next),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def write_checkpoint(
    output: Path, position: Position, *, student: Mapping[str, Any], optimizer: Optimizer, fingerprint: str, keep: int
) -> Path:
    """Write one checkpoint atomically, then drop all but the newest ``keep``.

    ``student`` is what brings the student back (``TrainedParts.state``); ``fingerprint`` is what the run is, and is
    compared when it is resumed.
    """
    folder = output / CHECKPOINTS
    final = folder / f"step-{position.total_steps:08d}"
    clean_stale(folder)  # from a run that was killed while writing
    tensors = {"student": dict(student), "optimizer": optimizer.state_dict(), "random": _random_state()}
    with new_directory(final) as temporary:
        with (temporary / TENSORS).open("xb") as file:
            try:
                torch.save(tensors, file)
            except RuntimeError as error:  # the library hides why it could not write
                reason = error.__context__ if isinstance(error.__context__, OSError) else None
                raise reason or NoRoomError(
                    f"{file.name}: cannot be written, the disk may be full ({error}); make room, then {AGAIN}"
                ) from error
            file.flush()
            os.fsync(file.fileno())
        state = {
            "fingerprint": fingerprint,
            "position": asdict(position),
            "tensor_bytes": (temporary / TENSORS).stat().st_size,
            "tensor_checksum": file_checksum(temporary / TENSORS),
        }
        write_durably(temporary / STATE, json_bytes(state))
        remove(final)  # the same position, from an earlier attempt that was found unusable
    drop_old_checkpoints(output, keep=keep)
    return final


def drop_old_checkpoints(output: Path, *, keep: int) -> None:
    """Remove all before the newest complete ones, those too that a killed run had begun to remove."""
    kept = list_checkpoints(output)[-keep:]
    for path in (output / CHECKPOINTS).glob("step-*"):
        if kept and path.name < kept[0].path.name:
            shutil.rmtree(path)


def list_checkpoints(output: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first; a damaged one is named in the log and left out."""
    found: list[Checkpoint] = []
    for path in sorted((output / CHECKPOINTS).glob("step-*")):
        try:
            state = json.loads((path / STATE).read_text())
            complete = (path / TENSORS).stat().st_size == state["tensor_bytes"]
            checkpoint = Checkpoint(
                path=path,
                position=Position(**state["position"]),
                fingerprint=state["fingerprint"],
                checksum=state["tensor_checksum"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("ignoring incomplete checkpoint %s: %s", path, error)
            continue
        if complete:
            found.append(checkpoint)
        else:
            _log.warning("ignoring incomplete checkpoint %s: %s has another size", path, TENSORS)
    return found


def find_resume_point(output: Path, fingerprint: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run, None for a fresh start.

    Raises:
        ConfigError: If the checkpoints belong to another configuration, cache or data set.
    """
    checkpoints = list_checkpoints(output)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    if newest.fingerprint != fingerprint:
        raise ConfigError(
            f"{newest.path} belongs to another run: fingerprint {newest.fingerprint} there, {fingerprint} now "
            f"(configuration, cache or data differ; compare {output / 'config.yaml'}). Use another --output, or delete "
            "that folder to begin again"
        )
    return newest


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read ``student``, ``optimizer`` and ``random``; nothing but tensors and plain values is unpickled.

    Raises:
        CacheFormatError: If the file is damaged, or from before checkpoints held trained parts only.
    """
    path = checkpoint.path / TENSORS
    if file_checksum(path) != checkpoint.checksum:
        raise CacheFormatError(
            f"{path}: the checksum is not the one in {STATE}, the file is damaged; delete {checkpoint.path}, the run "
            "then resumes from the checkpoint before"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if "student" not in state:
        raise CacheFormatError(
            f"{path}: written by an older version of this program; delete {checkpoint.path.parent} to begin again"
        )
    return state


def restore_training(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Bring back optimizer and random numbers."""
    optimizer.load_state_dict(state["optimizer"])
    _restore_random_state(state["random"])
