"""Versions of the libraries that are installed; nothing is imported for it."""

from collections.abc import Iterable
from importlib import metadata


def installed_versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed, by name."""
    found = {}
    for name in libraries:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
