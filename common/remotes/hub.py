"""Caches as data sets on the Hugging Face Hub.

Reading is plain ranged HTTP on the hub's own addresses. Writing is one commit per some shards: a commit is
atomic, and a hub accepts few of them an hour. A repository that does not exist yet is created private: to show
a teacher's outputs to everybody is a decision that its licence has a say in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, DistillError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.common.remotes.http import MAY_PASS, WebRemote, retry_after
from vlm_distill_cache.common.remotes.streams import PassingError, Retries, said

_T = TypeVar("_T")
_LOCATION = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/@]+))?(?:/(.+?))?/?")
_MOST_PATHS = 500
NO_ACCESS = "it does not exist, or you have no access: log in with `hf auth login` or set HF_TOKEN"

_WRONG = "the same request would be refused again: correct what the hub names, or try another repository"
_NOT_THERE = "the hub does not do this: see that HF_ENDPOINT names a hub, and that huggingface_hub is up to date (pip install -U)"
# What to do about answers that come again if the same is sent again.
_REMEDIES = {
    **dict.fromkeys((400, 422), _WRONG),
    413: "the hub takes nothing as large as this: ask whoever runs it to allow more",
    507: "the account has no room left on the hub: delete what is not needed there, or use an account with more room",
    **dict.fromkeys((405, 411, 416, 418, 501), _NOT_THERE),
}


class HubRemote(WebRemote):
    """A folder in a data set repository, ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]``.

    A revision with slashes is percent-encoded.
    """

    upload_files = 500
    upload_jobs = 1
    advised_files = 100_000  # https://huggingface.co/docs/hub/repositories-recommendations
    commits = True
    no_access = NO_ACCESS

    def __init__(self, location: str, retries: Retries) -> None:
        from huggingface_hub import constants

        found = _LOCATION.fullmatch(location)
        if found is None or ".." in (found[3] or "").split("/"):
            raise ConfigError(f"{location}: expected hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        refuse_offline(location, "use a folder")
        super().__init__(location.rstrip("/"), at_hub(retries))
        self._repository, self._revision = found[1], unquote(found[2] or constants.DEFAULT_REVISION)
        self._prefix = f"{found[3]}/" if found[3] else ""
        self._created = False
        self._holding = False
        self._parent: str | None = None  # our last commit

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self._repository, self._prefix + name, repo_type="dataset", revision=self._revision))

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return dict(build_hf_headers(library_name="vlm-distill-cache"))

    @contextmanager
    def hold(self) -> Iterator[Callable[[], object]]:
        """Let each commit but the first follow upon ours alone; see ``Remote``."""
        self._holding, self._parent = True, None
        try:
            yield lambda: None
        finally:
            self._holding = False

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy files here in one commit, which is visible whole or not at all; see ``Remote``."""
        self._commit(files, "Add a part of a teacher cache")
        if on_bytes is not None:
            on_bytes(sum(source.stat().st_size for source in files.values()))

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file, or return False; see ``Remote``."""
        self._create_repository()
        if self.size(name) is not None:
            return False
        self._commit({name: data}, "Add a part of a teacher cache")
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Remove files in one commit; see ``Remote``."""
        paths = [self._prefix + name for name in names]
        for start in range(0, len(paths), _MOST_PATHS):
            found = self._ask(partial(self._find, paths[start : start + _MOST_PATHS]))
            self._commit({entry.path.removeprefix(self._prefix): None for entry in found}, "Remove a teacher cache")

    def _find(self, paths: list[str], api: Any) -> Any:
        return api.get_paths_info(self._repository, paths, repo_type="dataset", revision=self._revision)

    def _create_repository(self) -> None:
        from huggingface_hub import constants

        if self._created:
            return
        self._ask(lambda api: api.create_repo(self._repository, repo_type="dataset", private=True, exist_ok=True))
        if (branch := self._revision) != constants.DEFAULT_REVISION:
            self._ask(
                lambda api: api.create_branch(self._repository, branch=branch, repo_type="dataset", exist_ok=True)
            )
        self._ask(lambda api: settle_transfer(self._repository, kind="dataset", revision=self._revision))
        self._created = True

    def _commit(self, files: Mapping[str, Path | bytes | None], message: str) -> None:
        """Commit files to write, and, where there is nothing to write, files to delete."""
        if not files:
            return
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self._create_repository()

        def commit(api: Any) -> None:
            operations: list[Any] = [  # anew for every try: the library marks in them what it has sent
                CommitOperationDelete(self._prefix + name)
                if source is None
                else CommitOperationAdd(self._prefix + name, source)
                for name, source in files.items()
            ]
            made = api.create_commit(
                self._repository,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=self._revision,
                parent_commit=self._parent if self._holding else None,
            )
            self._parent = str(made.oid)

        self._ask(commit)

    def _ask(self, action: Callable[[Any], _T]) -> _T:
        """Call the hub's API, and sort its errors into transient and permanent."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        def attempt() -> _T:
            with sorted_hub_errors(self.location, self.no_access):
                try:
                    return action(HfApi())
                except HfHubHTTPError as error:
                    if error.response.status_code != 412 or not self._holding or self._parent is None:
                        raise
                    raise CacheMismatchError(
                        f"{self.location}: was changed by another push meanwhile (or the hub's answer to a commit of "
                        f"this one was lost); see that no other push is at work there, then {AGAIN}"
                    ) from error

        return self._retries.run(self.location, attempt)


def at_hub(retries: Retries) -> Retries:
    """The same patience; what to do after the last try names the hub that was asked."""
    from huggingface_hub import constants

    return replace(retries, remedy=f"check the network and the hub's address ({constants.ENDPOINT}), then {AGAIN}")


def refuse_offline(where: str, otherwise: str) -> None:
    """Raise a ConfigError where the hub is switched off."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{where}: the hub is switched off by HF_HUB_OFFLINE=1; unset it, or {otherwise}")


