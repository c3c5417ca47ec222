"""The training loop: phase after phase, step after step, on samples and a teacher cache; no teacher in sight.

Cost: a distilled step takes about as long as a plain fine-tuning step, because the cache is decoded on
loading threads and attention is recomputed for the wanted rows of the wanted layers only. Run it under
``accelerate launch`` for several processes: a step then sees the same samples and has the same gradient.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.config import config_to_dict, save_config
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.files.atomic import clean_stale, new_directory, remove, temporary_for
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.terminal.launch import READY_S, clean_environment, enter_launch, meet
from vlm_distill_cache.common.terminal.progress import hide_library_bars
from vlm_distill_cache.common.terminal.sharding import refuse_sharding
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.data.families.models import BLOCK
from vlm_distill_cache.stage2_student.config import TrainConfig, public_config, scoring_options, without_secrets
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder
from vlm_distill_cache.stage2_student.final_folder import BEST, FINAL, PROVENANCE, refuse_other_student
from vlm_distill_cache.stage2_student.losses.objective import Losses, step_shares
from vlm_distill_cache.stage2_student.scores.card import write_card
from vlm_distill_cache.stage2_student.scores.held_out import run_option, scoring_notes, split_on_the_way
from vlm_distill_cache.stage2_student.scores.milestones import Milestones, Scorer
from vlm_distill_cache.stage2_student.scores.on_the_way import Kept
from vlm_distill_cache.stage2_student.scores.origin import describe_origin
from vlm_distill_cache.stage2_student.students.model import StudentModel, vocabulary_rows
from vlm_distill_cache.stage2_student.students.packed import (
    pack_layers,
    round_weights,
    unpack_layers,
    widen_weights,
    widened,
)
from vlm_distill_cache.stage2_student.students.shards import check_shardable
from vlm_distill_cache.stage2_student.trained_student import Student, open_scoring
from vlm_distill_cache.stage2_student.training.checkpoint import (
    Checkpoint,
    Position,
    drop_old_checkpoints,
    find_resume_point,
)
from vlm_distill_cache.stage2_student.training.checks import check_machine, refuse_device, refuse_undivided
from vlm_distill_cache.stage2_student.training.extension import differing_options
from vlm_distill_cache.stage2_student.training.log import TrainingLog
from vlm_distill_cache.stage2_student.training.output_folder import CONFIG, drop_pixels, refuse_pixel_folder
from vlm_distill_cache.stage2_student.training.parts import (
    TrainedParts,
    checkpoint_layers,
    decoder_layers,
    merged_for_a_while,
)
from vlm_distill_cache.stage2_student.training.pixels import keep_pixels
from vlm_distill_cache.stage2_student.training.preparation import Preparation, prepare
from vlm_distill_cache.stage2_student.training.steps import (
    clip_gradients,
    extended_training,
    gradient_sync,
    load_steps,
    scheduled_rates,
    set_learning_rates,
    step_totals,
    sum_terms,
)
from vlm_distill_cache.stage2_student.training.token_choice import save_gaze
from vlm_distill_cache.stage2_student.training.working import Working

_log = logging.getLogger(__name__)
AfterStep = Callable[[Position, StudentModel], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        log: One record a step, as in ``log.jsonl``; empty on other than the main process.
        model: The trained student, on its device.
        preparation: Encoder, tokenizer and joined data, for an evaluation in the same process.
        final: Folder with the saved student, tokenizer and image processor.
        scores: What was scored while training, as in ``evaluation.jsonl``; empty on other than the main process.
    """

    log: list[dict[str, Any]]
    model: StudentModel
    preparation: Preparation
    final: Path
    scores: list[dict[str, Any]]


