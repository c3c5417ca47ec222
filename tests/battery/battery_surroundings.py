"""What surrounds a command goes wrong: disks, permissions, clocks; names that reach for the terminal or a browser; a long run."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.battery.battery_cases import REFUSED, SAME, Case, Failed, refuse_unclean, refused
from tests.battery.battery_hostile import fingerprint_of, sign_all, write_signed
from tests.battery.battery_material import (
    CACHES,
    Material,
    build,
    left_by_training,
    refuse_differences,
    train,
    tree,
)
from tests.battery.battery_process import run, start

_MIB = 1 << 20
_NOBODY = 65534
_RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
NASTY = "\x1b]0;owned\x07\x1b[2K\rok: all is well\nok \u202egpj\x9b1m"
SCRIPTS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title><svg onload=alert(1)>", "javascript:alert(1)",
    "' onmouseover='alert(1)", "</script><script>alert(1)</script>", "<iframe srcdoc='<script>alert(1)</script>'>",
)  # fmt: skip
_LIVE = re.compile(r"<script>alert|<img src=x|<svg onload|<iframe|\" onmouseover=|' onmouseover='", re.I)
SOAK_S = 180.0
_SOAK_MIB, _SOAK_FILES = 64, 4


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None] | None]:
    """A file system of so many bytes on a folder; yields what makes it large. None where this user may not mount."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], capture_output=True, check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def unmount_all(folder: Path) -> None:
    """Take away the file systems of cases that were stopped."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    for place in (line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")):
        subprocess.run(["umount", "-l", place], capture_output=True, check=False)


def limit_files(size: int) -> None:
    """The next best: no file may grow beyond a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


Command = Callable[[Path], list[str]]


def full_disk(command: Command, whole: int, look: Command | None, folder: Path, rng: random.Random) -> str:
    """On a disk that is too small a command says so and what to do, and leaves nothing half; with room it does its work."""
    size = max(4096, int(whole * rng.uniform(0.02, 0.9)))
    disk = folder / "disk"
    with small_disk(disk, size) as enlarge:
        before = None if enlarge else partial(limit_files, size)
        said = run(command(disk / "target"), folder / "full.txt", before=before)
        if not refused(said, what=f"on a disk of {size} bytes"):
            return SAME  # it needs less
        if not re.search(r"space|room|too large|quota", said.text, re.I) or "target" not in said.text:
            raise Failed(f"on a disk of {size} bytes: no file or no reason: {said.text[-800:]}")
        if enlarge:
            enlarge()
        said = run(command(disk / "target"), folder / "again.txt")
        if refused(said, what="with room again"):
            raise Failed(f"with room again: {said.text[-800:]}")
        if look is not None:
            said = run(look(disk / "target"), folder / "look.txt")
            if refused(said, what="a look at it"):
                raise Failed(f"what was written does not stand: {said.text[-800:]}")
        if any(path.name.startswith(".tmp-") for path in disk.rglob("*")):
            raise Failed("temporary files are left")
    return REFUSED


def full_disks(made: Material) -> Iterator[Case]:
    """Every command that writes."""
    zarr, final = made.caches["zarr"], made.finished / "distilled" / "final"
    size = {name: sum(map(len, tree(cache).values())) for name, cache in made.caches.items()}
    sample = json.loads((zarr / "shards" / "00000.json").read_text())["sample_ids"][0]

    def verify(target: Path) -> list[str]:
        return ["cachectl", "verify", str(target)]

    commands: dict[str, tuple[int, Command, Command | None, int]] = {
        "build zarr": (6, partial(build, **CACHES["zarr"]), verify, size["zarr"]),
        "build webdataset": (6, partial(build, **CACHES["webdataset"]), verify, size["webdataset"]),
        "run": (8, partial(train, "run", zarr), None, sum(map(len, tree(made.finished).values()))),
        "convert": (
            3,
            lambda to: ["cachectl", "convert", str(zarr), str(to), "--store", "webdataset"],
            verify,
            size["zarr"],
        ),
        "pull": (3, lambda to: ["cachectl", "pull", str(zarr), str(to)], verify, size["zarr"]),
        "push": (3, lambda to: ["cachectl", "push", str(zarr), str(to)], verify, size["zarr"]),
        "merge": (
            3,
            lambda to: ["cachectl", "merge", str(zarr), str(made.caches["webdataset"]), "--output", str(to)],
            verify,
            size["zarr"],
        ),
        "export": (3, lambda to: ["distill", "export", str(final), "--output", str(to)], None, 1_000_000),
        "evaluate": (2, lambda to: ["distill", "evaluate", str(final), "--output", str(to)], None, 4096),
        "picture": (2, lambda to: ["cachectl", "inspect", str(zarr), sample, "--picture", f"{to}.png"], None, 8192),
    }
    for name, (count, command, look, whole) in commands.items():
        for _ in range(count):
            yield Case(kind="surroundings", name=f"full disk: {name}", work=partial(full_disk, command, whole, look))


