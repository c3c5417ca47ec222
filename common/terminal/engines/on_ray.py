"""Ray: it finds a machine for each worker, starts those again that were killed, and begins waiting ones when machines join.

This process stays until all workers have ended; when it is stopped, they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from vlm_distill_cache.common.errors import ConfigError, ProcessFailedError
from vlm_distill_cache.common.printing import first_line, message
from vlm_distill_cache.common.terminal.engines.jobs import Job, WorkerLostError, work

logger = logging.getLogger(__name__)
NEW = "a new one, on this machine alone"
_POLL_S = 1.0
_STOP_S = 30.0  # for workers that are stopped: what they are writing is a shard or a checkpoint
_STORE_BYTES = 100 << 20  # nothing is handed over in it


def connect_to_ray(address: str | None) -> str:
    """Join a Ray cluster: the one of the address, else of ``RAY_ADDRESS``, else of this machine, else a new one on it.

    Returns:
        What it is, for people.

    Raises:
        ConfigError: If it cannot be reached, or is of another version.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells nobody that it runs
    import ray

    quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        return str(ray.init(address=address or "auto", **quiet).address_info["address"])
    except ConnectionError as error:
        if named := address or os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"no Ray cluster answers at {named}: {first_line(error)}") from error
    except Exception as error:  # nothing narrower is raised for another version of Ray or of Python
        raise ConfigError(f"the Ray cluster cannot be joined: {message(str(error))}") from error
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: workers are all that this cluster is for
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
    except Exception as error:
        raise ConfigError(f"Ray does not start on this machine: {message(str(error))}") from error
    return NEW


def run_on_ray(job: Job, *, new: bool, say: Callable[[str], None]) -> None:
    """Run workers on the cluster that was joined, and wait for all of them.

    Args:
        job: What to start; its settings are options of a Ray task.
        new: The cluster was begun for this, and no machine will join it.
        say: Is told what happens.

    Raises:
        ConfigError: If no machine of a new cluster has what a worker needs, or Ray refuses a setting.
        ProcessFailedError: If no worker came to a good end, with the first one's error.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = any(one.get("CPU", 0) >= job.cpus and one.get("GPU", 0) >= job.gpus for one in machines)
    if not fits:
        there = ", ".join(f"{one.get('GPU', 0):.0f} GPUs and {one.get('CPU', 0):.0f} CPUs" for one in machines[:4])
        lacks = (
            f"a worker needs {job.gpus} GPUs and {job.cpus} CPUs of one machine (--gpus, --cpus); there are: {there}"
        )
        if new:
            raise ConfigError(f"{lacks}. Ask for less, or join a cluster (`ray start`, --address)")
        say(f"{lacks}. The workers wait until such a machine joins the cluster; Ctrl-C ends this")
    # Ray's own number of threads is for one process.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, job.cpus // job.processes)))}
    wanted = {
        "num_cpus": job.cpus,
        "num_gpus": job.gpus,
        "max_retries": -1,  # `work` counts: Ray does not where memory ran out
        "retry_exceptions": [WorkerLostError],
        **job.settings,
    }
    task = ray.remote(work)
    try:
        tasks = [task.options(**{"name": f"{job.name} {index}", **wanted}) for index in range(job.workers)]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--engine-set: Ray says: {message(str(error))}") from error
    started = {one.remote(job, index, environment=threads, again=True): index for index, one in enumerate(tasks)}
    left, failed, done = [*started], list[str](), 0
    try:
        while left:
            ended, left = ray.wait(left, num_returns=1, timeout=_POLL_S)
            for one in ended:
                try:
                    ray.get(one)
                except ray.exceptions.RayError as error:
                    failed.append(str(getattr(error, "cause", None) or error))
                    if left or done:
                        say(f"{failed[-1]}\nIt is not started again; {len(left)} others go on")
                else:
                    done += 1
                    say(f"worker {started[one]} has ended: its work is done")
    finally:
        for one in left:
            ray.cancel(one)
        if left:
            ray.wait(left, num_returns=len(left), timeout=_STOP_S)
        ray.shutdown()
    if failed and not done:
        raise ProcessFailedError(f"no worker came to its end. The first one's error: {failed[0]}")
