"""A training that goes on behind its end (``--extend``), and what makes one training another one. Imports no torch.

Only the length of the last phase may be another one, and only if the learning rates of all steps so far stay what they
were: the result is then, bit for bit, that of a training that was so long from its beginning. The student that is there says
how it was trained, so that an extension that was killed goes on too; it is replaced when the longer training is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.documents import describe_differences
from vlm_distill_cache.common.cache.versions import kept_versions
from vlm_distill_cache.common.config import config_from_dict, read_yaml
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, DistillError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, PhaseConfig, TrainConfig, describe
from vlm_distill_cache.stage2_student.final_folder import FINAL, read_provenance
from vlm_distill_cache.stage2_student.training.output_folder import CONFIG

OF_LENGTH = ("steps", "epochs", "warmup")  # of the last phase
_OFFER = "to train the same student longer, add --extend, which goes on from there"


def as_begun(config: TrainConfig) -> TrainConfig:
    """A configuration with what it does not use as its folder's training has it.

    Phases that do not run, and the adapters where no phase has any, are in the fingerprints of trainings all the same.
    """
    try:
        before = config_from_dict(TrainConfig, read_yaml(Path(config.output) / CONFIG, missing_ok=True))
    except DistillError:  # whoever needs it says so
        return config
    unused: dict[str, Any] = {name: getattr(before, name) for name in PHASE_NAMES if name not in config.phases}
    if not any(config.phase(name).trainable == "lora" for name in config.phases):
        unused["lora"] = before.lora
    return replace(config, **unused)


def differing_options(output: Path, config: TrainConfig, hashes: Mapping[str, str], *, offers: bool = True) -> str:
    """In what a training in a folder differs from a configuration, for an error; empty where that cannot be told.

    With ``offers`` it says where ``--extend`` would help.
    """
    now, known = describe(config, hashes), True
    # Of a training of such a version either nothing can be told, or it is described anew, which finds no difference.
    older = "" if config.data_share == 1 else "; data_share took the first samples in older versions, not random ones"
    try:
        before = _described(output / FINAL)
    except FileNotFoundError:
        try:
            before, known = describe(config_from_dict(TrainConfig, read_yaml(output / CONFIG)), hashes), False
        except DistillError:
            return older
    except DistillError:
        return older
    lines = describe_differences(_set(before, now), _set(now, before), there="there", here="this run")
    offer = f"; {_OFFER}" if offers and (output / FINAL).is_dir() and is_longer(before, now) else ""
    return (
        ("".join(f"; {line.strip()}" for line in lines[:10]) or older)
        + offer
        + versions_kept(before if known else None, hashes)
    )


def _set(described: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A description without options that nobody set, where another does not name them."""
    return {name: value for name, value in described.items() if value is not None or name in other}


def versions_kept(before: Mapping[str, Any] | None, hashes: Mapping[str, str]) -> str:
    """Where the caches that a run learned from are kept, if they were extended since: the end of an error; else empty.

    Args:
        before: As `describe` says what the run was; None: nothing tells.
        hashes: Of the caches by their paths, as they are now.
    """
    named = [] if before is None else [before, *(part for part in before.values() if isinstance(part, Mapping))]
    learned = {one for part in named for one in (part.get("cache"), *(part.get("caches") or ()))}
    is_it = "is what it was before" if before is None else "goes on with what that run learned from"
    return "".join(
        f"; {place} was extended: --cache {quoted(folder)} {is_it}, another --output trains on the extended cache"
        for place, now in hashes.items() if not is_url(place)
        for old, folder in kept_versions(Path(place)).items() if old != now and (before is None or old in learned)
    )  # fmt: skip


def has_other_length(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run's description differs from another only in how long its last phase is, either way."""
    last = now["phases"][-1]
    lengths = [{name: value for name, value in of[last].items() if name in OF_LENGTH} for of in (before, now)]
    return lengths[0] != lengths[1] and _without_length(before, last) == _without_length(now, last)


def is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run's description is another's with more of its last phase, of a schedule that can be gone on with."""
    old, new = (of.get(now["phases"][-1], {}) for of in (before, now))
    # Passes are not compared with steps: only the data tell how many these are.
    more = any(old.get(of) is not None and (new.get(of) or 0) > old[of] for of in ("steps", "epochs"))
    return more and new.get("schedule") == "constant" and has_other_length(before, now)


def earlier_training(output: Path, config: TrainConfig, hashes: Mapping[str, str]) -> tuple[str, PhaseConfig] | None:
    """The finished training that a configuration goes on with: its fingerprint, and its last phase.

    None where the student that is there is the configuration's own, or none is.

    Raises:
        ConfigError: If it is another one that cannot be trained on.
    """
    final, now = output / FINAL, describe(config, hashes)
    try:
        before = _described(final)
    except FileNotFoundError:
        return None
    if before == now:
        return None
    if not has_other_length(before, now):
        lines = describe_differences(before, now, there="the student there", here="this run")
        raise ConfigError(
            f"--extend: {final} differs in more than the length of phase {now['phases'][-1]}, its last one:\n"
            + "\n".join(lines)
            + "\nGive the options it was trained with and more steps; or begin a new run from it: --student "
            f"{final} --output ANOTHER"
        )
    earlier = config_from_dict(TrainConfig, read_provenance(final)["config"], where=str(final))
    return fingerprint(before), earlier.phase(config.phases[-1])


def _described(final: Path) -> dict[str, Any]:
    """What a trained student was trained by.

    Raises:
        FileNotFoundError: If there is none.
        ConfigError: If it does not say so any more.
    """
    try:
        found = read_provenance(final)
        described = describe(config_from_dict(TrainConfig, found["config"], where=str(final)), found["caches"])
    except CacheFormatError as error:
        raise ConfigError(str(error)) from error
    if fingerprint(described) != found["fingerprint"]:
        raise ConfigError(
            f"{final}: how it was trained cannot be told any more (another version, or its mixture's file changed), so that it "
            f"cannot be trained on from its checkpoint; begin a new run from it: --student {final} --output ANOTHER"
        )
    return described


def _without_length(described: Mapping[str, Any], last: str) -> dict[str, Any]:
    phase = {name: value for name, value in described[last].items() if name not in OF_LENGTH}
    return {**described, last: phase}
