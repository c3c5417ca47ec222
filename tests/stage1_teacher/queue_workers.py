"""Workers of one queue, of which one is killed and one joins late. Run as ``python queue_workers.py FOLDER TEACHER STORE``.

A process of its own, because zarr must not have been used before the forks. Prints, as JSON, how many shards there are, how
many the killed one had finished, how many the others built, and what differs from the cache that one process makes.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.stage1_teacher import extract as extracting
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.planning.leases import SEAL, Leases
from vlm_distill_cache.stage1_teacher.planning.parts import ANY

SLOW_S = 0.3  # a shard, so that there is time to kill somebody

run_shard = extracting.run_shard


def slowly(*arguments):
    time.sleep(SLOW_S)
    yield from run_shard(*arguments)


def in_child(work: Callable[[], object], said: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.fsync = lambda descriptor: None
            said.write_text(json.dumps(work()))
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return child


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def main(folder: Path, teacher: str, store: str) -> None:
    def build(cache: Path, **options) -> int:
        config = BuildConfig(
            cache=str(cache), teacher=teacher, template="short", limit=40, shard_size=2, batch_size=2, fidelity_samples=1,
            signals=("logits",), threads=1, store=store,
        )  # fmt: skip
        return extract(config, **options).built

    cache, children = folder / "cache", list[int]()

    def work() -> int:
        extracting.run_shard = slowly
        return build(cache, part=ANY)

    def join() -> None:
        children.append(in_child(work, folder / f"said-{len(children)}"))

    def made() -> list[int]:
        """How many shards each worker has finished."""
        if not (cache / "plan.json").exists():
            return [0]
        missing, leases = missing_shards(cache, read_plan(cache)), Leases(cache)
        done = [leases.holder(name) for of, name in leases.newest().items() if of != SEAL and int(of) not in missing]
        return [done.count(worker.name) for worker in leases.workers() if worker.pid == children[0]] or [0]

    os.waitpid(in_child(lambda: build(folder / "one"), folder / "said-one"), 0)
    join()
    join()
    while made()[0] < 2:
        time.sleep(0.05)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    [killed] = made()
    join()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[1:]]
    built = [json.loads((folder / f"said-{number}").read_text()) for number in (1, 2)]
    one, found = tree(folder / "one"), tree(cache)
    differing = sorted(name for name in one.keys() | found.keys() if one.get(name) != found.get(name))
    sys.stdout.write(json.dumps({"all": 20, "killed": killed, "built": built, "codes": codes, "differing": differing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