def unreadable(made: Material, name: str, verb: str, folder: Path, _rng: random.Random) -> str:
    """A file that may not be read is named and stays, whatever is asked."""
    cache = folder / "cache"
    shutil.copytree(made.caches["webdataset"], cache)
    path = cache / name
    data = path.read_bytes()
    path.chmod(0)
    for place in (folder, cache, *cache.rglob("*")):
        if place.is_dir():
            place.chmod(0o777)
    above = [parent for parent in folder.parents if not parent.stat().st_mode & 1]
    for parent in above:
        parent.chmod(parent.stat().st_mode | 0o711)

    def nobody() -> None:
        if os.getuid() == 0:
            os.environ["HOME"] = str(folder)
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)

    command = {
        "verify": ["cachectl", "verify", str(cache)],
        "repair": ["cachectl", "repair", str(cache)],
        "train": train("train", cache, folder / "output"),
        "build": build(cache, **CACHES["webdataset"]),
    }[verb]
    said = run(command, folder / "said.txt", before=nobody)
    if not refused(said, what=verb):
        if verb == "train":
            return SAME  # it does not need it
        if verb in ("build", "repair"):  # what it can write anew it need not read
            path.chmod(0o600)
            refuse_differences(tree(cache), tree(made.caches["webdataset"]), verb)
            return SAME
        raise Failed(f"{verb} of a cache whose {name} cannot be read ended with 0: {said.text[-800:]}")
    path.chmod(0o600)
    if path.read_bytes() != data:
        raise Failed(f"{verb} changed or removed a file that it could not read")
    return REFUSED


def clock(made: Material, verb: str, folder: Path, rng: random.Random) -> str:
    """The clock of the machine jumps, back and forth: the bytes stay the same."""
    jumps, real = [rng.uniform(-3e8, 3e8) for _ in range(50)], time.time

    def before() -> None:
        state = {"calls": 0}

        def jumping() -> float:
            state["calls"] += 1
            return real() + jumps[state["calls"] % len(jumps)]

        time.time = jumping

    target = folder / "target"
    command = build(target, **CACHES["zarr"]) if verb == "build" else train("run", made.caches["zarr"], target)
    said = run(command, folder / "said.txt", before=before)
    if refused(said, what=verb):
        raise Failed(f"{verb}: {said.text[-800:]}")
    if verb == "build":
        refuse_differences(tree(target), tree(made.caches["zarr"]), verb)
    else:
        refuse_differences(left_by_training(target), left_by_training(made.finished), verb)
    return SAME


def name_it(cache: Path, place: tuple[str, ...], text: str) -> None:
    """Put a text where a plan names something, and sign everything; `*`: as the name of a score."""
    plan = json.loads((cache / "plan.json").read_text())
    plan.pop("checksum")
    inner = plan
    for key in place[:-1]:
        inner = inner[key]
    if place[-1] == "*":
        inner[f"likelihood/{text}"] = next(iter(inner.values()))  # the kinds of a score are shown by name
    else:
        inner[place[-1]] = text
    write_signed(cache / "plan.json", plan)
    sign_all(cache, plan_hash=fingerprint_of(plan))


NAMES = (
    ("teacher", "name"), ("teacher", "evaluation", "scores", "*"), ("data", "name"), ("template", "name"),
    ("teacher", "revision"), ("teacher", "family"), ("fingerprints", "data"), ("signals", "logits", "codec"), ("extra", "x"),
)  # fmt: skip


def named(made: Material, place: tuple[str, ...], text: str, folder: Path, _rng: random.Random) -> str:
    """Names from a cache reach neither terminal nor report raw."""
    cache, output = folder / "cache", folder / "output"
    shutil.copytree(made.caches["webdataset"], cache)
    name_it(cache, place, text)
    how = SAME
    for command in (
        ["cachectl", "inspect", str(cache)],
        ["cachectl", "verify", "--deep", str(cache)],
        ["teacher-cache", "report", str(cache)],
        ["cachectl", "convert", str(cache), str(folder / "converted"), "--store", "zarr"],
        train("run", cache, output),
        ["distill", "report", str(output)],
        ["distill", "evaluate", str(output / "distilled" / "final")],
    ):
        if command[1] in ("report", "evaluate") and command[0] == "distill" and not (output / "report.html").exists():
            continue
        said = run(command, folder / "said.txt")
        if refused(said, what=command[1]):
            how = REFUSED
        if found := _RAW.search(said.text):
            raise Failed(
                f"{command[1]} printed {found[0]!r}: {said.text[max(0, found.start() - 100) : found.end() + 100]!r}"
            )
        for page in output.rglob("report.html"):
            if live := _LIVE.search(page.read_text()):
                raise Failed(f"the report of {command[1]} holds {live[0]!r}")
        for card in folder.rglob("README.md"):
            if card.is_relative_to(folder / "converted") and _RAW.search(card.read_text()):
                raise Failed("the card holds raw escapes")
        if (output / "table.txt").exists() and _RAW.search((output / "table.txt").read_text()):
            raise Failed("table.txt holds raw escapes")
    return how


