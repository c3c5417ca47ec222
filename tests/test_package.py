"""What is installed: one package with everything inside, from a clone, an archive of the sources, or as links to a clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vlm_distill_cache
from vlm_distill_cache.common.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vlm_distill_cache"
SOURCES = ("common", "data", "stage1_teacher", "stage2_student", "src")
COMMANDS = {
    "cachectl": "common.cli",
    "distill": "stage2_student.cli",
    "teacher-cache": "stage1_teacher.cli",
}
BUILD = "import setuptools.build_meta as backend, sys; print('built', getattr(backend, sys.argv[1])(sys.argv[2]))"
HELP = """
import contextlib, runpy, sys
for module in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def python(*arguments: str | Path, cwd: Path, path: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def build(hook: str, source: Path, target: Path) -> Path:
    """Call the build backend as pip does, without its download of the backend."""
    target.mkdir(exist_ok=True)
    name = python("-c", BUILD, hook, target, cwd=source).rpartition("built ")[2].strip()
    return target / name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git holds of the clone, so that nothing is built into the clone itself."""
    folder = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the archive of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(build("build_sdist", source, folder)) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(folder, filter="data")
    unpacked = next(path for path in folder.iterdir() if path.is_dir())
    return build("build_wheel", unpacked, folder / "made")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", folder, wheel)
    python(*install, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def path(installed: Path) -> str:
    """The installed package and its dependencies; with `python -S` nothing that points to a clone is read."""
    libraries = [place for place in sys.path if place.endswith("site-packages")]
    return os.pathsep.join([str(installed), *libraries])


def test_the_clone_and_the_archive_give_the_same_wheel(source: Path, wheel: Path, tmp_path: Path):
    def content(path: Path) -> dict[str, int]:
        with zipfile.ZipFile(path) as archive:
            return {member.filename: member.CRC for member in archive.infolist()}

    assert content(build("build_wheel", source, tmp_path)) == content(wheel)


def test_one_package_is_installed_with_everything_inside(installed: Path):
    found = {entry.name.partition("-")[0] for entry in installed.iterdir() if entry.name != "bin"}
    assert found == {PACKAGE}  # and PACKAGE-VERSION.dist-info
    assert {script.name for script in (installed / "bin").iterdir()} == COMMANDS.keys()
    files = [entry for entry in installed.rglob("*") if not entry.is_dir()]
    assert not [entry for entry in installed.rglob("*") if entry.is_symlink()]
    inside = {str(entry.relative_to(installed / PACKAGE)) for entry in files if PACKAGE in entry.parts}
    for name in SOURCES[:-1]:
        wanted = {
            str(entry.relative_to(ROOT))
            for entry in (ROOT / name).rglob("*")
            if entry.suffix in {".py", ".yaml", ".json", ".safetensors"}
        }
        assert wanted <= inside
    assert {"py.typed", "stage1_teacher/builtin/model.safetensors", "data/builtin/tokenizer.json"} <= inside


def test_an_editable_install_is_one_path(source: Path, tmp_path: Path):
    with zipfile.ZipFile(build("build_editable", source, tmp_path)) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert len(names) == 1
        assert names[0].endswith(".pth")
        assert archive.read(names[0]).decode().strip() == str(source / "src")


def test_commands_start_away_from_the_clone(path: str, tmp_path: Path):
    shown = python("-S", "-c", HELP, *(f"{PACKAGE}.{module}" for module in COMMANDS.values()), cwd=tmp_path, path=path)
    assert shown.count("Usage: ") == len(COMMANDS)


def test_the_demonstration_runs_away_from_the_clone(path: str, installed: Path, tmp_path: Path):
    where = python("-S", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)", cwd=tmp_path, path=path)
    assert Path(where.strip()).is_relative_to(installed)
    data, cache = "shapes:images=6,seed=3", ["--cache", "cache"]
    quick = [f"{phase}.{option}" for phase in ("dpt", "dft", "sft") for option in ("steps=1", "batch_size=4")]
    quick += [f"evaluation.{option}" for option in ("limit=2", "letters=false", "agreement_samples=4", "overlays=1")]
    stages = {
        "teacher-cache": ["build", "--data", data, "--set", "fidelity_samples=2", *cache],
        "distill": ["run", "--output", "run", *cache, *(word for item in quick for word in ("--set", item))],
    }
    for command, words in stages.items():
        python("-S", "-m", f"{PACKAGE}.{COMMANDS[command]}", *words, cwd=tmp_path, path=path)
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_error_without_a_teacher_names_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vlm_distill_cache.stage1_teacher.planning.plan import teacher_directory

    def named() -> str:
        with pytest.raises(ConfigError, match=r"no teacher given for data 'mine\.json'") as error:
            teacher_directory(teacher="", data="mine.json", scratch=tmp_path)
        return re.search(r"\((?:TEACHER=|--teacher )(.*?) is the one", str(error.value))[1]

    monkeypatch.chdir(tmp_path)
    assert Path(named()) == ROOT / "stage1_teacher" / "builtin"
    assert (Path(named()) / "model.safetensors").is_file()
    monkeypatch.chdir(ROOT)
    assert named() == "stage1_teacher/builtin"  # as it stands in the README


def test_a_clone_without_links_says_what_to_do(tmp_path: Path):
    face = tmp_path / PACKAGE / "__init__.py"
    face.parent.mkdir()
    shutil.copy(vlm_distill_cache.__file__, face)
    (face.parent / "common").write_text("../../common")
    ran = subprocess.run([sys.executable, "-c", f"import {PACKAGE}"], cwd=tmp_path, capture_output=True, check=False)
    assert ran.returncode == 1
    assert b"git config core.symlinks true" in ran.stderr
