"""Checkpoints that are whole or absent, and resume a run bit for bit.

``checkpoints/step-00000120/`` holds ``tensors.pt`` (trained parts, optimizer, random state) and ``state.json``; of a divided
student (``sharding``) parts and averages lie beside them, in a file of each process (`shard_files`). The folder is written
under a temporary name, flushed and renamed, so that a killed run leaves either a complete checkpoint or one that is not
looked at. The learning rate and the order of samples are pure functions of the position: a phase, a step and a count of
samples are all the state there is.

A position is believed if the state's own checksum fits, if the run has such a position, and if the folder's name and
the tensors say the same. A checkpoint of which anything is damaged is named in the log, and the one before is taken.
What cannot be read at the moment stops the run instead: it may be sound. Folders of other names are not ours.
"""

import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, NoRoomError
from vlm_distill_cache.common.files.atomic import clean_stale, new_directory, remove, write_durably
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.files.hashing import file_checksum
from vlm_distill_cache.common.files.rules import ANYTHING, OBJECT, Rule, check, entries, items, record, text
from vlm_distill_cache.common.files.signed import document_bytes, list_files, read_signed, refuse_out_of_reach
from vlm_distill_cache.stage2_student.students.shards import as_share
from vlm_distill_cache.stage2_student.training.optimizers import fits, flat_averages
from vlm_distill_cache.stage2_student.training.shard_files import SUFFIX, plain_state, read_averages, read_values

