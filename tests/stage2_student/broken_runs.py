"""What a process leaves that is killed after some step, and runs in two processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vlm_distill_cache.common.config import save_config

SCRIPT = """
import sys
from pathlib import Path
import fused_models
from vlm_distill_cache.common.config import load_config
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.train import train
for path in sys.argv[1:]:
    train(load_config(TrainConfig, Path(path)))
fused_models.main(Path(__file__).parent)
"""


class Copies:
    """Copies a run's folder after every step, so that one run shows what a kill after any of its steps leaves."""

    def __init__(self, output: Path) -> None:
        self.output, self._copies = output, output.with_name(f"{output.name}-copies")

    def __call__(self, position, _student) -> None:
        shutil.copytree(self.output, self._copies / str(position.total_steps))

    def killed_after(self, total_steps: int, output: Path) -> None:
        """Make a folder what it was when the run had taken so many steps."""
        assert not (self._copies / str(total_steps) / "final").exists()
        shutil.copytree(self._copies / str(total_steps), output)


def train_in_two_processes(folder: Path, *configs) -> None:
    """Train runs, and `fused_models`, one after the other in the same two processes: starting these takes longer."""
    (folder / "run.py").write_text(SCRIPT)
    paths = [folder / f"config{index}.yaml" for index in range(len(configs))]
    for config, path in zip(configs, paths, strict=True):
        save_config(config, path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "run.py"]
    root, here = Path(__file__).parents[2], Path(__file__).parent
    done = subprocess.run(
        [*map(str, command), *map(str, paths)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{here}"},
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
