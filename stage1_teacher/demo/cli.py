"""``teacher-cache demo-teacher``. Imports no torch before there is something to do."""

from pathlib import Path

import click

from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.terminal.command_line import NewFolder, quiet_libraries, quoted, say, tell
from vlm_distill_cache.common.terminal.general import JSON, Command, answer


@click.command("demo-teacher", cls=Command)
@click.option("--data", type=click.Choice(["shapes", "easy-vqa"]), default="shapes", show_default=True)
@click.option("--output", type=NewFolder(), required=True, help="Directory to write.")
@click.option("--seed", type=int, default=0, show_default=True)
@JSON
def demo_teacher(data: str, output: Path, seed: int) -> None:
    """Train a built-in teacher from scratch (minutes on 2 cores) and print its accuracy."""
    from vlm_distill_cache.stage1_teacher.demo.teacher import train_demo_teacher

    quiet_libraries()
    trained = train_demo_teacher(data, output, seed=seed)
    answer(output=output, **trained)
    say(f"Teacher written to {output}")
    place, cache = quoted(output), quoted(f"build/cache/{output.name}")
    command = by_make(
        f"make teacher-cache TEACHER={place} DATA={data} CACHE={cache}",
        f"teacher-cache build --teacher {place} --data {data} --cache {cache}",
    )
    tell(f"Next: {command}")