def settle_transfer(repository: str, *, kind: str, revision: str) -> None:
    """Switch Xet off for this process where a hub of one's own (``HF_ENDPOINT``) has none.

    The library takes it that every hub has, and waits for it for ever.

    Args:
        kind: Of the repository: ``model`` or ``dataset``.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if constants.HF_HUB_DISABLE_XET or constants.ENDPOINT.endswith(("//huggingface.co", ".huggingface.co")):
        return
    place = f"{constants.ENDPOINT}/api/{kind}s/{repository}/xet-write-token/{quote(revision, safe='')}"
    answer = get_session().get(place, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if answer.status_code != 404:
        hf_raise_for_status(answer)
    constants.HF_HUB_DISABLE_XET = constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT not in answer.headers


@contextmanager
def sorted_hub_errors(where: str, no_access: str) -> Iterator[None]:
    """Sort the client library's errors into transient and permanent.

    Args:
        where: Of the repository, for the error.
        no_access: What to do about one that cannot be written.

    Raises:
        PassingError: For what may pass.
        TransferError: For what will not, with the remedy.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except DistillError:
        raise
    except HfHubHTTPError as error:
        raise _sorted_answer(error, where, no_access) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise PassingError(said(error)) from error
    except (JSONDecodeError, LookupError, TypeError) as error:  # the library expects whole answers
        raise PassingError(f"an answer that makes no sense ({type(error).__name__})") from error
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: the token for the hub holds characters that no token has; set HF_TOKEN again, or log in again with "
            "`hf auth login`"
        ) from error
    except (RuntimeError, ValueError) as error:
        # The library's words for a large file that did not go, and for a card it cannot read.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _sorted_answer(error.__cause__, where, no_access) from error
        cause = f" ({said(error.__cause__)})" if error.__cause__ is not None else ""
        raise TransferError(f"{where}: {said(error)}{cause}; {AGAIN}") from error


def _sorted_answer(error: Any, where: str, no_access: str) -> Exception:
    """What to raise for an answer of the hub that is an error: what may pass, or what will not, with the remedy."""
    status = error.response.status_code
    if status in (*MAY_PASS, 409, 412):  # the last two: somebody else committed at the same time
        return PassingError(said(error), retry_after=retry_after(error.response.headers.get("Retry-After", "")))
    if status in (401, 403, 404):  # the library says the same in a page
        told = " ".join(str(error.server_message or "").split())
        answer = f"the hub answers {status}{f', {brief(told, limit=120)}' if told else ''}"
        return TransferError(f"{where}: {answer}; {no_access}, with the right to write")
    return TransferError(f"{where}: {said(error)}; {_REMEDIES.get(status, AGAIN)}")