CHECKPOINTS = "checkpoints"
STATE = "state.json"
TENSORS = "tensors.pt"
_UNSIGNED = ("fingerprint", "position", "tensor_bytes", "tensor_checksum")  # a state of older versions
# What readers of damaged bytes, and users of damaged values, raise.
_MISFITS = (
    OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, AssertionError,
    EOFError, UnpicklingError,
)  # fmt: skip
_NAME = re.compile(r"step-(\d{8,})")
_TENSOR = Rule("a tensor", lambda value: isinstance(value, torch.Tensor))
_VALUES = entries(_TENSOR, most=1 << 20)
_RULE = record(
    {
        "student": record({"values": _VALUES, "merged": items(_VALUES, most=100), "frozen": text(100)}),
        "optimizer": record({"state": OBJECT, "param_groups": items(OBJECT, least=1, most=100)}),
        "random": record({"torch": _TENSOR, "cuda": items(_TENSOR, most=1000), "numpy": ANYTHING, "python": ANYTHING}),
        "fingerprint": text(100),
        "position": OBJECT,
    }
)
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
        entries_read: Entries of cached logits that the run has learnt from, each time that it did.
        entries_beyond: Those of them whose token has no row in the student.
    """

    phase: int = 0
    step: int = 0
    samples: int = 0
    total_steps: int = 0
    total_samples: int = 0
    entries_read: int = 0
    entries_beyond: int = 0

    def advance(self, samples: int, entries: tuple[int, int] = (0, 0)) -> "Position":
        """The position one optimizer step later, of so many samples, and entries read and beyond the vocabulary."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            total_steps=self.total_steps + 1,
            total_samples=self.total_samples + samples,
            entries_read=self.entries_read + entries[0],
            entries_beyond=self.entries_beyond + entries[1],
        )

    def steps_of(self, phases: Sequence[int]) -> list[int]:
        """How many steps are done of each phase that has begun, of phases of so many steps."""
        return [*phases[: self.phase], *([self.step] if self.step else [])]

    def is_of(self, phases: Sequence[tuple[int, int]]) -> bool:
        """Whether a run of phases, each of (steps, batch size), stands here after some step."""
        if not all(type(value) is int and value >= 0 for value in asdict(self).values()) or self.phase >= len(phases):
            return False
        before, (steps, size) = phases[: self.phase], phases[self.phase]
        return (
            1 <= self.step <= steps
            and self.samples == self.step * size
            and self.total_steps == self.step + sum(steps for steps, _ in before)
            and self.total_samples == self.samples + sum(steps * size for steps, size in before)
            and self.entries_beyond <= self.entries_read
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk; ``files`` are what it holds, as from `list_files`."""

    path: Path
    position: Position
    fingerprint: str
    files: Mapping[str, list[Any]]


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
    if not 0 <= position <= len(keys):  # numpy would read on behind them
        raise ValueError(f"numpy's generator stands at {position} of {len(keys)}")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Whatever the block draws, numbers drawn behind it are those that would have been drawn without it."""
    before = _random_state()
    try:
        yield
    finally:
        _restore_random_state(before)


def write_checkpoint(
    output: Path,
    position: Position,
    *,
    student: Mapping[str, Any],
    optimizer: Optimizer,
    fingerprint: str,
    keep: int,
    shares: Callable[[Path], None] | None = None,
) -> Path:
    """Write one checkpoint atomically, then drop all but the newest ``keep``.

    ``student`` is what brings the student back (``TrainedParts.state``); ``fingerprint`` is what the run is, and is
    compared when it is resumed. ``shares`` writes the values and averages of a divided student into a folder.
    """
    folder = output / CHECKPOINTS
    final = folder / _name(position.total_steps)
    clean_stale(folder)  # from a run that was killed while writing
    said = {"fingerprint": fingerprint, "position": asdict(position)}
    averages = optimizer.state_dict() if shares is None else plain_state(optimizer)
    student = dict(student) if shares is None else {**student, "values": {}}
    tensors = {"student": student, "optimizer": averages, "random": _random_state(), **said}
    with new_directory(final) as temporary:
        if shares is not None:
            shares(temporary)
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
        state = document_bytes({**said, "files": list_files(temporary)})
        write_durably(temporary / STATE, state)
        remove(final)  # the same position, from an earlier attempt that was found unusable
    for later in step_folders(output):  # so were these
        if later.name > final.name:
            remove(later)
    drop_old_checkpoints(output, keep=keep)
    return final


def drop_old_checkpoints(output: Path, *, keep: int, newest: Checkpoint | None = None) -> None:
    """Remove all before the newest complete ones, those too that a killed run had begun to remove.

    ``newest`` is the one that the run goes on from, if there are damaged ones behind it.
    """
    kept = [found for found in list_checkpoints(output) if newest is None or found.path <= newest.path][-keep:]
    for path in step_folders(output):
        if kept and path.name < kept[0].path.name:
            remove(path)


def step_folders(output: Path) -> list[Path]:
    """The checkpoints of a run by their names, oldest first, whole or not; what has another name is somebody else's.

    Raises:
        ConfigError: If their folder cannot be looked into, or is none.
    """
    folder = output / CHECKPOINTS
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        refuse_out_of_reach(folder, error)
        raise ConfigError(f"{folder}: {error.strerror}; expected a folder: move away what is there") from error


def list_checkpoints(output: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first; a damaged one is named in the log and left out.

    Whether the tensors are those that were written only `read_checkpoint` says.

    Raises:
        ConfigError: If one is from before a state had a checksum, or cannot be read at the moment.
    """
    found: list[Checkpoint] = []
    for path in step_folders(output):
        try:
            found.append(_read_state(path))
        except ConfigError:
            raise
        except _MISFITS as error:
            refuse_out_of_reach(path, error)
            _log.warning("ignoring incomplete checkpoint %s: %s", path, error)
    return found


def _read_state(path: Path) -> Checkpoint:
    state = read_signed(path / STATE, unsigned=_UNSIGNED)
    if "tensor_bytes" in state:
        raise ConfigError(
            f"{path}: written by an older version of this program, and nothing guards its position; delete "
            f"{path.parent} to begin again, or finish this run with that version"
        )
    position, files = Position(**state["position"]), state["files"]
    for name, (expected, _) in {TENSORS: files[TENSORS], **files}.items():
        if (size := (path / name).stat().st_size) != expected:
            raise CacheFormatError(f"{name} has {size} bytes, expected {expected}")
    if path.name != _name(position.total_steps):
        raise CacheFormatError(f"{STATE} is of step {position.total_steps}")
    return Checkpoint(path=path, position=position, fingerprint=state["fingerprint"], files=files)


def _name(total_steps: int) -> str:
    return f"step-{total_steps:08d}"


def find_resume_point(
    output: Path,
    fingerprint: str,
    phases: Sequence[tuple[int, int]],
    *,
    earlier: str | None = None,
    why: Callable[[], str] = str,
) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest sound checkpoint of a run and what it holds; None for a fresh start.

    Args:
        phases: The steps and the batch size of each.
        earlier: Fingerprint of a shorter training that is gone on with.
        why: Gives in what another run differs, for the error.

    Raises:
        ConfigError: If the checkpoints belong to another configuration, cache or data set.
    """
    for checkpoint in reversed(list_checkpoints(output)):
        if checkpoint.fingerprint not in (fingerprint, earlier):
            raise ConfigError(
                f"{checkpoint.path} belongs to another run: fingerprint {checkpoint.fingerprint} there, {fingerprint} now "
                f"(configuration, cache or data differ{why()}; compare {output / 'config.yaml'}). Use another --output, or "
                "delete that folder to begin again"
            )
        if not checkpoint.position.is_of(phases):
            _log.warning("ignoring damaged checkpoint %s: the run has no %s", checkpoint.path, checkpoint.position)
            continue
        try:
            return checkpoint, read_checkpoint(checkpoint)
        except CacheFormatError as error:
            _log.warning("ignoring damaged checkpoint %s: %s", checkpoint.path, error)
    if step_folders(output):
        _log.warning("no sound checkpoint is left in %s: the training begins again", output / CHECKPOINTS)
    return None


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read ``student``, ``optimizer`` and ``random``; nothing but tensors and plain values is unpickled.

    Of a divided student all values are read whole; its optimizer's averages are read by `restore_training`, from the folder
    under ``shares``.

    Raises:
        CacheFormatError: If a file is damaged, or of another position or run than the state.
    """
    shares = {name for name in checkpoint.files if name.endswith(SUFFIX)}
    if other := {path.name for path in checkpoint.path.glob(f"*{SUFFIX}")} ^ shares:
        raise CacheFormatError(f"{checkpoint.path / min(other)}: is not what {STATE} names, or is not there")
    for name in sorted(checkpoint.files):
        path = checkpoint.path / name
        try:
            whole = file_checksum(path) == checkpoint.files[name][1]
        except _MISFITS as error:
            refuse_out_of_reach(path, error)
            raise CacheFormatError(f"{path}: cannot be read: {error}") from error
        if not whole:
            raise CacheFormatError(f"{path}: the checksum is not the one in {STATE}, the file is damaged")
    path = checkpoint.path / TENSORS
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        values = read_values(checkpoint.path) if shares else {}
    except _MISFITS as error:
        refuse_out_of_reach(path, error)
        raise CacheFormatError(f"{path}: cannot be read: {error}") from error
    check(state, _RULE, str(path), remedy="it is left out")
    if (state["fingerprint"], state["position"]) != (checkpoint.fingerprint, asdict(checkpoint.position)):
        raise CacheFormatError(f"{path}: of another position or run than {STATE}")
    try:
        with kept_random_numbers():
            taken = max(int(of_one["step"]) for of_one in state["optimizer"]["state"].values())
            _restore_random_state(state["random"])
    except _MISFITS as error:
        raise CacheFormatError(f"{path}: optimizer or random numbers are not as they were written: {error}") from error
    if taken != checkpoint.position.step:
        raise CacheFormatError(f"{path}: the optimizer has taken {taken} steps, not {checkpoint.position.step}")
    if shares:
        state["student"]["values"], state["shares"] = values, checkpoint.path
    return state


def restore_training(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Bring back the optimizer's averages, of divided parameters this process's share, and the random numbers.

    The optimizer's settings are the run's.

    Raises:
        ConfigError: If the averages are of other parameters.
    """
    saved, own = state["optimizer"], optimizer.state_dict()["param_groups"]
    members = [group["params"] for group in own]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        found = {number: flat_averages(averages) for number, averages in saved["state"].items()}
        sound = [group["params"] for group in saved["param_groups"]] == members and all(
            fits(name, value, parameters[number])
            for number, averages in found.items()
            for name, value in averages.items()
        )
        if sound:
            if "shares" in state:
                found = read_averages(state["shares"], found, optimizer)
            found = {
                number: {key: as_share(value, parameters[number]) for key, value in averages.items()}
                for number, averages in found.items()
            }
            optimizer.load_state_dict({"state": found, "param_groups": own})
    except _MISFITS:
        sound = False
    if not sound:
        raise ConfigError(
            f"the newest checkpoint's optimizer is not of the {len(parameters)} parameters that this phase trains: it is "
            f"damaged. Delete its folder in {CHECKPOINTS} to go on from the one before"
        )
    _restore_random_state(state["random"])
