"""Damage at random places of every kind of file: it is refused, or what comes of it is what came of the whole."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.battery.battery_cases import REFUSED, SAME, Case, Failed, refused
from tests.battery.battery_material import Material, left_by_training, refuse_differences, train, tree, weights_of
from tests.battery.battery_process import run

_PAGE = 4096
_CARD = "README.md"  # prose, which people may edit: no digest covers it
_NO_DIGEST = ("model.safetensors", "distillation.json", _CARD, "scores.json")  # or a case of their own
_LIMIT_S = 60.0
_REPAIRED = ("log.jsonl", "evaluation.json", "table.txt", "report.html")  # of these no damage stops a run
_CACHE_KINDS = {
    "shards": lambda name: name.startswith("shards/") and not name.endswith(".json"),
    "descriptions of shards": lambda name: name.startswith("shards/") and name.endswith(".json"),
    "manifest": lambda name: name == "manifest.json",
    "plan": lambda name: name == "plan.json",
    "index": lambda name: name == "index.bin",
    "projector": lambda name: name.startswith("projector"),
    "vision tower": lambda name: name.startswith("vision_tower"),
    "processor": lambda name: name.startswith("processor/"),
}
_RUN_KINDS = {
    "weights": lambda name: name.endswith("final/model.safetensors"),
    "files of final": lambda name: "final/" in name and not name.endswith(_NO_DIGEST),
    "distillation.json": lambda name: name.endswith("distillation.json"),
    "run.json": lambda name: name == "run.json",
    "config.yaml": lambda name: name.endswith("config.yaml"),
    "evaluation.json": lambda name: name.endswith("evaluation.json"),
    "table.txt": lambda name: name == "table.txt",
    "report.html": lambda name: name == "report.html",
    "log.jsonl": lambda name: name.endswith("log.jsonl"),
    "state.json": lambda name: name.endswith("state.json"),
    "tensors.pt": lambda name: name.endswith("tensors.pt"),
}
Pick = Callable[[str], bool]


def damage(path: Path, rng: random.Random, others: list[Path]) -> str:
    """Change a file; returns what was done to it. Never leaves the same bytes."""
    data = path.read_bytes()
    new: bytes | None = data
    while new == data:
        way = rng.choice(["flip"] * 5 + ["cut", "cut", "lost", "empty", "zero page", "longer", "swap", "repeated page"])
        place, bit = rng.randrange(max(1, len(data))), rng.randrange(8)
        page = place - place % _PAGE
        if way == "flip" and data:
            new = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        elif way == "cut":
            new = data[:place]
        elif way == "lost":
            new = None
        elif way == "empty":
            new = b""
        elif way == "zero page":
            new = data[:page] + bytes(len(data[page : page + _PAGE])) + data[page + _PAGE :]
        elif way == "longer":
            new = data + rng.randbytes(rng.randrange(1, 50))
        elif way == "swap" and others:
            new = rng.choice(others).read_bytes()
        elif way == "repeated page":
            new = data[:page] + data[:_PAGE] + data[page + _PAGE :]
    path.unlink()  # a new inode: mappings of the old file stay as they are
    if new is not None:
        path.write_bytes(new)
    return f"bit {bit} of byte {place} of {len(data)}" if way == "flip" else f"{way} at {place} of {len(data)}"


def choose(root: Path, pick: Pick, rng: random.Random) -> tuple[str, list[Path]]:
    """A file of a kind, and the others that it could be taken for."""
    files = sorted(name for name in tree(root) if not name.endswith("/"))
    name = rng.choice([file for file in files if pick(file)])
    alike = [root / other for other in files if other != name and Path(other).suffix == Path(name).suffix]
    return name, alike


def damaged_cache(made: Material, store: str, pick: Pick, folder: Path, rng: random.Random) -> str:
    """`verify` must find it, and training must refuse it or not have needed it."""
    shutil.copytree(made.caches[store], folder / "cache")
    name, others = choose(folder / "cache", pick, rng)
    done = damage(folder / "cache" / name, rng, others)
    said = run(["cachectl", "verify", str(folder / "cache")], folder / "verify.txt", limit_s=_LIMIT_S)
    if not refused(said, what=f"verify, {name}, {done}"):
        raise Failed(f"verify overlooked {name}, {done}")
    said = run(train("train", folder / "cache", folder / "output"), folder / "train.txt", limit_s=_LIMIT_S)
    if refused(said, what=f"train, {name}, {done}"):
        return REFUSED
    refuse_differences(weights_of(folder / "output"), weights_of(made.trained[store]), f"train, {name}, {done}")
    return SAME


def damaged_run(made: Material, start: Path, pick: Pick, folder: Path, rng: random.Random) -> str:
    """Reading must refuse it or not have needed it; the same command must refuse it, or come to the same again."""
    output, final = folder / "output", folder / "output" / "distilled" / "final"
    shutil.copytree(start, output)
    name, others = choose(output, pick, rng)
    done = damage(output / name, rng, others)
    how = SAME
    if final.is_dir() and name.startswith("distilled/final/"):
        how = damaged_final(made, final, f"{name}, {done}", folder, rng)
    elif start == made.finished and name in ("run.json", "evaluation.json", "distilled/log.jsonl"):
        how = (
            REFUSED
            if refused(run(["distill", "report", str(output)], folder / "report.txt"), what=f"report, {done}")
            else SAME
        )
    said = run(train("run", made.caches["zarr"], output), folder / "run.txt", limit_s=_LIMIT_S)
    if refused(said, what=f"run, {name}, {done}"):
        if name.endswith(_REPAIRED):
            raise Failed(f"run was stopped by {name}, {done}: {said.text[-800:]}")
        return REFUSED
    refuse_differences(left_by_run(output), left_by_run(made.finished), f"run, {name}, {done}")
    return how


def damaged_final(made: Material, final: Path, what: str, folder: Path, rng: random.Random) -> str:
    """Scores and exports of a damaged student are refused, or those of the whole one."""
    whole = made.finished / "distilled" / "final"
    verb = rng.choice(("evaluate", "export"))
    for place, student in ((folder / "found", final), (folder / "expected", whole)):
        said = run(["distill", verb, str(student), "--output", str(place)], folder / f"{verb}.txt", limit_s=_LIMIT_S)
        if refused(said, what=f"{verb}, {what}"):
            if student == whole:
                raise Failed(f"{verb} of a whole student: {said.text[-800:]}")
            return REFUSED
    if verb == "export":
        found, expected = tree(folder / "found"), tree(folder / "expected")
        found.pop("distillation.json", None)
        expected.pop("distillation.json", None)
        refuse_differences(found, expected, f"export, {what}")
    elif json.loads((folder / "found").read_text()) != json.loads((folder / "expected").read_text()):
        raise Failed(f"evaluate, {what}: other scores")
    return SAME


def left_by_run(output: Path) -> dict[str, object]:
    """What a run leaves, but for checkpoints, which a finished student does not need, and logs, which may lose lines."""
    left = {name: what for name, what in left_by_training(output).items() if not name.endswith("log.jsonl")}
    left["report.html"] = (output / "report.html").read_bytes().rstrip().endswith(b"</html>")
    return {name: what for name, what in left.items() if "checkpoints" not in name and not name.endswith("config.yaml")}


def damages(made: Material) -> list[Case]:
    """All cases: files of caches in both stores, of a finished run, and of one that was stopped."""
    cases = []
    for store in ("zarr", "webdataset"):
        for kind, pick in _CACHE_KINDS.items():
            work = partial(damaged_cache, made, store, pick)
            cases += [Case(kind="damages", name=f"{kind} of a cache, {store}", work=work)] * (
                30 if kind == "shards" else 12
            )
    for kind, pick in _RUN_KINDS.items():
        work = partial(damaged_run, made, made.finished, pick)
        cases += [Case(kind="damages", name=f"{kind} of a finished run", work=work)] * 18
    for kind, count in (
        ("state.json", 40),
        ("tensors.pt", 30),
        ("run.json", 10),
        ("log.jsonl", 15),
        ("distillation.json", 6),
    ):
        work = partial(damaged_run, made, made.stopped, _RUN_KINDS[kind])
        cases += [Case(kind="damages", name=f"{kind} of a stopped run", work=work)] * count
    return cases
