"""Break a command of stage one at every file operation, run it again, compare with an uninterrupted run.

Run as ``python break_everywhere.py STORE HOW STRIDE FOLDER SCENARIO ...``: a process of its own, because zarr
must not have been used before the forks. HOW is ``kill`` (the process dies before the operation), ``full``
(this and every later operation that needs space fails, and the error must say so) or ``both`` (in turn, for an
odd stride). Prints the number of places.
"""

import errno
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tqdm
from several_data import write_data

from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.errors import NoRoomError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extend import extend
from vlm_distill_cache.stage1_teacher.extract import extract, recompute_fidelity
from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors
from vlm_distill_cache.stage1_teacher.planning.parts import ANY, Part

KILLED, FULL = 9, 7
_NEEDS_SPACE = {"open", "os.mkdir", "os.rename", "os.link", "os.fsync"}
_WATCHED = _NEEDS_SPACE | {"os.remove", "os.rmdir", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def config_for(cache_dir, teacher, store, **options):
    settings = {"template": "short", "limit": 5, "shard_size": 3, "batch_size": 2, "fidelity_samples": 1,
                "signals": ("logits",), "max_failed_share": 0.5, "threads": 1} | options  # fmt: skip
    return BuildConfig(cache=str(cache_dir), teacher=str(teacher), store=store, **settings)


def two_parts(config):
    for rank in range(2):
        extract(config, part=Part(rank=rank, of=2))


def several(folder, *names):
    """Options of a build of samples with several pictures, and videos, some of which cannot be read."""
    return {"data": write_data(folder, *names, "gone"), "limit": 0, "batch_size": 1, "max_unknown_share": 1.0,
            "shard_size": 4, "signals": ("logits", "answer_attention", "visual_columns")}  # fmt: skip


def lift(before, config, data):
    """Add samples with several pictures, and videos, and a signal to a cache of none."""
    assert verify(config.cache) == []
    cache = open_cache(config.cache)
    assert cache.plan.format_version == (1 if len(cache) == 3 else 2)
    options = replace(config, **several(data, "text", "one", "again", "two", "clip", "both") | {"signals": ("hidden",)})
    extend(options, given={"data", "teacher", "signals", "limit", "fidelity_samples", "max_failed_share"})
    assert [tree(path) for path in beside(Path(config.cache))] == [tree(before)]


def extend_by_all(before, config):
    """Add a signal and a sample to a cache, which is whole, old or new, whatever happened to an earlier run."""
    assert verify(config.cache) == []
    cache = open_cache(config.cache)
    assert len(list(cache.items())) in (4, 5)
    assert cache.signals == (("logits",) if len(cache) == 4 else ("hidden", "logits"))
    options = replace(config, signals=("hidden",))
    extend(options, given={"teacher", "template", "signals", "limit", "fidelity_samples"})
    assert [tree(path) for path in beside(Path(config.cache))] == [tree(before)]


def beside(cache_dir):
    return sorted(cache_dir.parent.glob(f"*{cache_dir.name}.*"))


def scenario(name, folder, teacher, store):
    """What a cache folder looks like before (None: nothing there), and the command."""

    def command(cache_dir):
        options = several(folder / "several", "text", "one", "two", "clip", "both") if name == "several" else {}
        config = config_for(cache_dir, teacher, store, **options)
        {
            "build": extract, "several": extract, "lift": partial(lift, before, data=folder / "data"),
            "refill": extract, "rederive": extract, "parts": two_parts, "queue": partial(extract, part=ANY),
            "overwrite": partial(extract, overwrite=True),
            "extend": partial(extend_by_all, before),
            "fidelity": partial(recompute_fidelity, samples=2),
            "seal": lambda config: seal(Path(config.cache)),
        }[name](config)  # fmt: skip

    before = folder / f"before-{name}"
    if name in ("build", "parts", "queue", "several"):
        return None, command
    options = {"overwrite": {"shard_size": 2}, "extend": {"limit": 4}}.get(name, {})
    if name == "lift":
        options = several(folder / "data", "text", "one", "again")
    assert in_child(extract, config_for(before, teacher, store, **options)) == 0
    if name == "refill":
        for path in (before / "shards").glob("00000.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if name == "seal":
        (before / "manifest.json").unlink()
        (before / "index.bin").unlink()
    if name == "rederive":
        (before / "manifest.json").write_bytes((before / "manifest.json").read_bytes()[:-40])
    return before, command


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def in_child(function, *arguments):
    child = os.fork()
    if child == 0:
        code = 1
        os.fsync = lambda descriptor: None  # no machine crashes here, only processes die
        try:
            function(*arguments)
            code = 0
        except NoRoomError as error:
            if "No space left on device; make room, then run the same command again" in str(error):
                code = FULL
        finally:
            if code == 1:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def path_of(event, arguments):
    """The absolute path of an operation's target; deletions inside a folder give it relative to a descriptor."""
    if event == "os.fsync":
        return str(Path(f"/proc/self/fd/{arguments[0]}").readlink())
    path, descriptor = os.fsdecode(arguments[0]), arguments[-1]
    if event in ("os.remove", "os.rmdir") and descriptor >= 0:
        return f"{Path(f'/proc/self/fd/{descriptor}').readlink()}/{path}"
    return path


def break_before(place, how, folder):
    """Break this process before an operation on something in a folder, counted from 1."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event not in _WATCHED or (event == "open" and not arguments[2] & _WRITES):
            return
        if isinstance(arguments[0], int) and event != "os.fsync":
            return  # an open file's number: its operation was the opening
        path = path_of(event, arguments)
        if str(folder) not in path:
            return
        count += 1
        if how == "kill" and count == place:
            os._exit(KILLED)
        if how == "full" and count >= place and event in _NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)
    os.fsync = lambda descriptor: hook("os.fsync", (descriptor,))


def break_at(place, how, cache_dir, command):
    break_before(place, how, cache_dir)
    with explain_disk_errors(cache_dir):
        command(cache_dir)


def drive(name, how, stride, folder, teacher, store):
    before, command = scenario(name, folder, teacher, store)

    def fresh(target):
        if before is not None:
            shutil.copytree(before, target)
        return target

    whole = fresh(folder / f"whole-{name}")
    assert in_child(command, whole) == 0, name
    expected = tree(whole)
    assert "manifest.json" in expected
    place, broken, code = 1, 0, KILLED
    while code:
        cache_dir = fresh(folder / f"{name}-{place}")
        manner = ("kill", "full")[place % 2] if how == "both" else how
        code = in_child(break_at, place, manner, cache_dir, command)
        assert code in (0, KILLED if manner == "kill" else FULL), f"{name}, place {place}: exit code {code}"
        assert in_child(command, cache_dir) == 0, f"{name}, place {place}: running it again failed"
        found = tree(cache_dir)
        differing = [path for path in expected.keys() & found.keys() if expected[path] != found[path]]
        assert found == expected, f"{name}, place {place}: {expected.keys() ^ found.keys()} {differing}"
        for path in (cache_dir, *beside(cache_dir)):
            shutil.rmtree(path)
        broken += code != 0
        place += stride
    return broken


def main():
    store, how, stride, folder, teacher, *names = sys.argv[1:]
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread of ours may live through a fork
    folder = Path(folder)
    # Loads what is imported on first use; the other store, so that no event loop of zarr runs yet.
    extract(config_for(folder / "warm", teacher, "webdataset"))
    for name in names:
        broken = drive(name, how, int(stride), folder, teacher, store)
        sys.stdout.write(f"{name} {broken}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
