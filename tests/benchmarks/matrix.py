"""``make matrix``: the tests that touch other people's libraries, with the oldest and the newest that pyproject.toml allows.

Each end gets a virtual environment below ``build/matrix`` (about 6 GB where pip finds no CPU build of torch): the oldest by
uv's lowest-direct resolution, the newest as pip finds it. What ran with which versions goes to ``results/matrix.json``.

    python -m tests.benchmarks.matrix [oldest] [newest]
"""

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "matrix"
RESULTS = Path(__file__).parent / "results" / "matrix.json"
ENDS = ("oldest", "newest")
FILES = (
    "tests/common/cache/test_cache.py",  # zarr, numcodecs, numpy, xxhash
    "tests/common/test_hub.py",  # huggingface_hub
    "tests/common/remotes/test_s3_refusals.py",  # boto3
    "tests/data/text/test_sentencepiece_model.py",  # sentencepiece, protobuf
    "tests/data/text/test_builtin_processor.py",  # tokenizers, pillow
    "tests/data/images/test_video.py",  # av
    "tests/data/sources/test_hf.py",  # datasets, pyarrow
    "tests/data/sources/test_patterns.py",  # webdataset
    "tests/data/families/test_family_models.py",  # transformers
    "tests/stage1_teacher/teacher/test_families.py",
    "tests/stage1_teacher/teacher/test_quantised_teachers.py",  # bitsandbytes
    "tests/stage2_student/students/test_library_student.py",  # safetensors
    "tests/stage2_student/training/test_lora.py",  # peft
    "tests/stage2_student/training/test_trainer_mixin.py",  # the Trainer, trl
    "tests/stage2_student/exports/test_student_elsewhere.py",  # from_pretrained, pipelines, chat templates
    "tests/stage2_student/training/test_checkpoint.py",  # accelerate, tensorboard
)


def project() -> dict:
    """The table of pyproject.toml that says what is asked for."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[str]:
    """All of them, extras included."""
    found = project()
    return [*found["dependencies"], *(line for lines in found["optional-dependencies"].values() for line in lines)]


def plain(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name.strip())[0]).lower()


def bounds() -> dict[str, str]:
    """The lower bound of each package that is no tool of the developers."""
    tools = {plain(line) for line in project()["optional-dependencies"]["dev"]}
    found = {plain(line): re.search(r">=([0-9.]+)", line) for line in requirements()}
    return {name: bound[1] for name, bound in found.items() if bound is not None and name not in tools}


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess:
    """Run a command that has to succeed."""
    return subprocess.run([str(word) for word in words], check=True, **options)


def make_environment(end: str) -> Path:
    """Make the environment of an end, unless it is there; returns its Python."""
    python = FOLDER / end / "bin" / "python"
    wanted = FOLDER / f"{end}.txt"
    if not wanted.is_file():
        run(sys.executable, "-m", "venv", "--clear", FOLDER / end)
        lines = requirements()
        if end == "oldest":
            uv = ROOT / "build" / "tools" / "bin" / "uv"
            # The project's own settings of uv pin torch.
            command = [uv, "--no-config", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--all-extras"]
            command += ["--resolution", "lowest-direct", ROOT / "pyproject.toml"]
            lines = run(*command, capture_output=True, text=True).stdout.splitlines()
        given = FOLDER / f"{end}.asked"
        given.write_text("\n".join(lines))
        run(python, "-m", "pip", "install", "--quiet", "-r", given)
        listed = run(python, "-m", "pip", "list", "--format=freeze", capture_output=True, text=True).stdout
        wanted.write_text(listed)
    library = sysconfig.get_path("purelib", vars={"base": str(FOLDER / end), "platbase": str(FOLDER / end)})
    (Path(library) / "checkout.pth").write_text(f"{ROOT / 'src'}\n")
    return python


def measure(end: str) -> dict:
    """Run the tests of an end; what ran, with which versions, on what."""
    python, report = make_environment(end), FOLDER / f"{end}.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *FILES]
    subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    versions = dict(line.split("==") for line in (FOLDER / f"{end}.txt").read_text().splitlines() if "==" in line)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "files": list(FILES),
        "versions": {plain(name): version for name, version in sorted(versions.items()) if plain(name) in bounds()},
        **count(report),
    }


def count(report: Path) -> dict:
    """Results of a run of pytest: how many tests passed, the names of those that did not, why some were skipped."""
    passed, failed, skipped = 0, [], Counter()
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        if kinds.keys() & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped[kinds["skipped"].get("message", "")] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": sorted(failed), "skipped": dict(sorted(skipped.items()))}


def table(results: dict) -> str:
    """The results as a table of Markdown."""
    ends = [end for end in ENDS if end in results]
    lines = [f"| library | {' | '.join(ends)} |", f"|---|{'---|' * len(ends)}"]
    names = sorted({name for end in ends for name in results[end]["versions"]})
    rows = [("Python", "python"), *((name, "") for name in names)]
    for name, key in rows:
        cells = [results[end][key] if key else results[end]["versions"].get(name, "") for end in ends]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    verdict = [f"{results[end]['passed']} passed, {len(results[end]['failed'])} failed" for end in ends]
    return "\n".join([*lines, f"| tests | {' | '.join(verdict)} |"]) + "\n"


def main() -> None:
    """Run the ends that are named, or both; ends with 1 if a test failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    results: dict = {}
    for end in sys.argv[1:] or ENDS:
        found = measure(end)
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[end] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    sys.exit(any(results[end]["failed"] for end in results))


if __name__ == "__main__":
    main()
