"""Kill a build at every file operation, resume it, compare with an uninterrupted build.

Run as ``python kill_everywhere.py STORE FOLDER STRIDE [FLAT_SHARDS]``: a process of its own, because zarr must not have
been used before the forks. Prints the number of places it was killed at.
"""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

from cache_factory import build_shard, make_plan, tree

from vlm_distill_cache.common.cache import layout
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards

_WATCHED = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate"}


def build(plan, cache_dir):
    write_plan(cache_dir, plan)
    for index in missing_shards(cache_dir, plan):
        build_shard(cache_dir, plan, index)
    seal(cache_dir)


def in_child(function, *arguments):
    child = os.fork()
    if child == 0:
        code = 1
        os.fsync = lambda descriptor: None  # no machine crashes here, only processes die
        try:
            function(*arguments)
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until(make, target, place):
    """Work, and die before the file operation number ``place`` inside the target."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in _WATCHED and arguments and str(target) in str(arguments[0]):
            count += 1
            if count == place:
                os._exit(9)

    sys.addaudithook(hook)
    os.fsync = lambda descriptor: hook("open", (str(target),))  # written, but not yet published
    make(target)


def kill_everywhere(make, folder, stride):
    """Returns the number of places at which it was killed."""
    assert in_child(make, folder / "whole") == 0
    expected = tree(folder / "whole")
    place, killed, code = 1, 0, 9
    while code == 9:
        target = folder / f"cache-{place}"
        code = in_child(until, make, target, place)
        assert code in (0, 9), f"place {place}: exit code {code}"
        assert in_child(make, target) == 0, f"place {place}: going on failed"
        found = tree(target)
        assert found == expected, f"place {place}: {sorted(found.keys() ^ expected.keys())}"
        shutil.rmtree(target)
        killed += code == 9
        place += stride
    return killed


def main():
    store, folder, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:
        layout.FLAT_SHARDS, layout.FOLDER_SHARDS = int(sys.argv[4]), 1
    plan = make_plan(store, samples=5, shard_size=3, signals={}, fields={})  # base fields: fewer files
    sys.stdout.write(f"{kill_everywhere(partial(build, plan), folder, stride)}\n")


if __name__ == "__main__":
    main()
