"""Our part in lmms-eval: a model that it can ask, and benchmarks that it has not, read and counted as `distill suite` does.

lmms-eval finds the model by the entry point ``lmms_eval.models`` of this package and is told of the tasks with
``--include_path``; nothing here imports it before it asks. docs/harness.md has the commands.
"""

from pathlib import Path
from typing import Any

MODEL = "distill"  # lmms-eval --model
TASKS = Path(__file__).parent / "tasks"  # lmms-eval --include_path
OPTIONAL = "optional"  # in the metadata of requests: what cannot be asked is answered by an empty text
NO_GREEDY = "no_greedy"  # in the metadata of requests: nobody asks whether the continuation is the greedy answer


def models() -> Any:
    """What the entry point gives lmms-eval: its ``ModelManifest`` of our model."""
    from lmms_eval.models.registry_v2 import ModelManifest  # an environment of its own has it

    return ModelManifest(model_id=MODEL, simple_class_path=f"{__name__}.model.DistilledStudent")
