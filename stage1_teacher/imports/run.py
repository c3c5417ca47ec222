"""Write a cache from log-probabilities that a served teacher gave. ``import_logprobs()`` is the main loop."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from vlm_distill_cache.common.cache.manifest import Manifest, refuse_nothing_usable, seal
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.config import save_replay
from vlm_distill_cache.common.errors import ConfigError, DataError, SampleError
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.common.tools.sinks import write_sinks
from vlm_distill_cache.data.sample import Dataset, Sample
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import BuildSummary
from vlm_distill_cache.stage1_teacher.imports.align import Aligner
from vlm_distill_cache.stage1_teacher.imports.distributions import MissingTarget, sparse_rows
from vlm_distill_cache.stage1_teacher.imports.forms import Reader
from vlm_distill_cache.stage1_teacher.imports.join import TokenJoin
from vlm_distill_cache.stage1_teacher.imports.misplaced import refuse_misplaced
from vlm_distill_cache.stage1_teacher.imports.rows import ServedRows
from vlm_distill_cache.stage1_teacher.imports.teacher import ServedTeacher
from vlm_distill_cache.stage1_teacher.imports.words import TokenWords
from vlm_distill_cache.stage1_teacher.loop.encode_ahead import count_workers, encode_shards
from vlm_distill_cache.stage1_teacher.loop.unknown_words import UnknownBudget, UnknownToken
from vlm_distill_cache.stage1_teacher.loop.writer import FailureBudget, Writer
from vlm_distill_cache.stage1_teacher.planning.cache_folder import (
    begun_otherwise,
    drop_damaged_manifest,
    in_use,
    intact_manifest,
    prepare_cache,
    refuse_replaced,
    refuse_unlisted,
    refuse_unwritable,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_data
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder, codecs_for, make_plan, teacher_directory
from vlm_distill_cache.stage1_teacher.quality.card import write_card
from vlm_distill_cache.stage1_teacher.teacher.export import export_processor
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)
SERVED = "it was served, and its weights were not at hand"


class _WithRows(Dataset):
    """A data set whose samples without a row fail before their pictures are opened."""

    def __init__(self, dataset: Dataset, rows: ServedRows) -> None:
        self.name, self.sample_ids = dataset.name, dataset.sample_ids
        self._dataset, self._rows = dataset, rows

    def __getitem__(self, index: int) -> Sample:
        if self.sample_ids[index] not in self._rows.places:
            raise SampleError(self._rows.missing())
        return self._dataset[index]


@dataclass(kw_only=True)
class _Finder:
    """From a sample in our tokens to the log-probabilities of its answers' tokens.

    Attributes:
        unseen: Samples of whose prompt the response says nothing.
        half: Rows whose target's probability is not told.
        bare: Samples of whose rows the response tells the target's log-probability alone.
    """

    rows: ServedRows
    reader: Reader
    aligner: Aligner
    codec: LogitCodec
    missing_target: MissingTarget
    template: str
    half: int = 0
    unseen: int = 0
    bare: int = 0

    def signals(self, sample: EncodedSample) -> dict[str, Any]:
        """What the writer takes of one sample; `SampleError` if its response cannot be used."""
        served = self.reader.read(self.rows.read(sample.sample_id))
        found = self.aligner.distributions(sample, served)
        labels = [int(sample.labels[row]) for row in sample.supervised_rows]
        refuse_misplaced(found, labels, sample.supervised_rows.tolist())
        live = sparse_rows(
            self.codec, found, labels, vocabulary=self.aligner.vocabulary, missing_target=self.missing_target
        )
        self.half += sum(label not in row for row, label in zip(found, labels, strict=True))
        self.unseen += not served.whole
        self.bare += live.token_ids.shape[1] == 1
        return {self.codec.signal: live}

    def report(self) -> None:
        """Log what could not be checked, or says little."""
        if self.half:
            logger.warning(
                "of %d answer tokens the probability is not told: they have half of what is possible", self.half
            )
        if self.unseen:
            logger.warning(
                "of %d samples the response holds the answer alone: that the server read the same picture, and the prompt of "
                "template %s, could not be checked",
                self.unseen,
                self.template,
            )
        if self.bare:
            logger.warning(
                "of %d samples the response tells how likely each answer token is and nothing of other tokens, which teaches "
                "little; ask the server for the likeliest tokens too (vLLM: prompt_logprobs=K, SGLang: top_logprobs_num=K)",
                self.bare,
            )


def import_logprobs(
    config: BuildConfig,
    files: Sequence[Path],
    *,
    form: str = "auto",
    name: str = "",
    missing_target: MissingTarget = "refuse",
    overwrite: bool = False,
) -> BuildSummary:
    """Write a sealed cache of logits from the log-probabilities in some files.

    Args:
        config: Options of stage one; of ``teacher`` only tokenizer, ``config.json`` and image processor are read.
        files: JSON lines or parquet, or folders of such.
        form: See `imports.forms.FORMS`; ``auto`` tells it by each row.
        name: Of the teacher; empty: what the responses call the model, or else the folder's name.
        missing_target: See `imports.distributions.sparse_rows`.
        overwrite: Start again in a folder that holds a cache with other options.

    Returns:
        What this run did; nothing is written when the cache is already complete.

    Raises:
        DistillError: With the remedy, if files, teacher, data or folder cannot be used.
        OSError: If the folder cannot be written.
    """
    _refuse_options(config)
    cache_dir = Path(config.cache)
    refuse_unwritable(cache_dir)
    dataset = open_data(config, cache_dir)
    directory = teacher_directory(teacher=config.teacher, data=config.data, scratch=cache_dir.parent, cache=cache_dir)
    teacher = ServedTeacher(directory, name=name)
    described = cast("Teacher", teacher)  # planning reads no more of it than a served one has
    encoder = build_encoder(
        described,
        template=config.template,
        max_length=config.max_length,
        long_samples=config.long_samples,
        frames=config.frames,
    )
    codecs = codecs_for(config, described)
    join = TokenJoin(dataset, encoder)
    with ServedRows.of(files, dataset.sample_ids, join=join.samples_of) as rows:
        rows.report()
        teacher.name = name or _model_name(rows) or teacher.name
        plan = make_plan(config, dataset=dataset, teacher=described, encoder=encoder, codecs=codecs)
        plan = _as_served(plan, teacher, rows, missing_target)
        finder = _Finder(
            rows=rows,
            reader=Reader(form=form, words=TokenWords(teacher.tokenizer)),
            aligner=Aligner(
                tokenizer=teacher.tokenizer, image_token_id=teacher.image_token_id, vocabulary=teacher.vocabulary
            ),
            codec=codecs[LogitCodec.signal],
            missing_target=missing_target,
            template=encoder.template.name,
        )
        overwrite = overwrite or begun_otherwise(cache_dir, plan)
        with in_use(cache_dir, alone=overwrite):
            plan = prepare_cache(cache_dir, plan, overwrite=overwrite)
            save_replay(None, cache_dir)  # of a build that was here before
        with in_use(cache_dir):
            todo = missing_shards(cache_dir, plan)
            if not todo and (manifest := intact_manifest(cache_dir)) is not None:
                refuse_nothing_usable(cache_dir, plan)
                return BuildSummary(cache=cache_dir, manifest=manifest)
            files_of = export_processor(encoder.tokenizer, encoder.image_encoder, cache_dir / "processor")
            known = [f"processor/{file}" for file in files_of]
            refuse_unlisted(cache_dir, known)

            # The main loop: the next shard is encoded, and the last samples written, while responses are read.
            budget = FailureBudget.of_finished(cache_dir, plan, share=config.max_failed_share)
            words = UnknownToken.of(encoder)
            targets = UnknownBudget.of_finished(cache_dir, plan, words=words, share=config.max_unknown_share)
            started, samples = time.monotonic(), 0
            workers = count_workers(config.num_workers, torch.device("cpu"), len(dataset))
            rows_of = _WithRows(dataset, rows)
            shards = encode_shards(rows_of, encoder, plan, todo, workers=workers, scratch=cache_dir)
            total = sum(len(plan.shard_range(shard)) for shard in todo)
            with Writer(cache_dir, plan, codecs) as writer, progress("import", total=total, unit="sample") as bar:
                for shard in shards:
                    for sample in list(shard.samples):
                        try:
                            found = finder.signals(sample)
                        except SampleError as error:
                            shard.samples.remove(sample)
                            shard.fail(sample.sample_id, str(error))
                        else:
                            writer.add(collate([sample], teacher.pad_token_id), found)
                    refuse_replaced(cache_dir, plan)
                    targets.spend(shard.samples, failed=len(shard.failed))
                    budget.spend(shard.failed)
                    writer.finish(shard, unknown=words.count(shard.samples))
                    samples += len(shard.samples)
                    bar.update(len(shard.samples) + len(shard.failed))
                writer.wait()
            finder.report()
            seconds = time.monotonic() - started
            FailureBudget.of_finished(cache_dir, plan, share=config.max_failed_share).spend(())
            manifest = _finish(cache_dir, plan, known)
    return BuildSummary(cache=cache_dir, built=len(todo), samples=samples, seconds=seconds, manifest=manifest)


def _finish(cache_dir: Path, plan: Plan, known: Sequence[str]) -> Manifest:
    """Write the card of a cache whose shards are all there, and seal it; there is no teacher to compare it with."""
    refuse_nothing_usable(cache_dir, plan)
    write_card(cache_dir, plan, None, sinks=write_sinks(cache_dir))
    refuse_unlisted(cache_dir, known)
    drop_damaged_manifest(cache_dir)
    return seal(cache_dir, rewritten=True)


def _refuse_options(config: BuildConfig) -> None:
    """Refuse options that only a teacher at hand could fulfil."""
    if config.signals != (LogitCodec.signal,):
        raise ConfigError(
            f"signals: {', '.join(config.signals)} cannot be had of a served teacher, only {LogitCodec.signal}"
        )
    if config.answers != "data":
        raise ConfigError(
            "answers=generate: a served teacher cannot be asked; put the answers that it wrote into the data, and give those"
        )
    if config.temperatures != (1.0,):
        raise ConfigError(
            f"temperatures: {list(config.temperatures)} cannot be known: log-probabilities of some tokens tell the mass of "
            "all others at temperature 1 only; leave temperatures out"
        )
    if not config.teacher:
        raise ConfigError(
            "no teacher given: --teacher DIR, a folder with config.json, tokenizer and image processor of the model that was served"
        )


def _model_name(rows: ServedRows) -> str:
    """What the responses call the model."""
    if len(rows.models) > 1:
        raise DataError(
            f"the responses are of several models: {', '.join(map(repr, list(rows.models)[:5]))}; give those of one, or, if they "
            "are names of one, --teacher-name NAME"
        )
    return next(iter(rows.models), "")


def _as_served(plan: Plan, teacher: ServedTeacher, rows: ServedRows, missing_target: MissingTarget) -> Plan:
    """Say in a plan that its teacher was served, and what the cache is made of."""
    described = plan.teacher | {"name": teacher.name, "served": True, "no_projector": SERVED}
    made_of = {"responses": rows.digest, **({} if missing_target == "refuse" else {"missing_target": missing_target})}
    return replace(plan, teacher=described, data=plan.data | made_of)