def train(
    config: TrainConfig,
    *,
    caches: Mapping[str, TeacherCache] | None = None,
    after_step: AfterStep | None = None,
    extends: bool = False,
) -> TrainResult:
    """Train a student through its phases, from the newest checkpoint if there is one.

    Arguments, result and errors are those of `stage2_student.run.train_alone`, which keeps others out of the folder
    meanwhile.
    """
    hide_library_bars()
    divides = refuse_sharding(enter_launch().sharding, model="student", divides=True) or config.sharding != "none"
    refuse_undivided(config, divides=divides)
    refuse_callers_modes()
    check_machine(config, processes=enter_launch().size)
    refuse_pixel_folder(config)
    meet(enter_launch())
    # All processes: everything that can be wrong is found here, before the first step.
    run = prepare(config, caches)
    accelerator = build_accelerator(config, run.fingerprint)
    output, vocabulary = Path(config.output), vocabulary_rows(run.student)
    checkpoint, saved = resume_point(config, run, extends=extends)
    position = Position() if checkpoint is None else checkpoint.position
    refuse_apart(position, accelerator)
    if accelerator.is_main_process:  # if killed before it did
        drop_old_checkpoints(output, keep=config.keep_checkpoints, newest=checkpoint)
    student, sharded = place_student(run.student, accelerator, config, divides=divides)
    scored = start_scoring(config, accelerator, run, position, extends=extends)
    log = start_log(config, accelerator, run, position)
    keep_pixels(config, run.phases, run.pixels)
    parts = prepare_parts(config, student, saved)

    for index, phase in enumerate(run.phases[position.phase :], position.phase):
        # Once a phase: what is trained, and an optimizer that starts afresh or where the checkpoint left it.
        work = Working(
            phase, student, parts, saved, accelerator,
            seed=config.seed + index, sharded=sharded, optimizer=config.optimizer,
        )  # fmt: skip
        saved = None
        capture = AttentionCapture(work.core.language_model) if phase.objective.groups else None

        for micro_batches, timing in load_steps(phase, accelerator, position.step, config.num_workers):
            # Once a step: forward and backward over this process's part of the step's samples.
            terms: list[Losses] = []
            totals, entries = step_totals(micro_batches, accelerator, vocabulary=vocabulary)
            shares = step_shares(micro_batches, totals)
            for batch, share in zip(micro_batches, shares, strict=True):
                with gradient_sync(accelerator, work.model, last=len(terms) + 1 == len(micro_batches)):
                    terms.append(phase.objective(work.model, capture, batch.to(accelerator.device), share))
                    # The shares of all processes add up to one, and DDP and FSDP divide by their number.
                    accelerator.backward(terms[-1].total * accelerator.num_processes)
            clip_gradients(accelerator, work.parameters, config.clip, terms, where=(phase.name, position.step + 1))
            rates = scheduled_rates(phase, position.step)
            set_learning_rates(work.optimizer, rates)
            accelerator.sync_gradients = True  # shared with a caller's accelerators, and False would skip the step
            work.optimizer.step()
            work.optimizer.zero_grad(set_to_none=True)

            # Once a step: count, log; now and then: score, checkpoint.
            position = position.advance(phase.config.batch_size, entries)
            log.add(sum_terms(terms), step=position.total_steps, phase=phase.name, **rates, **timing(scored.seconds()))
            scored.reach(position, phase.name, log, work.bring_back)
            if position.step % config.checkpoint_every == 0 or position.step == phase.steps:
                log.flush(durably=True)
                work.save(output, position, fingerprint=run.fingerprint, keep=config.keep_checkpoints)
                scored.saved(position)
            if after_step is not None:
                work.bring_back()
                after_step(position, student)
        work.end()
        position = replace(position, phase=index + 1, step=0, samples=0)

    run.pixels.close()
    final = export(config, run, position, accelerator, log.records)
    if accelerator.is_main_process:
        drop_pixels(config)
    log.close()  # last: a service may wait long for what it could not send
    return TrainResult(log=log.records, model=student, preparation=run, final=final, scores=scored.lines)


