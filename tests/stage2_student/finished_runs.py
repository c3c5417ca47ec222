"""The options of a finished run that tests share, and what of it must stay the same."""

from tiny_cache import DATA

from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.run import LEFT, SCORES, TABLE, load_run_config

FAST = [
    "dpt.steps=1", "dft.steps=2", "sft.steps=1", "dpt.batch_size=4", "dft.batch_size=4", "sft.batch_size=4",
    "evaluation.limit=2", "evaluation.letters=false", "evaluation.agreement_samples=4",
    "evaluation.overlays=1", "device=cpu",
]  # fmt: skip


def make_config(cache, output, *more):
    return load_run_config(None, ["student=mobilevlm", f"data='{DATA}'", f"output={output}", *FAST, *more], cache=cache)


def whole(folder):
    """The digests of the students, the scores and the table."""
    return list_files(folder, [name for name in LEFT if name.endswith((TABLE, SCORES))]) | {
        name: read_final(folder / name)["files"] for name in ("sft/final", "distilled/final")
    }
