"""The options of ``teacher-cache submit`` and ``distill submit`` that are the engine's; nothing else is imported for the help."""

import click

from vlm_distill_cache.common.terminal.command_line import shared_options
from vlm_distill_cache.common.terminal.result_files import Finite

PACKAGES = {"ray": "ray", "slurm": "submitit"}
HOURS = 12.0

ENGINE_OPTIONS = shared_options(
    click.option(
        "--engine",
        type=click.Choice([*PACKAGES]),
        required=True,
        help="ray: this command stays until all is done; slurm: it submits jobs and leaves.",
    ),
    click.option("--gpus", type=click.IntRange(min=0), default=1, show_default=True, help="GPUs on each machine."),
    click.option("--cpus", type=click.IntRange(min=1), default=8, show_default=True, help="CPU cores on each machine."),
    click.option(
        "--hours",
        type=Finite(min=0, min_open=True),
        help=f"With slurm: time limit, after which a worker goes back into the queue, and on from there; default: {HOURS:g}.",
    ),
    click.option(
        "--restarts",
        type=click.IntRange(min=0),
        default=10,
        show_default=True,
        help="How often a worker is started again that was killed (ray) or used up its time (slurm). One that fails is not.",
    ),
    click.option(
        "--address", help="With ray: the cluster's address; default: RAY_ADDRESS, or the one of this machine."
    ),
    click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment variable of the workers; repeatable."),
    click.option(
        "--prefix",
        default="",
        help="What a worker's command stands behind, such as 'apptainer exec --nv IMAGE' or a script that loads modules and ends "
        'with exec "$@"; its `python` has this project.',
    ),
    click.option(
        "--engine-set",
        multiple=True,
        metavar="KEY=VALUE",
        help="Option of the engine itself; repeatable. With slurm, any of sbatch (partition=gpu, account=me, mem=64G); with ray, "
        "of a Ray task (accelerator_type=A100).",
    ),
)
