"""Versions of the libraries that are installed; nothing is imported for it."""

from collections.abc import Iterable


def installed_versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed, by name."""
    from importlib import metadata

    found = {}
    for name in libraries:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