def resume_point(
    config: TrainConfig, run: Preparation, *, extends: bool
) -> tuple[Checkpoint | None, Mapping[str, Any] | None]:
    """The newest sound checkpoint of a run and what it holds; to extend a finished run, that of its end.

    Raises:
        ConfigError: If checkpoints or student there are another run's, or cannot be extended.
    """
    output = Path(config.output)
    # Before checkpoints are looked at: of a shorter training those of the finished one's end would count as damaged.
    known = extended_training(config, run.phases, run.cache_hashes) if extends else None
    why = partial(differing_options, output, config, run.cache_hashes, offers=not extends)
    lengths = [(phase.steps, phase.config.batch_size) for phase in run.phases]
    found = find_resume_point(output, run.fingerprint, lengths, earlier=known, why=why)
    refuse_other_student(output / FINAL, run.fingerprint, earlier=known, why=why)
    if known is None:
        return found or (None, None)
    if found is None or found[0].position.phase != len(run.phases) - 1:
        raise ConfigError(
            f"--extend: {output} holds no sound checkpoint of its last phase to go on from; begin a new run from its student: "
            f"--student {output / FINAL} --output ANOTHER"
        )
    return found


def refuse_callers_modes() -> None:
    """Refuse modes of torch that a Python caller has switched on: another student would be trained, or none.

    Raises:
        ConfigError: Naming the mode and how to leave it.
    """
    modes = {
        "torch.set_grad_enabled(False), no_grad or inference_mode": not torch.is_grad_enabled(),
        "torch.autocast": any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda", "mps", "xpu")),
        f"torch.set_default_dtype({torch.get_default_dtype()})": torch.get_default_dtype() != torch.float32,
        f"torch.set_default_device({torch.get_default_device()})": torch.get_default_device().type != "cpu",
    }
    if found := [name for name, on in modes.items() if on]:
        raise ConfigError(
            f"this Python process has switched on {', '.join(found)}, which would change how students are trained; call "
            "train() outside of it, and choose by the options dtype and device"
        )


def build_accelerator(config: TrainConfig, fingerprint: str) -> Accelerator:
    """One accelerator for CPU, one device or many processes, as the launcher's environment says.

    Raises:
        ConfigError: If launched processes do not come, or cannot reach each other.
        CacheMismatchError: If they do not run the same: a cache at an address may change while they start.
    """
    # Without saying so on a machine without an accelerator, launched processes would not find each other.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    launch = enter_launch()
    meet(launch, limit_s=READY_S)
    choose_gpu(config.device, processes=launch.size)
    clean_environment(os.environ, launch)  # a Python caller may have set something since
    try:
        accelerator = Accelerator(mixed_precision="bf16" if config.dtype == "bfloat16" else "no", cpu=cpu)
    except ValueError as error:  # it is fixed once a process
        raise ConfigError(
            f"dtype={config.dtype}: something else in this process has chosen another precision or device "
            f"({error}); train in a process of its own"
        ) from error
    except RuntimeError as error:
        if launch.size == 1:
            raise
        raise ConfigError(
            f"the {launch.size} processes that {launch.launcher} started cannot reach each other "
            f"({str(error).partition(chr(10))[0]}); NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network"
        ) from error
    accelerator.gradient_accumulation_steps = 1  # shared with a caller's accelerators, and divides each loss
    if accelerator.num_processes != launch.size:
        raise ConfigError(
            f"{launch.size} processes were launched, but {accelerator.num_processes} found each other: they "
            "would write over one another's files. Use `accelerate launch` or `torchrun`, one process per device"
        )
    if accelerator.num_processes > 1 and len(set(gather_object([fingerprint]))) > 1:
        raise CacheMismatchError(
            "the processes of this run opened different caches or options: a cache changed while they started; "
            "start the run again"
        )
    return accelerator


def choose_gpu(device: str, *, processes: int) -> None:
    """Make a GPU that the options name the one of this process.

    Raises:
        ConfigError: If there is no such device here, or one is named for several processes.
    """
    refuse_device(device, processes=processes)
    _, _, index = device.partition(":")
    if index:
        torch.cuda.set_device(int(index))


def refuse_apart(position: Position, accelerator: Accelerator) -> None:
    """Raise a ConfigError if the processes of a run would go on from different checkpoints."""
    if accelerator.num_processes > 1 and len(set(gather_object([position]))) > 1:
        raise ConfigError(
            "the processes of this run do not all read its newest checkpoint: a disk that they share failed one of them, or "
            "their machines share none; start the run again, with an --output that all can read"
        )


