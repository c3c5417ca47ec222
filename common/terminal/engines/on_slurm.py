"""SLURM, through submitit: one job, or an array of them, a worker each. Submitted is submitted: this process then ends."""

from __future__ import annotations

import math
import shutil
import zlib
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.printing import message
from vlm_distill_cache.common.terminal.engines.jobs import Job, work


@dataclass(frozen=True, kw_only=True)
class SlurmWorker:
    """What a job of SLURM runs. Before its time is over, or it is preempted, submitit asks for what is to be run next."""

    job: Job
    index: int

    def __call__(self) -> None:
        """Run the worker's command."""
        import submitit

        seen, environment = submitit.JobEnvironment(), dict[str, str]()
        if self.job.nodes > 1:  # where torch's launchers meet, in the variables that stand for their options
            port = 20000 + zlib.crc32(seen.job_id.encode()) % 12000
            environment = {
                "PET_NNODES": str(self.job.nodes),
                "PET_RDZV_BACKEND": "c10d",
                "PET_RDZV_ENDPOINT": f"{seen.hostnames[0]}:{port}",
                "PET_RDZV_ID": seen.job_id,
            }
        work(self.job, self.index, rank=seen.global_rank, environment=environment, again=False)

    def checkpoint(self) -> Any:
        """The same again: a build and a training go on from what is there."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit_to_slurm(job: Job, *, hours: float, cluster: str = "slurm") -> str:
    """Hand a job to SLURM.

    Args:
        job: What to start; its settings are options of sbatch, with ``_`` for ``-``.
        hours: Time limit of a worker, which then waits in the queue again.
        cluster: submitit's name of the engine: ``local`` runs the jobs on this machine.

    Returns:
        SLURM's number of the job, or of the array.

    Raises:
        ConfigError: If there is no SLURM here, or it refuses the job.
    """
    import submitit

    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing and cluster == "slurm":
        raise ConfigError(
            f"--engine slurm: {' and '.join(missing)} not found on this machine's PATH; run this on a machine that submits to "
            "the cluster"
        )
    executor = submitit.AutoExecutor(folder=job.folder, cluster=cluster, **{f"{cluster}_max_num_timeout": job.restarts})
    executor.update_parameters(
        name=job.name,
        timeout_min=math.ceil(hours * 60),
        nodes=job.nodes,
        tasks_per_node=1,
        **({"gpus_per_node": job.gpus} if job.gpus else {}),
        cpus_per_task=job.cpus,
        slurm_array_parallelism=job.workers,
        # srun does not take the cores from sbatch since SLURM 22.05; of several machines, none waits for one that failed
        slurm_srun_args=[f"--cpus-per-task={job.cpus}", "--kill-on-bad-exit=1"],
        # after a machine failed, or others needed it
        slurm_additional_parameters={"requeue": True, **job.settings},
    )
    try:
        with executor.batch():
            jobs = [executor.submit(SlurmWorker(job=job, index=index)) for index in range(job.workers)]
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(
            f"--engine slurm: sbatch refused the job: {message(str(error)).strip()}\nChange --gpus, --cpus, --hours or "
            "--engine-set (such as partition=NAME, account=NAME)"
        ) from error
    return str(jobs[0].job_id).partition("_")[0]
