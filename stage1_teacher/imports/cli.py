"""``cachectl import-logprobs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vlm_distill_cache.common.cache.plan import STORE_NAMES
from vlm_distill_cache.common.config import load_config
from vlm_distill_cache.common.terminal.command_line import (
    quiet_libraries,
    say,
    start_logging,
    stopped_by_sigterm,
    tell,
)
from vlm_distill_cache.common.terminal.general import JSON, Command, answer, overrides

if TYPE_CHECKING:
    from vlm_distill_cache.stage1_teacher.config import BuildConfig

FORMATS = ("auto", "vllm", "sglang", "openai", "distillkit", "nemo")
KEPT = "fixed:255"
"""What is kept where no other preset is given: all that a response holds, as far as a row may hold it."""


def build_config() -> type[BuildConfig]:
    """The class of stage one's options; what it needs (codecs, numpy) is imported with it, and not for a help text."""
    from vlm_distill_cache.stage1_teacher.config import BuildConfig

    return BuildConfig


@click.command("import-logprobs", cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, help="The data set that was sent to the server, as for `teacher-cache build`.")
@click.option("--images", help="Folder that image paths start from; default: the data's own folder.")
@click.option("--teacher", required=True, help="Folder with config.json, tokenizer and image processor; no weights.")
@click.option("--cache", required=True, help="Folder of the cache.")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default="auto", show_default=True, help="Form of the rows."
)
@click.option("--teacher-name", default="", help="Name of the teacher; default: what the responses call the model.")
@click.option(
    "--missing-target",
    type=click.Choice(["refuse", "middle"]),
    default="refuse",
    show_default=True,
    help="Of an answer token that is not among those listed: refuse its sample, or give it half of what it can have at most.",
)
@click.option("--store", type=click.Choice(STORE_NAMES), help="Shard format.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first samples of the data.")
@click.option("--overwrite", is_flag=True, help="Start again, whatever cache the folder holds.")
@overrides(build_config)
@JSON
def import_logprobs(
    files: tuple[Path, ...],
    *,
    form: str,
    teacher_name: str,
    missing_target: Literal["refuse", "middle"],
    overwrite: bool,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Write a cache of logits from log-probabilities that a server computed.

    FILE is JSON lines or parquet, a row a sample with the sample's id (custom_id, sample_id, id, request_id), or a folder of
    such: responses of vLLM (prompt_logprobs), SGLang (input_token_logprobs) or the OpenAI form, batch output files too; or rows
    of DistillKit and NeMo-Aligner, found by their tokens where they have no id. Tokens are compared with what the data's samples
    are in the teacher's tokens; samples that differ are recorded failures.
    Options are those of `teacher-cache build` (--set).
    """
    from vlm_distill_cache.stage1_teacher.imports.run import import_logprobs as run_import
    from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors
    from vlm_distill_cache.stage1_teacher.report import next_command, summary_text, summary_values

    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    first = ["signals=[logits]", "temperatures=[1.0]", f"logits={KEPT}"]
    settings = load_config(build_config(), None, [*first, *overrides, *given])
    start_logging()
    quiet_libraries()
    with explain_disk_errors(settings.cache), stopped_by_sigterm():
        summary = run_import(
            settings, files, form=form, name=teacher_name, missing_target=missing_target, overwrite=overwrite
        )
    say(summary_text(summary))
    answer(**summary_values(summary))
    tell(next_command(summary, settings))