def start_log(config: TrainConfig, accelerator: Accelerator, run: Preparation, position: Position) -> TrainingLog:
    """Make the output folder, write the configuration beside the output, open the log."""
    output = Path(config.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_config(without_secrets(config), output / CONFIG)
        if run.gaze is not None:
            save_gaze(output, run.gaze)
    accelerator.wait_for_everyone()
    done = [(phase.name, phase.steps) for phase in run.phases[: position.phase]]
    if position.step:
        name, steps = run.phases[position.phase].name, run.phases[position.phase].steps
        _log.info("goes on behind step %d of %d of phase %s, from the checkpoint there", position.step, steps, name)
        done.append((run.phases[position.phase].name, position.step))
    return TrainingLog(
        output,
        accelerator,
        done=done,
        flush_every=config.log_every,
        trackers=config.report_to,
        settings=config_to_dict(public_config(config)),
    )


def start_scoring(
    config: TrainConfig, accelerator: Accelerator, run: Preparation, position: Position, *, extends: bool
) -> Milestones:
    """Open what a student is scored on while it trains, and find what was scored before a position.

    Raises:
        ConfigError: If nothing can be scored, or what the best student is to be chosen by; or the folder is another run's.
        DataError: If the held-out data cannot be opened.
    """
    output, how, last = Path(config.output), config.evaluation, sum(phase.steps for phase in run.phases)
    scorer = None
    if how.every is not None and accelerator.is_main_process:
        scorer = open_scorer(config, run, accelerator.device)
    scored = Milestones(output, accelerator, scorer, every=how.every, last=last, run=run.fingerprint)
    scored.resume(position, earlier=extended_training(config, run.phases, run.cache_hashes) if extends else None)
    return scored


def open_scorer(config: TrainConfig, run: Preparation, device: torch.device) -> Scorer:
    """How the student of a run is scored on the way, on a device; errors as of `start_scoring`."""
    cache = run.caches.get(config.cache) or open_trusted(config.cache, verify=config.verify)
    split = split_on_the_way(config, cache)
    how = config.evaluation.while_training(split)
    student = Student(
        path=Path(config.output) / BEST,
        model=run.student,
        encoder=run.encoder,
        tokenizer=run.tokenizer,
        image_processor=run.image_processor,
        provenance={},
    )
    scoring = open_scoring(student, replace(config, evaluation=how), cache, unfit=_log.warning)
    if not scoring.names or how.best not in ("auto", *scoring.names):
        raise ConfigError(
            f"evaluation.every={how.every}: "
            + (f"evaluation.best={how.best} is not scored; choose" if scoring.names else "nothing can be scored;")
            + f" {' or '.join(scoring.names) or f'name held-out questions with {run_option()}, or leave it out'}"
        )
    by = scoring.names[0] if how.best == "auto" else how.best
    for note in scoring_notes(replace(config, evaluation=how), cache, scorable=True, option=run_option()):
        _log.info("while training: %s", note)

    def keep(folder: Path, kept: Kept, position: Position, log: Sequence[Mapping[str, Any]]) -> None:
        own = replace(run, fingerprint=fingerprint([run.fingerprint, kept.step]))
        write_student(folder, config, own, position, log, best=vars(kept))

    items = scoring.opened.items
    return Scorer(
        as_finished=partial(as_finished, run.student, device),
        score=scoring.report,
        keep=keep,
        by=by,
        described={
            "split": split,
            "limit": how.limit,
            "scored": {"pairs": len(items.pairs), "questions": len(items.questions)},
            "by": by,
        },
        of=fingerprint([config.data, config.images, by, scoring_options(replace(config, evaluation=how))]),
    )


@contextmanager
def as_finished(student: StudentModel, device: torch.device) -> Iterator[None]:
    """In the block a student is on a device and as it would be saved: adapters merged, in float32, whatever it is trained in."""
    autocast = vars(student).pop("forward", None)  # accelerate's, around the student's own
    home = next(student.parameters()).device  # of a divided one the CPU
    student.to(device)
    try:
        with widened(student), merged_for_a_while(student):
            yield
    finally:
        student.to(home)
        if autocast is not None:
            vars(student)["forward"] = autocast


def place_student(
    student: StudentModel, accelerator: Accelerator, config: TrainConfig, *, divides: bool
) -> tuple[StudentModel, bool]:
    """A student where it is trained, kept as its weights are to be: on the accelerator's device, or, to be divided, on the CPU.

    Returns:
        The student, and whether it is divided: not by a process that is alone.

    Raises:
        ConfigError: If it cannot be divided, or not all processes see the folder that they would write their shares to.
    """
    if not divides:
        if config.quantisation != "none":
            odd = pack_layers(decoder_layers(student), dtype=getattr(torch, config.dtype), device=accelerator.device)
            if odd:
                _log.warning(
                    "quantisation=4bit: %d layers stay as they are, because their rows are no whole blocks of %d: %s",
                    len(odd), BLOCK, odd[:3],
                )  # fmt: skip
        if config.weights == "bfloat16":
            round_weights(student)
        return student.to(accelerator.device), False
    output = Path(config.output)
    check_shardable(student)
    if accelerator.num_processes == 1:
        _log.info("sharding=fsdp2: there is one process, which trains the whole student")
        return student.to(accelerator.device), False
    output.mkdir(parents=True, exist_ok=True)
    made = temporary_for(output / FINAL, directory=True) if accelerator.is_main_process else None
    with made or nullcontext() as mine:
        seen = gather_object([Path(broadcast_object_list([mine])[0]).is_dir()])
    if not all(seen):
        raise ConfigError(
            f"sharding=fsdp2: process {seen.index(False)} does not see what process 0 writes to {output}, where each writes its "
            "share of a checkpoint; give an --output on a disk that all machines of this run share"
        )
    _log.info("the student is divided among %d processes by FSDP2", accelerator.num_processes)
    return student, True


def switch_dropout_off(student: StudentModel) -> None:
    """No dropout but LoRA's, as published; a library checkpoint may bring its own. Its configuration stays."""
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def prepare_parts(config: TrainConfig, student: StudentModel, saved: Mapping[str, Any] | None) -> TrainedParts:
    """The student's parts, as the phases before the checkpoint's left them."""
    if config.gradient_checkpointing:
        checkpoint_layers(student, tower=any(config.phase(name).trainable == "tower" for name in config.phases))
    switch_dropout_off(student)
    packs = partial(pack_layers, dtype=getattr(torch, config.dtype), device=next(student.parameters()).device)
    parts = TrainedParts(student, **vars(config.lora), pack=None if config.quantisation == "none" else packs)
    if saved is not None:
        parts.replay(saved["student"])
    return parts


def export(
    config: TrainConfig, run: Preparation, end: Position, accelerator: Accelerator, log: Sequence[Mapping[str, Any]]
) -> Path:
    """Save student, tokenizer and processor where `from_pretrained` finds all three, atomically.

    Beside them lies what the student is: how it was trained, the digests of all files, and a card for people.
    """
    final = Path(config.output) / FINAL
    if config.quantisation != "none":
        unpack_layers(decoder_layers(run.student))
    widen_weights(run.student)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_student(final, config, run, end, log)
    accelerator.wait_for_everyone()
    return final


def write_student(
    folder: Path, config: TrainConfig, run: Preparation, end: Position, log: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Write a run's student as it is at a position; ``more`` of what it says of itself. What was there goes."""
    clean_stale(folder.parent, folder.name)
    lengths = [
        (str(phase.name), steps, phase.config.batch_size, phase.config.rates)
        for phase, steps in zip(run.phases, end.steps_of([phase.steps for phase in run.phases]), strict=False)
    ]
    provenance = {
        "fingerprint": run.fingerprint,
        "caches": {public_location(place): found for place, found in run.cache_hashes.items()},
        "config": config_to_dict(public_config(config)),
        "encoder": dict(run.encoder_description),
        "vocabulary": {"entries_read": end.entries_read, "entries_beyond": end.entries_beyond},
        "origin": describe_origin(config, run.caches, lengths, log),
        **more,
    }
    with new_directory(folder) as temporary:
        save_student_folder(
            temporary,
            model=run.student,
            encoder=run.encoder,
            image_processor=run.image_processor,
            source=run.source,
        )
        provenance["files"] = list_files(temporary)
        write_signed(temporary / PROVENANCE, provenance)
        write_card(temporary, provenance, replaced=folder)
        remove(folder)
