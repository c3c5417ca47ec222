"""What a training run is: phases, losses, budgets. Only the command line, `train()` and `run` see these."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from vlm_distill_cache.common.config import Word, config_to_dict, take_paths
from vlm_distill_cache.common.hub import public_name
from vlm_distill_cache.common.locations import is_url, public_location
from vlm_distill_cache.stage2_student.loss_weights import LossWeights, require
from vlm_distill_cache.stage2_student.presets.words import WORDS_OF_A_PHASE, WORDS_OF_ADAPTERS, words_of_a_run
from vlm_distill_cache.stage2_student.pruned_folder import PruningConfig, kept_share, one_name, pruning_record

PhaseName = Literal["dpt", "dft", "sft"]
Schedule = Literal["cosine", "constant"]
RateName = Literal["lr", "projector_lr", "tower_lr"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)[:-1]
Split = Literal["validation", "test"]
BestBy = Literal[
    "auto", "likelihood", "likelihood_per_token", "letters/mean", "questions", "teacher/top1", "teacher/kl"
]
TokenSelection = Literal["attention", "sinks", "gaze", "grid", "random"]
DecodingSelection = Literal["shift", "fixed"]
RATES: tuple[RateName, ...] = ("lr", "projector_lr", "tower_lr")
PHASE_NAMES: tuple[PhaseName, ...] = ("dpt", "dft", "sft")
SHARE_OF = "samples drawn at random from each source"
_BUILT_IN = "stage1_teacher/builtin"  # the teacher's folder in a clone
MODELS = ("student", "student_weights", "teacher", "vision_tower", "language_model")
# Options that change when a run ends and what it prints, not what it learns.
MOST, MOST_SAMPLES = 2**40, 2**20  # larger ones are slips of the finger
SPEED_OPTIONS = (
    "device", "num_workers", "memory_gib", "pixel_cache", "pixel_cache_gib", "checkpoint_every", "keep_checkpoints", "log_every",
    "gradient_checkpointing", "sharding", "verify", "report_to",
)  # fmt: skip
SAVINGS = ("optimizer", "weights", "quantisation")  # of memory; not with a divided student
# How many visual tokens there are, and how they are chosen.
TOKEN_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "visual_tokens": ("token_selection", "sink_penalty", "merge_frames"),
    "decoding_tokens": ("decoding_selection", "shift_threshold"),
}
# How runs name it that were described before both stages had one word for it; fingerprints stay what they are.
_PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def _within(owner: object, name: str, low: int, high: int | None = None, unit: str = "") -> None:
    """Refuse a field that is a number outside of a range, whose end may be open; None is no number."""
    value = getattr(owner, name)
    ok = value is None or (low <= value and (high is None or value <= high))
    require(ok, name, value, f"{low} {'or more' if high is None else f'to {high}'} {unit}".rstrip())


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of training.

    Attributes:
        steps: Optimizer steps; none: given by ``epochs``.
        epochs: Passes over the phase's samples; none: given by ``steps``.
        batch_size: Samples per optimizer step, over all processes and micro-batches.
        micro_batch_size: Most samples in one forward pass of one process; none: no limit.
        lr: Peak learning rate.
        projector_lr: That of the projector side; none: ``lr``. LLaVA-1.5 takes 2e-5 beside 2e-4 for its adapters.
        tower_lr: That of the vision tower where ``trainable=tower``; none: ``lr``.
        warmup: Share of the steps during which the learning rate rises, in [0, 1).
        schedule: Learning rate after the warm-up.
        weight_decay: Weight decay of matrices; vectors have none.
        trainable: ``projector`` (the student's projector side), ``all`` (the language model too), ``lora`` (the projector
            side, and low-rank adapters in the language model), or ``tower`` (``all`` and the vision tower, which is frozen
            otherwise; not with the teacher's projector, ``taf``).
        freeze: Parts named by ``trainable`` that are not trained after all: ``projector``, ``embeddings`` (of tokens),
            ``lm_head`` (the output projection; where it is tied to the embedding, freezing one freezes both).
        losses: Weights and kinds of the losses.
        data: This phase's data set; none: the run's.
        images: This phase's image folder; none: the run's.
        cache: This phase's teacher cache; none: the run's.
    """

    WORDS: ClassVar[Mapping[str, Word]] = WORDS_OF_A_PHASE

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr: float = 2e-3
    projector_lr: float | None = None
    tower_lr: float | None = None
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    trainable: Literal["projector", "all", "lora", "tower"] = "all"
    freeze: tuple[Literal["projector", "embeddings", "lm_head"], ...] = ()
    losses: LossWeights = field(default_factory=LossWeights)
    data: str | None = None
    images: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        take_paths(self)
        both = self.steps is not None and self.epochs is not None
        require(not both, "steps and epochs", (self.steps, self.epochs), "one of the two, not both")
        _within(self, "steps", 0, MOST, "optimizer steps")
        _within(self, "epochs", 0, MOST, "passes")
        _within(self, "batch_size", 1, MOST_SAMPLES, "samples")
        _within(self, "micro_batch_size", 1, None, "samples")
        for name, rate in self.rates.items():
            require(0 < rate < math.inf, name, rate, "a finite number above 0")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share of the steps in [0, 1)")
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more, finite")
        nothing = self.trainable == "projector" and "projector" in self.freeze
        need = "without projector where trainable is projector: nothing would be trained"
        require(not nothing, "freeze", self.freeze, need)
        frozen = self.projector_lr is not None and "projector" in self.freeze
        require(not frozen, "projector_lr", self.projector_lr, "unset where freeze names the projector")
        no_tower = self.tower_lr is not None and self.trainable != "tower"
        require(
            not no_tower, "tower_lr", self.tower_lr, "unset where trainable is not tower: the vision tower is frozen"
        )

    @property
    def rates(self) -> dict[RateName, float]:
        """Peak learning rates by name: ``lr``, and those of parts that have their own."""
        return {name: rate for name in RATES if (rate := getattr(self, name)) is not None}

    def step_count(self, samples: int) -> int:
        """Optimizer steps of this phase over ``samples`` samples."""
        if self.steps is not None:
            return self.steps
        return -(-round((self.epochs or 0.0) * samples) // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters of phases whose ``trainable`` is ``lora``; each such phase begins with new ones.

    Attributes:
        rank: Rank of each adapter.
        alpha: Scale: an adapter adds ``alpha / rank`` times its product.
        dropout: Dropout on an adapter's input, in [0, 1).

    Source:
        CompoDistill (arXiv:2510.12184): r = 128, alpha = 256. Dropout is off, as everywhere in this project.
    """

    WORDS: ClassVar[Mapping[str, Word]] = WORDS_OF_ADAPTERS

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "1 or more")
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """Which frames of a video a student reads; the times of the teacher's are matched with them.

    Attributes:
        fps: Frames a second; none: as the teacher of the cache.
        most: Where that would be more frames than this, so many at uniform times instead; none: as the teacher of the cache.
    """

    fps: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        require(self.fps is None or 0.001 <= self.fps <= 1000, "fps", self.fps, "frames a second, 0.001 to 1000")
        require(self.most is None or 1 <= self.most < 2**16, "most", self.most, "1 to 65535 frames")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How students are scored.

    Attributes:
        data: Data set of the held-out items; none: the run's.
        images: Its image folder; none: the run's.
        split: ``validation`` or ``test``, where the data set has splits.
        limit: Most items of each sort; none: the data set's own number.
        letters: Also ask for the letter of the right caption (two generations per pair).
        agreement_samples: Cached samples on which student and teacher are compared; 0 skips it.
        overlays: Cached samples that the report shows beside the teacher, word by word.
        every: Also score while training, into ``OUTPUT/evaluation.jsonl``: at every so many optimizer steps of the run, and
            at the last; none: only the trained student.
        items: Most items of each sort that are scored then: the first, of the split ``validation`` where the data have it.
        best: The score by which ``OUTPUT/best`` is the best student so far; ``auto``: the first that there is of captions by
            likelihood, questions and agreement with the teacher.
    """

    WORDS: ClassVar[Mapping[str, Word]] = {"eval_steps": Word(options=("every",))}

    data: str | None = None
    images: str | None = None
    split: Split = "test"
    limit: int | None = None
    letters: bool = True
    agreement_samples: int = 64
    overlays: int = 6
    every: int | None = None
    items: int = 32
    best: BestBy = "auto"

    def __post_init__(self) -> None:
        take_paths(self)
        _within(self, "limit", 1, None, "items")
        _within(self, "agreement_samples", 0)
        _within(self, "overlays", 0)
        _within(self, "every", 1, None, "optimizer steps")
        _within(self, "items", 1)

    def while_training(self, split: Split) -> "EvaluationConfig":
        """How a student is scored on the way: the same, of fewer items."""
        return replace(self, split=split, limit=min(self.items, self.limit or self.items))


_OF_PHASES = [part.name for part in fields(PhaseConfig) if part.name not in ("losses", "data", "images", "cache")]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        student: A name (``mobilevlm``, ``mobilevlm-v1-tiny``, ``smolvlm``, ...), a folder, or a name on the hub
            (``org/name[@revision]``); docs/families.md lists them.
        student_weights: The weights of a student given by its short name: a folder or a name on the hub.
        teacher: What a student ``pruned:KEEP`` is cut out of, a folder or a name on the hub; other students need none.
        vision_tower: The student's vision tower, a folder or a name on the hub; none: the cache's, or the student's own.
        language_model: A language model to start from, a folder or a name on the hub; none: random weights.
        projector: Projector type: ``ldpnet``, ``ldpnetv2``, ``mlp`` or ``taf``; none: the student's own.
        pool_teacher_tokens: With projector ``taf``: pool the teacher's tokens 2x2 before the post-projector.
        visual_tokens: Feed the language model only so many of a picture's visual tokens: a share below 1, or a whole number of
            2 or more; none: all (of a student that says itself how many, so many). docs/visual-tokens.md says more.
        token_selection: Which ones: ``attention`` (those that the vision tower looks at most), ``sinks`` (the same, minus
            ``sink_penalty`` times how much of a sink a place is in the cache), ``gaze`` (where the teacher looked; at inference
            where a regression on the tower's features expects that), ``grid`` (an average pool), ``random``.
        sink_penalty: Weight of a place's sink score, which is in [0, 1], against the attention, whose sum over places is 1.
        merge_frames: Of several pictures of one size in a sample, leave out what stays as alike as this cosine from one to the
            next, in (0, 1); none: nothing.
        decoding_tokens: Of the visual tokens that were read with the prompt, each generated token looks at so many; as
            ``visual_tokens``; none: all.
        decoding_selection: ``fixed``: those that the prompt's last token looked at most; ``shift``: others as soon as the
            student's own gaze shifts.
        shift_threshold: The gaze has shifted where the kept tokens hold less than this share, in (0, 1], of what the best
            would.
        frames: Which frames of a video the student reads.
        most_pictures: Samples with more pictures and videos are refused; none: as many as the student can take. Of a student
            whose frames are pictures, a video has so many of its frames as are left.
        pictures_beyond: ``refuse``, or ``drop``: the student reads the first ``most_pictures`` of such samples, and learns of
            the teacher's gaze what falls on these.
        visual_token_budget: Most visual tokens of a sample: frames of its videos are left out, at uniform times, until they
            fit; none: all.
        template: Prompt template; none: the cache's, the only one that fits its labels.
        data: Data set, as for stage one; none: what the cache was built from. A mixture's weights say how often its samples
            are seen in an epoch.
        images: Folder that relative image paths start from.
        limit: Use only the first samples, in the order of the cache (of a mixture, those of each entry in proportion); none: all.
        data_share: Use only this share of each phase's samples (of the first ``limit`` where that is set), drawn at random by
            ``seed``, of each source alike: entries of a mixture, files, what an entry calls its ``source``, folders of
            pictures; in (0, 1].
        cache: Teacher cache: a folder, or an address (``s3://``, ``hf://datasets/``, ``https://``). Of a mixture whose entries
            have a cache each, any of these; all are read.
        output: Folder for everything the run writes.
        phases: Phases to run, in this order.
        dpt: Distilled pre-training.
        dft: Distilled fine-tuning.
        sft: Supervised fine-tuning.
        lora: Adapters of the phases that set ``trainable=lora``.
        pruning: How a student ``pruned:KEEP`` is cut out of its teacher.
        gradient_checkpointing: Compute each decoder layer again in the backward pass: less memory, a third more time, the
            same result.
        sharding: ``fsdp2`` divides the student, its gradients and the optimizer's averages among the processes of ``distill
            train`` (torch's FSDP2): a student that is too large to be trained on one device; the same result up to rounding.
        optimizer: ``adamw``, or ``adamw8bit`` (bitsandbytes): its two averages take 2 bytes a parameter instead of 8.
        weights: What weights are kept in: ``float32``, or ``bfloat16``: half of the memory of weights and gradients. Steps are
            then taken in float32 and rounded at random, up or down by how near each is, so that small ones are not lost. It
            needs ``dtype=bfloat16``.
        quantisation: ``4bit`` (NF4, by bitsandbytes) packs the decoder's linear layers, which then only adapters train
            (``trainable=lora``): QLoRA.
        seed: Seed of the student's fresh weights, of the order of samples, and of which samples are a ``data_share``.
        dtype: ``float32``, or ``bfloat16`` for mixed precision: the arithmetic; weights stay in float32 unless ``weights`` says
            otherwise.
        device: ``auto`` (an accelerator if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        clip: Gradients are clipped to this norm.
        num_workers: Loading threads; 0 loads on the training thread.
        memory_gib: Memory for encoded samples, GiB; for small data sets.
        pixel_cache: Where pictures are kept as they were scaled for the student, so that each is decoded once: ``auto`` (in the
            output folder until the end, where pictures are read more than once), ``none``, or a folder, which stays and which
            any number of runs may share.
        pixel_cache_gib: Room for them, GiB, and at most half of what is free there; other pictures are decoded each time.
        shuffle_window: Shards whose samples are mixed with each other.
        checkpoint_every: Optimizer steps between checkpoints.
        keep_checkpoints: Number of checkpoints to keep.
        log_every: Steps between writes of the log, which has a line per step.
        report_to: Where the log's curves are drawn: ``tensorboard`` (in ``OUTPUT/tensorboard``), ``wandb``, ``mlflow``,
            ``trackio``, several of them, or ``none``: ``log.jsonl`` alone. ``--log-with`` is the same.
        max_length: Longest sequence of a sample, tokens; none: the cache's.
        verify: Before the first use of a cache on this machine, look through all of its records for what no teacher can have
            said: token ids beyond the vocabulary, masses above one, numbers that are none.
        shuffle_teacher_images: Control experiment: take attention signals from another image.
        evaluation: How ``distill run`` and ``distill evaluate`` score the student.
        license: Licence of the student, as an identifier of the Hugging Face Hub or free text; for its card.
    """

    WORDS: ClassVar[Mapping[str, Word]] = words_of_a_run(PHASE_NAMES, _OF_PHASES, TRACKERS)

    student: str = "mobilevlm"
    student_weights: str | None = None
    teacher: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    projector: str | None = None
    pool_teacher_tokens: bool = False
    visual_tokens: float | None = None
    token_selection: TokenSelection = "attention"
    sink_penalty: float = 0.03
    merge_frames: float | None = None
    decoding_tokens: float | None = None
    decoding_selection: DecodingSelection = "shift"
    shift_threshold: float = 0.75
    frames: FramesConfig = field(default_factory=FramesConfig)
    most_pictures: int | None = None
    pictures_beyond: Literal["refuse", "drop"] = "refuse"
    visual_token_budget: int | None = None
    template: str | None = None
    data: str | None = None
    images: str | None = None
    limit: int | None = None
    data_share: float = 1.0
    cache: str = ""
    output: str = ""
    phases: tuple[PhaseName, ...] = ("dpt", "dft", "sft")
    dpt: PhaseConfig = field(default_factory=PhaseConfig)
    dft: PhaseConfig = field(default_factory=PhaseConfig)
    sft: PhaseConfig = field(default_factory=PhaseConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    gradient_checkpointing: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weights: Literal["float32", "bfloat16"] = "float32"
    quantisation: Literal["none", "4bit"] = "none"
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    clip: float = 1.0
    num_workers: int = 1
    memory_gib: float = 1.0
    pixel_cache: str = "auto"
    pixel_cache_gib: float = 32.0
    shuffle_window: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    report_to: tuple[Tracker, ...] = TRACKERS[:1]
    max_length: int | None = None
    verify: bool = True
    shuffle_teacher_images: bool = False
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    license: str = ""

    def __post_init__(self) -> None:
        take_paths(self)
        require(self.license.isprintable(), "license", self.license, "one line of text")
        require(self.cache != "", "cache", self.cache, "a teacher cache's folder or address (--cache)")
        require(self.output != "", "output", self.output, "a folder to write to (--output)")
        require(not is_url(self.output), "output", self.output, "a folder of this machine, not an address")
        given: object = self.report_to
        if isinstance(given, str):  # in Python, as it was before there could be several
            object.__setattr__(self, "report_to", tuple(given.replace(",", " ").split()))
        if self.report_to == ("none",):
            object.__setattr__(self, "report_to", ())
        known = f"names among {', '.join(TRACKERS)}, or none alone"
        trackers = "report_to (--log-with)"
        require(set(self.report_to) <= set(TRACKERS), trackers, self.report_to, known)
        for name, names in (("phases", self.phases), (trackers, self.report_to)):
            require(len(set(names)) == len(names), name, names, "without repetition")
        require(bool(self.phases), "phases", self.phases, "at least one of dpt, dft, sft")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        require(0 < self.clip < math.inf, "clip", self.clip, "a finite gradient norm above 0")
        device = re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device)
        require(device is not None, "device", self.device, "auto, cpu, cuda or cuda:N")
        for name in ("shuffle_window", "checkpoint_every", "keep_checkpoints", "log_every"):
            _within(self, name, 1)
        _within(self, "num_workers", 0, None, "threads")
        _within(self, "memory_gib", 0, MOST, "GiB")
        _within(self, "pixel_cache_gib", 0, MOST, "GiB")
        place = self.pixel_cache != "" and not is_url(self.pixel_cache)
        require(place, "pixel_cache", self.pixel_cache, "auto, none, or a folder of this machine")
        _within(self, "limit", 1, None, "samples")
        _within(self, "max_length", 1, None, "tokens")
        _within(self, "most_pictures", 1, None, "pictures")
        _within(self, "visual_token_budget", 1, None, "visual tokens")
        require(0 < self.data_share <= 1, "data_share", self.data_share, "above 0 and at most 1")
        self._check_tokens()
        self._check_savings()
        built_in = f": {_BUILT_IN}, where that is the built-in one" if Path(_BUILT_IN).is_dir() else ""
        need = f"the directory of the teacher (--teacher) that student {self.student} is cut out of{built_in}"
        kept = kept_share(self.student)
        require(kept is None or self.teacher is not None, "teacher", self.teacher, need)
        changed = [name for name, value in vars(self.pruning).items() if value != getattr(PruningConfig(), name)]
        need = f"left out: only a student pruned:KEEP is cut, and student is {self.student}"
        for name in changed[: kept is None]:
            require(False, f"pruning.{name}", getattr(self.pruning, name), need)

    def _check_tokens(self) -> None:
        """Refuse numbers of visual tokens that are none, and how to choose what is not chosen."""
        for name in TOKEN_OPTIONS:
            value, need = getattr(self, name), "a share below 1, or a whole number of 2 or more; leave it out for all"
            require(value is None or 0 < value < 1 or (value >= 2 and value % 1 == 0), name, value, need)
        require(0 <= self.sink_penalty < math.inf, "sink_penalty", self.sink_penalty, "0 or more, finite")
        merge = self.merge_frames
        require(merge is None or 0 < merge < 1, "merge_frames", merge, "a cosine above 0 and below 1")
        require(0 < self.shift_threshold <= 1, "shift_threshold", self.shift_threshold, "a share above 0 and at most 1")
        for head, names in TOKEN_OPTIONS.items():
            for name in names if getattr(self, head) is None else ():
                plain = _default(name)
                need = (
                    f"{plain!r}, or leave it out, where {head} is not set: all tokens are taken then; set {head}, too"
                )
                require(getattr(self, name) == plain, name, getattr(self, name), need)
        by = self.token_selection
        need = f"0.03, or leave it out, where token_selection is {by}: it is of token_selection=sinks"
        require(by == "sinks" or self.sink_penalty == _default("sink_penalty"), "sink_penalty", self.sink_penalty, need)
        need = f"0.75, or leave it out, where decoding_selection is {self.decoding_selection}: nothing is noticed there"
        fixed = self.decoding_selection == "fixed" and self.shift_threshold != _default("shift_threshold")
        require(not fixed, "shift_threshold", self.shift_threshold, need)

    def _check_savings(self) -> None:
        """Refuse ways of saving memory that do not go together."""
        half = self.weights == "float32" or self.dtype == "bfloat16"
        need = f"float32 where dtype is {self.dtype}: set dtype=bfloat16, too, or leave weights out"
        require(half, "weights", self.weights, need)
        for name in SAVINGS if self.sharding != "none" else ():
            need = f"{_default(name)} where sharding is {self.sharding}, which divides all of that: leave one of the two out"
            require(getattr(self, name) == _default(name), name, getattr(self, name), need)
        if self.quantisation == "none":
            return
        for name in self.phases:
            trained = self.phase(name).trainable
            need = f"projector or lora where quantisation is {self.quantisation}: packed weights cannot be trained"
            require(trained in ("projector", "lora") or self.phase(name).steps == 0, f"{name}.trainable", trained, need)
        every = self.evaluation.every
        need = "none where quantisation is 4bit: score the trained student, by `distill evaluate`"
        require(every is None, "evaluation.every", every, need)

    @property
    def follows_gaze(self) -> bool:
        """Whether the teacher's gaze chooses visual tokens in training."""
        return self.visual_tokens is not None and self.token_selection == "gaze"

    def phase(self, name: PhaseName) -> PhaseConfig:
        """A phase's configuration with the run's data, images and cache filled in."""
        phase: PhaseConfig = getattr(self, name)
        return replace(
            phase, data=phase.data or self.data, images=phase.images or self.images, cache=phase.cache or self.cache
        )


def _default(name: str) -> Any:
    return next(part.default for part in fields(TrainConfig) if part.name == name)


def scoring_options(config: TrainConfig) -> dict[str, Any]:
    """How a trained student is scored, plain values; what is scored on the way changes nothing of it."""
    how: dict[str, Any] = config_to_dict(config.evaluation)
    return {name: value for name, value in how.items() if name not in ("every", "items", "best")}


def without_teacher(config: TrainConfig) -> TrainConfig:
    """The SFT baseline of a run: the same student, samples, steps and rates, with the LM loss alone."""
    plain = {name: replace(getattr(config, name), losses=LossWeights()) for name in PHASE_NAMES}
    projector, pooled = config.projector, config.pool_teacher_tokens
    if projector == "taf" or (projector is None and config.student.startswith("compodistill")):
        # Without the teacher's projector, but with as many visual tokens: only then are the two comparable.
        projector = "ldpnetv2" if pooled else "mlp"
    return replace(config, **plain, projector=projector, pool_teacher_tokens=False, shuffle_teacher_images=False)


def as_cut(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration of a run whose student is cut out of its teacher already."""
    return replace(config, student=str(folder), pruning=PruningConfig())


def without_secrets(config: TrainConfig) -> TrainConfig:
    """A run's configuration as it may be written down: addresses of caches have no signatures."""
    public = {
        name: replace(getattr(config, name), cache=public_location(cache))
        for name in PHASE_NAMES
        if (cache := getattr(config, name).cache) is not None
    }
    return replace(config, cache=public_location(config.cache), **public)


def public_config(config: TrainConfig) -> TrainConfig:
    """A run's configuration as it may be published with its student: models of the hub by repository and commit too."""
    return replace(without_secrets(config), **_public_models(config))


def _public_models(config: TrainConfig) -> dict[str, Any]:
    return {name: public_name(given) for name in MODELS if (given := getattr(config, name)) is not None}


def describe(config: TrainConfig, cache_hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a run is: everything that changes its result; folders, threads and log settings do not.

    Returns:
        JSON; caches are named by their hash, models of the hub by repository and commit, so that a moved cache is
        the same cache.
    """
    from vlm_distill_cache.data.sources.mixture import mixture_weights, own_caches  # numpy: not before there is work

    described = config_to_dict(config) | _public_models(config)
    for name in ("output", "evaluation", "license", *SPEED_OPTIONS):
        del described[name]
    for head, names in TOKEN_OPTIONS.items():
        for name in (head, *names) if described[head] is None else ():
            del described[name]  # as runs were described before tokens could be chosen
    for name in ("frames", "most_pictures", "pictures_beyond", "visual_token_budget", *SAVINGS):
        if getattr(config, name) == getattr(TrainConfig(cache="x", output="x"), name):
            del described[name]  # as runs were described before there was a choice
    described["precision"] = _PRECISIONS[described.pop("dtype")]
    described["cache"] = cache_hashes.get(config.cache)
    if config.data_share < 1:
        described["data_share_of"] = SHARE_OF  # versions before took the first samples, which are other ones
    described["student"] = one_name(described["student"])
    if config.pruning == PruningConfig():
        del described["pruning"]  # as runs had it before there was a choice
    if pruned := pruning_record(config.student):
        # Cut out of its teacher on the way: what it is, not where the run has put it.
        described["student"] = pruned
    for name in PHASE_NAMES:
        phase, given = described[name], config.phase(name)
        phase["cache"] = cache_hashes.get(phase["cache"])
        if phase["losses"]["visual_columns_kind"] == LossWeights.visual_columns_kind:
            del phase["losses"]["visual_columns_kind"]  # as runs had it before there were several
        for rate in RATES[1:]:
            if phase[rate] is None:
                del phase[rate]  # as runs had it before parts could have rates of their own
        if weights := mixture_weights(given.data):
            phase["weights"] = weights
        if name in config.phases and (places := own_caches(given.data, str(given.cache))):
            phase["caches"] = [cache_hashes.get(place) for place in places]
    return described
