"""A student's folder as a model repository of the Hugging Face Hub: one commit, checked on arrival.

The commit is atomic, large files travel before it and are found there again by a push that was killed, and each try looks
first at what is there: so a push can be repeated at any time, and one that lost its answer ends well.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.files.hashing import file_digests, sha256_hex
from vlm_distill_cache.common.hub import CARD, HubName
from vlm_distill_cache.common.printing import SURROGATE, holds_token, one_line
from vlm_distill_cache.common.remotes.hub import NO_ACCESS, at_hub, refuse_offline, settle_transfer, sorted_hub_errors
from vlm_distill_cache.common.remotes.streams import Retries, said
from vlm_distill_cache.stage2_student.final_folder import (
    FINAL,
    IS_READ,
    PROVENANCE,
    own_file,
    read_final,
    without_provenance,
)
from vlm_distill_cache.stage2_student.scores.card import SCORES, card_text, is_unedited, read_card, stored_scores

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_SHOWN = 10  # names in an error
_MOST_TEXT = 1 << 26  # bytes; what is larger holds weights
MAIN = "main"
# What git takes for no branch (git-check-ref-format(1)), or for something else than one.
_NO_BRANCH = re.compile(
    r"@|HEAD|[0-9a-f]{40}|(?:refs/|[-/]).*|.*(?:[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]|\.\.|@\{|//|[./]$|\.lock(?:/|$)).*"
    r"|(?:.*/)?\..*|(?:.*/)?[^/]{201,}(?:/.*)?",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class StudentPush:
    """What a push does, or did.

    Attributes:
        place: Repository and branch.
        exists: Whether repository and branch were there.
        private: Whether it is private, or will be.
        new, changed, same: Names of this student's files, with their bytes: not there yet, another one there, there already.
        foreign: Files of another model there, which are removed.
        pushed: Whether anything was sent.
    """

    place: HubName
    exists: bool
    private: bool
    new: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    pushed: bool = False

    @property
    def is_there(self) -> bool:
        """Whether nothing is left to do."""
        return self.exists and not (self.new or self.changed or self.foreign)


class _There(NamedTuple):
    """What a repository holds.

    Attributes:
        head: Newest commit of the branch, or of the main one where the branch is not there yet; empty if there is none.
        branch: Whether the branch is there.
        own: Whether the branch has commits that no other has, so that somebody could miss what is replaced.
    """

    private: bool
    head: str
    branch: bool
    own: bool
    files: Mapping[str, Any]  # by name: huggingface_hub's RepoFile


def student_folder(given: Path, which: str | None) -> Path:
    """The folder to push of what somebody gave: a run, a training, a ``final`` folder or an export.

    Args:
        which: The student of a run; None: the distilled one.

    Raises:
        ModelError: If there is no student in it.
    """
    if (given / PROVENANCE).is_file():
        if which is not None:
            raise ConfigError(f"--which {which}: {given} is one student, not a run; leave the option out")
        return given
    parts: tuple[str, ...] = (f"{which or 'distilled'}/{FINAL}", *(() if which else (FINAL,)))
    for part in parts:
        if (given / part / PROVENANCE).is_file():
            return given / part
    if (given / "config.json").is_file():
        raise ModelError(f"{given}: {without_provenance(given)}")
    raise ModelError(
        f"{given}: no student there: neither {PROVENANCE} nor {' nor '.join(f'{part}/{PROVENANCE}' for part in parts)}; give "
        "the folder of a finished run or training, a `final` folder or an export. If it was not finished, run its command again"
    )


def push_student(
    folder: Path,
    place: HubName,
    *,
    public: bool = False,
    overwrite: bool = False,
    message: str = "Push a student of vlm-distill-cache",
    dry_run: bool = False,
    attempts: int = 5,
) -> StudentPush:
    """Bring a student's folder to a model repository of the hub; called again, it goes on where it stopped.

    Args:
        folder: As `student_folder` gives it.
        place: Repository; its revision is a branch, made from the main one if it is not there; empty: the main one.
        public: Make a new repository public, and push to a public one. An existing one stays what it is.
        overwrite: Replace what is there of another model.
        dry_run: Only look; a refusal is raised all the same.
        attempts: How often to try what may pass.

    Raises:
        ModelError: If the folder is no student or damaged, or another model is there.
        ConfigError: If the repository is public and ``public`` is not given, the hub is switched off, the revision is no
            branch's name, or a file or the message holds a token of the hub.
        TransferError: If the hub refuses, cannot be reached, or holds something else afterwards.
    """
    place = HubName(place.repository, place.revision or MAIN)
    if _NO_BRANCH.fullmatch(place.revision):
        raise ConfigError(
            f"--revision {one_line(place.revision)!r} is no branch's name; expected one as git takes it, of at most 200 "
            "characters: letters, digits, - and _, with . and / inside, as in v1 or tests/long; no commit, no refs/..."
        )
    if holds_token(message):
        raise ConfigError(
            "--message: holds a token of the hub, which whoever reads the repository could use; leave it out"
        )
    refuse_offline(str(place), "copy the folder")
    push = _Push(folder, place, read_final(folder), public=public, overwrite=overwrite)

    def attempt() -> StudentPush:
        from huggingface_hub import HfApi

        with sorted_hub_errors(str(place), NO_ACCESS):
            return push.run(HfApi(library_name="vlm-distill-cache"), message, dry_run=dry_run)

    return at_hub(Retries(attempts=attempts, timeout=30.0)).run(str(place), attempt)


class _Push:
    def __init__(
        self, folder: Path, place: HubName, provenance: Mapping[str, Any], *, public: bool, overwrite: bool
    ) -> None:
        self.folder, self.place, self.public, self.overwrite = folder, place, public, overwrite
        self.files = _files_of(folder, provenance, place)
        self._digests: dict[tuple[str, bool], str] = {}

    def run(self, api: HfApi, message: str, *, dry_run: bool) -> StudentPush:
        """Look, compare, refuse, commit, and look again."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self._look(api)
        found = self._compare(api, there)
        if there is not None and not there.private and not self.public and not found.is_there:
            raise ConfigError(
                f"{self.place.repository} is public: everybody could read the student; add --public if that is meant, else push "
                "to another name"
            )
        if dry_run or found.is_there:
            return found
        if there is None:
            api.create_repo(self.place.repository, private=not self.public, repo_type="model")
            there = self._look(api)
            if there is None or (not there.private and not self.public):
                raise TransferError(
                    f"{self.place.repository}: the hub did not make the private repository that was asked for; nothing was pushed. "
                    "Look at its settings on the hub"
                )
            found = self._compare(api, there)
        if not there.branch:
            api.create_branch(self.place.repository, branch=self.place.revision, exist_ok=True)
        operations: list[Any] = [CommitOperationDelete(name) for name in found.foreign]
        operations += [CommitOperationAdd(name, self.files[name]) for name in (*found.new, *found.changed)]
        if operations:
            self._commit(api, operations, message, parent=there.head)
        arrived = self._compare(api, self._look(api), arrived=True)
        if not arrived.is_there:
            wrong = _listed([*arrived.new, *arrived.changed, *arrived.foreign])
            raise TransferError(f"{self.place}: did not arrive as it was sent: {wrong}; {AGAIN}")
        return replace(found, pushed=True)

    def _commit(self, api: HfApi, operations: list[Any], message: str, *, parent: str) -> None:
        settle_transfer(self.place.repository, kind="model", revision=self.place.revision)
        try:
            api.create_commit(
                self.place.repository,
                operations,
                commit_message=message,
                revision=self.place.revision,
                parent_commit=parent or None,  # nobody who commits meanwhile is overwritten unseen
            )
        except ValueError as error:
            if CARD not in str(error):
                raise
            raise ConfigError(
                f"{self.folder / CARD}: the hub refuses it: {said(error)}; correct the lines between `---` at its head, or "
                "delete it for a new card"
            ) from error

    def _look(self, api: HfApi) -> _There | None:
        """What is there now; None: no such repository, as far as we are let know."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        name, branch = self.place
        try:
            info = api.model_info(name)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        head, is_branch = info.sha, True
        if branch != MAIN:
            try:
                head = api.model_info(name, revision=branch).sha
            except RevisionNotFoundError:
                is_branch = False
        listed = api.list_repo_tree(name, recursive=True, revision=head) if head else ()
        return _There(
            private=bool(info.private),
            head=head or "",
            branch=is_branch,
            own=branch == MAIN or (is_branch and head != info.sha),
            files={entry.path: entry for entry in listed if isinstance(entry, RepoFile)},
        )

    def _compare(self, api: HfApi, there: _There | None, *, arrived: bool = False) -> StudentPush:
        """What is to be sent and removed.

        Raises:
            ModelError: If files of another model would be replaced or removed, and may not be.
        """
        sizes = {name: _size(content) for name, content in self.files.items()}
        if there is None:
            return StudentPush(place=self.place, exists=False, private=not self.public, new=sizes)
        same = {name: size for name, size in sizes.items() if self._is_same(name, there)}
        changed = {name: size for name, size in sizes.items() if name in there.files and name not in same}
        foreign = tuple(name for name in there.files if name not in sizes and IS_READ.fullmatch(name))
        found = StudentPush(
            place=self.place,
            exists=there.branch,
            private=there.private,
            new={name: size for name, size in sizes.items() if name not in there.files},
            changed=changed,
            same=same,
            foreign=foreign,
        )
        # Of this very student: its scores, and a card that nobody has edited.
        ours = {SCORES} if PROVENANCE in same else set()
        theirs = [name for name in (*changed, *foreign) if name not in ours and not self._is_old_card(api, name, there)]
        if theirs and there.own and not (self.overwrite or arrived):
            raise ModelError(
                f"{self.place}: holds another model, or files that were edited there: {_listed(theirs)}; push to another name or "
                "--revision, or replace them with --overwrite (--dry-run then shows what goes)"
            )
        return found

    def _is_same(self, name: str, there: _There) -> bool:
        entry = there.files.get(name)
        if entry is None or entry.size != _size(self.files[name]):
            return False
        large = entry.lfs is not None
        if (name, large) not in self._digests:
            self._digests[name, large] = _digest(self.files[name], as_blob=not large)
        return bool(self._digests[name, large] == (entry.lfs.sha256 if large else entry.blob_id))

    def _is_old_card(self, api: HfApi, name: str, there: _There) -> bool:
        if name != CARD or name not in there.files:
            return False
        there_now = api.hf_hub_download(self.place.repository, CARD, revision=there.head)
        return is_unedited(read_card(Path(there_now)) or "")


def _files_of(folder: Path, provenance: Mapping[str, Any], place: HubName) -> dict[str, Path | bytes]:
    """What of a folder is pushed, by name: what it lists, what it says of itself, licences, scores and card; nothing else."""
    listed = provenance.get("files") or {}
    names = list(listed or (path.name for path in folder.iterdir() if IS_READ.fullmatch(path.name)))
    names += [path.name for pattern in _LICENCE_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    names += [PROVENANCE]
    try:
        names += [] if stored_scores(folder) is None else [SCORES]
    except CacheFormatError as error:
        raise ModelError(
            f"{str(error).partition(';')[0]}; score the student again (`distill evaluate FOLDER --card`), or delete that file"
        ) from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder}: lacks {_listed(missing)}, as copies out of the hub's cache do; push the folder that was trained or exported"
        )
    files: dict[str, Path | bytes] = {
        # What is listed was compared with its digest, wherever it lies.
        name: Path(os.path.realpath(folder / name)) if name in listed else own_file(folder / name)
        for name in sorted(set(names))
    }
    card = read_card(folder / CARD)
    if card is not None and SURROGATE.search(card):
        raise ModelError(
            f"{folder / CARD}: not UTF-8, which the hub wants; save it as UTF-8, or delete it for a new card"
        )
    if card is None or is_unedited(card):  # with the name under which it is loaded from there
        card = card_text(
            folder, provenance, place=HubName(place.repository, "" if place.revision == MAIN else place.revision)
        )
    files[CARD] = card.encode()
    for name, content in files.items():
        if _size(content) <= _MOST_TEXT:
            data = content if isinstance(content, bytes) else content.read_bytes()
            if holds_token(data.decode(errors="replace")):
                raise ConfigError(
                    f"{folder / name}: holds a token of the hub, which whoever reads the repository could use; take it out, and "
                    "make a new token on the hub if others have seen this one"
                )
    return files


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(content: Path | bytes, *, as_blob: bool) -> str:
    """What the hub names a file by: git's sha1 of a blob, or the sha256 of a large file."""
    if not as_blob:
        return sha256_hex(content) if isinstance(content, bytes) else file_digests(content)[1]
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, limit=80) for name in sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
