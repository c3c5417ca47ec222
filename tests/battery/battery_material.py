"""What the battery damages, stops and feeds: caches and runs, made once without disturbance, and what they must come to again."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.battery.battery_cases import Failed
from tests.battery.battery_process import Said, call, run

DATA = "shapes:images=4,seed=5"
SIGNALS = "logits,answer_attention,text_attention,visual_columns,visual_map,hidden"
SIGNALS_OF_KILLS = "logits,answer_attention"
_BUILD = {"batch_size": 2, "shard_size": 3, "fidelity_samples": 1, "limit": 8, "threads": 1}
_SCORES = {"limit": 1, "letters": "false", "agreement_samples": 2, "overlays": 1}
_TRAIN = {
    "phases": "[dft]", "dft.steps": 3, "dft.batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 2, "device": "cpu",
    "num_workers": 0, **{f"evaluation.{name}": value for name, value in _SCORES.items()},
}  # fmt: skip
_TIMES = ("step_s", "samples_per_s", "data_wait")
# Times, names of folders, and a card's losses out of a log that may lose lines.
_NOT_COMPARED = ("run.json", "config.yaml", "report.html", "README.md")
WARM = ("moto.server", "boto3", "PIL.Image", "safetensors.torch", "tests.common.servers")


def options(values: dict[str, object]) -> list[str]:
    """As ``--set`` takes them."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def build(cache: Path, *, store: str, signals: str = SIGNALS, data: str = DATA) -> list[str]:
    """The command that builds a cache with the built-in teacher."""
    given = ["--data", data, "--cache", str(cache), "--store", store, "--signals", signals]
    return ["teacher-cache", "build", *given, *options(_BUILD)]


def train(verb: str, cache: Path | str, output: Path, **changes: object) -> list[str]:
    """``distill train`` or ``distill run`` of the smallest student."""
    given = ["--student", "mobilevlm-tiny", "--data", DATA, "--cache", str(cache), "--output", str(output)]
    return ["distill", verb, *given, *options({**_TRAIN, **changes})]


def tree(root: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path; folders end in a slash."""
    found = sorted(root.rglob("*"))
    return {
        f"{path.relative_to(root).as_posix()}{'/' * path.is_dir()}": path.read_bytes() if path.is_file() else b""
        for path in found
    }


def left_by_training(output: Path) -> dict[str, object]:
    """What a run or a training leaves, without times and names of folders; of checkpoints and curves, that they are there."""
    found: dict[str, object] = {}
    for name, content in tree(output).items():
        last = name.rpartition("/")[2]
        if "tensorboard" in name or name.endswith("/"):
            continue
        if last == "log.jsonl":
            found[name] = log_of(content)
        elif last == "distillation.json":
            described = json_of(content)
            found[name] = {key: described[key] for key in ("fingerprint", "caches", "encoder") if key in described}
        elif "checkpoints" in name or last in _NOT_COMPARED:
            found[name] = None
        else:
            found[name] = content
    return found


def json_of(content: bytes) -> dict[str, object]:
    """The object that a file or line holds; nothing if it holds none."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def log_of(content: bytes) -> list[dict[str, object]]:
    """The lines of a log, without times."""
    lines = [json_of(line) for line in content.splitlines()]
    return [{key: line[key] for key in line if key not in _TIMES} for line in lines]


def weights_of(output: Path) -> dict[str, bytes]:
    """The weights below a folder, by relative path."""
    return {name: data for name, data in tree(output).items() if name.endswith("final/model.safetensors")}


def refuse_differences(found: dict[str, object], expected: dict[str, object], what: str) -> None:
    """Fail where two trees differ, naming files."""
    if found != expected:
        lost, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        other = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
        raise Failed(f"{what}: lost {lost[:5]}, more {more[:5]}, different {other[:5]}")


@dataclass(frozen=True, kw_only=True)
class Material:
    """Made without disturbance.

    Attributes:
        caches: By name, see `CACHES`.
        finished: A run that is done.
        stopped: The same run, its distilled student's last step and all behind it undone.
        trained: The output of ``distill train`` from each cache.
        seconds: Of the undisturbed commands, by name.
    """

    folder: Path
    caches: dict[str, Path]
    finished: Path
    stopped: Path
    trained: dict[str, Path]
    seconds: dict[str, float] = field(default_factory=dict)


CACHES = {
    "zarr": {"store": "zarr", "signals": SIGNALS_OF_KILLS},
    "webdataset": {"store": "webdataset", "signals": SIGNALS_OF_KILLS},
    "rich": {"store": "webdataset", "signals": SIGNALS},
}


def make_material(folder: Path) -> Material:
    """Make caches and runs in forks of this process, then import here what they imported.

    Raises:
        Failed: If a command of this project fails undisturbed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = Material(
        folder=folder,
        caches={name: folder / "caches" / name for name in CACHES},
        finished=folder / "finished",
        stopped=folder / "stopped",
        trained={name: folder / "trained" / name for name in CACHES},
    )
    seconds, logs = made.seconds, folder / "logs"

    def done(name: str, said: Said) -> None:
        if said.code or said.left:
            raise Failed(f"{name}, undisturbed, ended with {said.code}, leaving {said.left}: {said.text[-3000:]}")
        seconds[name] = said.seconds

    listed = folder / "modules.txt"
    for name, how in CACHES.items():
        done(
            f"build {name}", run(build(made.caches[name], **how), logs / "build", before=lambda: _list_modules(listed))
        )
        warm(listed)
    done(
        "run", run(train("run", made.caches["zarr"], made.finished), logs / "run", before=lambda: _list_modules(listed))
    )
    warm(listed)
    for name, cache in made.caches.items():
        done(f"train {name}", run(train("train", cache, made.trained[name]), logs / "train"))
    # Again, now that nothing is left to import: how long a kill may wait.
    done("build zarr", run(build(folder / "again-zarr", **CACHES["zarr"]), logs / "build"))
    done("run", run(train("run", made.caches["zarr"], folder / "again-run"), logs / "run"))
    refuse_differences(tree(folder / "again-zarr"), tree(made.caches["zarr"]), "an undisturbed build, repeated")
    refuse_differences(
        left_by_training(folder / "again-run"), left_by_training(made.finished), "an undisturbed run, repeated"
    )
    stop(made.finished, made.stopped)
    return made


def stop(finished: Path, stopped: Path) -> None:
    """A run as it is when it is killed before the last step of its distilled student."""
    shutil.copytree(finished, stopped)
    for name in ("report.html", "table.txt", "evaluation.json", "distilled/evaluation.json"):
        (stopped / name).unlink()
    shutil.rmtree(stopped / "distilled" / "final")
    last = sorted((stopped / "distilled" / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)


def _list_modules(path: Path) -> None:
    """At the end of this process, write what it has imported."""
    import atexit

    atexit.register(lambda: path.write_text("\n".join(sorted(sys.modules))))


def warm(listed: Path) -> None:
    """Import what another process has imported, so that forks of this one need not."""
    for name in [*listed.read_text().split("\n"), *WARM]:
        if name not in sys.modules and not name.startswith(("__", "tests.battery", "six.")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def craft(function, log: Path) -> None:
    """Run a function that makes something hostile out of a copy, in a process of its own.

    Raises:
        Failed: If it fails: nothing was tried.
    """
    said = call(function, log)
    if said.code:
        raise Failed(f"could not be made: {said.text[-800:]}")