def storm(made: Material, folder: Path, rng: random.Random) -> str:
    """Signals that ask nothing of it, many of them: the work is done all the same."""
    target = folder / "target"
    running = start(train("run", made.caches["zarr"], target), folder / "said.txt")
    until = time.monotonic() + made.seconds["run"]
    while time.monotonic() < until:
        for number in (signal.SIGCHLD, signal.SIGWINCH, signal.SIGCONT, signal.SIGURG):
            if Path(f"/proc/{running.process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                os.kill(running.process, number)
        time.sleep(rng.uniform(0, 0.01))
    said = running.finish(120)
    if refused(said, what="run"):
        raise Failed(f"run: {said.text[-800:]}")
    refuse_differences(left_by_training(target), left_by_training(made.finished), "run")
    return SAME


def broken_output(made: Material, code: int, folder: Path, _rng: random.Random) -> str:
    """The terminal or pipe that a command prints to is gone."""

    def before() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing if code == errno.EPIPE else os.open("/dev/full", os.O_WRONLY), 1)

    said = run(["cachectl", "inspect", str(made.caches["zarr"])], folder / "said.txt", before=before)
    refuse_unclean(said, what="inspect")
    return REFUSED if said.code else SAME


def surroundings(made: Material) -> list[Case]:
    """All cases but the long run."""
    cases = list(full_disks(made))
    files = ("plan.json", "manifest.json", "index.bin", "shards/00001.json", "shards/00000.tar", "vision_tower.safetensors",
             "processor/tokenizer.json", "projector.json")  # fmt: skip
    work: list[tuple[str, Callable[..., str]]] = []
    for name in files:
        verbs = ("verify", "repair", "train", "build")
        work += [(f"unreadable {name}: {verb}", partial(unreadable, made, name, verb)) for verb in verbs]
    work += [(f"jumping clock: {verb}", partial(clock, made, verb)) for verb in ("build", "run") for _ in range(3)]
    for place in NAMES:
        texts = (NASTY, *SCRIPTS[:2])
        work += [(f"{'.'.join(place)} = {text[:20]!r}", partial(named, made, place, text)) for text in texts]
    work += [(f"teacher.name = {text[:20]!r}", partial(named, made, ("teacher", "name"), text)) for text in SCRIPTS[2:]]
    work += [("a storm of signals", partial(storm, made))] * 2
    work += [
        (f"output: {errno.errorcode[code]}", partial(broken_output, made, code)) for code in (errno.EPIPE, errno.ENOSPC)
    ]
    return cases + [Case(kind="surroundings", name=name, work=case) for name, case in work]


def long_run(made: Material, seconds: float, folder: Path, _rng: random.Random) -> str:
    """Repeated epochs from a cache: no more memory and open files at the end than after a quarter of the time."""
    command = train("train", made.caches["rich"], folder / "output", **{"dft.steps": 10**6, "checkpoint_every": 10**6})
    running = start(command, folder / "said.txt")
    figures = []
    for share in (0.25, 1.0):
        while time.monotonic() - running.began < share * seconds:
            time.sleep(0.2)
        status = Path(f"/proc/{running.process}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        if found is None:
            raise Failed(f"it ended early: {(folder / 'said.txt').read_text()[-800:]}")
        figures.append((int(found[1]) / 1024, len(os.listdir(f"/proc/{running.process}/fd"))))  # noqa: PTH208
    running.send(signal.SIGKILL)
    running.finish(0)
    (memory, files), (memory_then, files_then) = figures
    steps = len((folder / "output" / "log.jsonl").read_bytes().splitlines())
    if memory_then - memory > _SOAK_MIB or files_then - files > _SOAK_FILES or not steps:
        raise Failed(f"{memory:.0f} to {memory_then:.0f} MiB, {files} to {files_then} files, {steps} lines of log")
    return SAME


def soak(made: Material) -> list[Case]:
    """Two long runs, of a few minutes each."""
    return [Case(kind="soak", name="epochs", work=partial(long_run, made, SOAK_S), limit_s=SOAK_S + 60)] * 2
