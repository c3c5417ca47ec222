"""Top a sealed cache up: further signals, finer settings of those that are there, new samples and formerly failed ones.

The new cache is built beside the old one by the ordinary, resumable build, whose records begin with what the old ones
hold; the teacher computes what is missing. The old cache is not touched until the new one is sealed; then the two folders
take each other's names in one step. At every moment the folder is the old cache or the new one, whole. What the cache was
before stays beside it, for those who are reading it, until it is extended again or somebody deletes it.
"""

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.cache.plan import Plan, read_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.versions import BEFORE, EXTENDING, MARK, version_folder
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, DistillError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, clean_stale, exchange_folders, hold_folder, remove
from vlm_distill_cache.common.files.disk import folder_bytes
from vlm_distill_cache.common.remotes.fetch import check_room
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.common.tools.derived_card import DERIVED
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import BuildSummary, extract, extract_with_processes
from vlm_distill_cache.stage1_teacher.planning.cache_folder import (
    check_cache_folder,
    has_shard_files,
    refuse_others_files,
    refuse_unwritable,
    stored_plan,
)
from vlm_distill_cache.stage1_teacher.planning.extension import (
    NothingToAddError,
    plan_of,
    refuse_place,
    stated,
    unnamed_signals,
    unrecorded,
    with_options_of,
)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What became of a cache.

    Attributes:
        summary: Of the new cache; None if nothing was to be done.
        before: Where the cache as it was is kept; None if nothing has changed.
        signals: Those that are new or of other settings.
        samples: Records that are new.
        options: Those of a build that finds the cache complete; None if there are none: of a part of one, of a merged one,
            or where the settings of a signal are of no option.
        notes: What was asked for and is not recorded, and why there are no options.
    """

    cache: Path
    options: BuildConfig | None = None
    summary: BuildSummary | None = None
    before: Path | None = None
    signals: tuple[str, ...] = ()
    samples: int = 0
    notes: tuple[str, ...] = ()


def extend(config: BuildConfig, *, given: Collection[str], processes: int | None = None) -> Extension:
    """Add to a sealed cache what it lacks of the options that are given.

    Killed and called again, it goes on with the shards that are missing.

    Args:
        config: As of a build of the whole; ``cache`` is the cache.
        given: Names of the options that were given; of others, the cache's own stay. Signals are added.
        processes: On this machine, as of `extract_with_processes`; None: this one.

    Raises:
        DistillError: With the remedy, if records cannot stay or the new cache cannot be made; the cache is as it was.
        OSError: If the folder beside it cannot be written.
    """
    cache = Path(config.cache)
    base = cache.resolve()  # its neighbours are those of the folder that a link leads to
    refuse_place(base)
    busy = "another command builds, extends or copies this cache; wait for its end, then run the same command again"
    with hold_folder(base, busy=busy):
        plan, manifest = plan_of(cache), read_manifest(cache)
        refuse_others_files(base, plan, manifest)
        _clean(base)
        _refuse_taken(version_folder(base, BEFORE, manifest), base)
        refuse_unwritable(base.parent, sealed_too=True)
        options = with_options_of(config, cache, plan, manifest, given=given)
        new = version_folder(base, EXTENDING, manifest)
        check_room(new, manifest.totals["bytes"] - folder_bytes(new), "then run the same command again")
        options, whole = replace(options, cache=str(new)), options.as_build(cache)
        _drop_refused(new)
        try:
            summary = extract(options) if processes is None else extract_with_processes(options, processes)
        except NothingToAddError:
            return _with_options(Extension(cache=cache), whole, plan)
        finally:
            _drop_refused(new)
        made = read_manifest(new)
        if made.hash == manifest.hash:  # all that failed failed again
            _discard(new)
            return _with_options(Extension(cache=cache, summary=replace(summary, cache=cache)), whole, plan)
        with hold_folder(new, busy=busy):
            before = _take_place(base, new)
    now = plan_of(base)
    signals = {name: settings for name, settings in now.signals.items() if settings != plan.signals.get(name)}
    found = Extension(
        cache=cache,
        summary=replace(summary, cache=cache),
        before=before,
        signals=tuple(sorted(signals)),
        samples=made.totals["samples"] - manifest.totals["samples"],
    )
    return _with_options(found, whole, now)


def _with_options(extension: Extension, options: BuildConfig, plan: Plan) -> Extension:
    """With the options of a build that finds the cache complete, if there are any, and what of those given it does not have."""
    notes = unrecorded(options, plan)
    unnamed = unnamed_signals(options, plan)
    if unnamed and DERIVED not in plan.extra:
        notes.append(f"there is no file of options to build it with: none gives the settings of {', '.join(unnamed)}")
    whole = None if unnamed or DERIVED in plan.extra else replace(options, **stated(plan))
    return replace(extension, options=whole, notes=tuple(notes))


def _drop_refused(new: Path) -> None:
    """Remove what a run left that was refused before its first shard: nobody would go on with it."""
    if stored_plan(new) is None or (new / MANIFEST).exists() or has_shard_files(new):
        return
    with contextlib.suppress(ConfigError, OSError):  # with files of somebody else
        check_cache_folder(new, overwrite=True)
        _discard(new)


def _take_place(base: Path, new: Path) -> Path:
    """Give a sealed cache the name of the one that it was made of; returns where that one is then."""
    old = read_manifest(base)
    before = version_folder(base, BEFORE, old)
    if version_folder(base, EXTENDING, old) != new:
        raise CacheMismatchError(f"{base}: was built anew meanwhile; delete {new}, then run the same command again")
    try:
        exchange_folders(new, base)
    except OSError as error:
        aside = quoted(before)
        raise ConfigError(
            f"{base}: its disk cannot exchange two folders in one step ({error.strerror}). The new cache is finished and lies "
            f"in {new}; when nobody reads the old one, run: mv {quoted(base)} {aside} && mv {quoted(new)} {quoted(base)}"
        ) from error
    _rename(new, before, base)
    for folder in _beside(base, BEFORE):
        if folder != before and _is_before(folder, base):
            _discard(folder)
    return before


def _clean(base: Path) -> None:
    """Finish what a killed run left: give what the cache was before its name, and remove what was being removed."""
    for folder in _beside(base, EXTENDING):
        with contextlib.suppress(CacheFormatError):  # unfinished
            found = read_manifest(folder)
            if version_folder(base, EXTENDING, found) == folder:
                _rename(folder, version_folder(base, BEFORE, found), base)
    for kind in (BEFORE, EXTENDING):
        clean_stale(base.parent, f"{base.name}{MARK}{kind}-")


def _rename(folder: Path, before: Path, base: Path) -> None:
    _refuse_taken(before, base)
    if before.exists():  # of somebody who took that version back
        _discard(before)
    folder.rename(before)


def _is_before(folder: Path, base: Path) -> bool:
    """Whether a folder is what its name says: the cache as it was, sealed, and nothing of anybody else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        manifest = read_manifest(folder)
        refuse_others_files(folder, read_plan(folder), manifest)
    except DistillError:
        return False
    return version_folder(base, BEFORE, manifest) == folder


def _refuse_taken(before: Path, base: Path) -> None:
    """Refuse to put a version where somebody else keeps something."""
    if os.path.lexists(before) and not _is_before(before, base):
        raise ConfigError(
            f"{before}: is in the place of what {base} was before, and is not only that; move it elsewhere, then run the same "
            "command again"
        )


def _discard(folder: Path) -> None:
    """Remove a folder that nobody is to find half of."""
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    folder.rename(aside)
    remove(aside)


def _beside(base: Path, kind: str) -> list[Path]:
    """Folders beside a cache that may be versions of it, by their names."""
    start = f"{base.name}{MARK}{kind}-"
    return [path for path in sorted(base.parent.iterdir()) if path.name.startswith(start) and not path.is_symlink()]
