"""Kill a merge, and a pull of a part, at every file operation; go on; compare with an uninterrupted one.

Run as ``python kill_derived.py STORE FOLDER STRIDE``: a process of its own, because zarr must not have been
used before the forks. Prints the number of places each was killed at.
"""

import sys
from functools import partial
from pathlib import Path

from cache_factory import build_shard, make_plan
from kill_everywhere import in_child, kill_everywhere

from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan


def build(cache_dir, plan, shards):
    write_plan(cache_dir, plan)
    for index in shards:
        build_shard(cache_dir, plan, index)
    (cache_dir / "processor").mkdir()
    (cache_dir / "processor" / "note.json").write_text("{}\n")
    if len(shards) == plan.shard_count:
        seal(cache_dir)


def merge_into(sources, target):
    from vlm_distill_cache.common.tools.merge import merge

    merge(sources, target)


def pull_into(source, target):
    from vlm_distill_cache.common.tools.select import Selection, pull_partial

    pull_partial(source, target, Selection(shards=(0, 1)), jobs=1)


def main():
    store, folder, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    plan = make_plan(store, samples=5, shard_size=3, signals={}, fields={})  # base fields: fewer files
    for name, shards in (("whole", (0, 1)), ("first", (0,)), ("second", (1,))):
        assert in_child(build, folder / name, plan, shards) == 0
    (folder / "parts").mkdir()
    (folder / "pulls").mkdir()
    parts = partial(merge_into, [folder / "first", folder / "second"])
    sys.stdout.write(f"{kill_everywhere(parts, folder / 'parts', stride)} ")
    pull = partial(pull_into, folder / "whole")
    sys.stdout.write(f"{kill_everywhere(pull, folder / 'pulls', stride)}\n")


if __name__ == "__main__":
    main()
