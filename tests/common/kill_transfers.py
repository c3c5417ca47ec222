"""Kill a push, a push over another cache, and a pull at every file operation; go on; compare with a whole one.

Run as ``python kill_transfers.py FOLDER STRIDE``. Prints the number of places each was killed at.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

from cache_factory import build_cache, make_plan
from kill_everywhere import in_child, kill_everywhere

from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push


def build(folder, **changes):
    build_cache(folder, make_plan("webdataset", samples=5, shard_size=3, **changes))
    (folder / "README.md").write_text("# A card\n")


def push_over(old, new, target):
    if not target.exists():
        copied = target.with_name("copied")  # not under the name that is watched
        shutil.copytree(old, copied)
        copied.rename(target)
    push(new, target, jobs=1, overwrite=True)


def main():
    folder, stride = Path(sys.argv[1]), int(sys.argv[2])
    assert in_child(build, folder / "one") == 0
    assert in_child(partial(build, folder / "two", fingerprints={"teacher": "c" * 32})) == 0
    for name, make in (
        ("pushes", partial(push, folder / "one", jobs=1)),
        ("pushes-over", partial(push_over, folder / "two", folder / "one")),
        ("pulls", lambda target: pull(folder / "one", target, jobs=1)),
    ):
        (folder / name).mkdir()
        sys.stdout.write(f"{kill_everywhere(make, folder / name, stride)} ")


if __name__ == "__main__":
    main()
