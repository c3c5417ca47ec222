"""What a training run is: phases, losses, budgets. Only the command line, `train()` and `run` see these."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args

from vlm_distill_cache.common.config import NOT_HERE, SAYS_NOTHING, SHARED_WORDS, Word, config_to_dict, take_paths
from vlm_distill_cache.common.hub import public_name
from vlm_distill_cache.common.locations import is_url, public_location
from vlm_distill_cache.stage2_student.loss_weights import LossWeights, require
from vlm_distill_cache.stage2_student.pruned_folder import kept_share, pruning_record

PhaseName = Literal["dpt", "dft", "sft"]
Schedule = Literal["cosine", "constant"]
RateName = Literal["lr", "projector_lr", "tower_lr"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)[:-1]
Split = Literal["validation", "test"]
BestBy = Literal[
    "auto", "likelihood", "likelihood_per_token", "letters/mean", "questions", "teacher/top1", "teacher/kl"
]
RATES: tuple[RateName, ...] = ("lr", "projector_lr", "tower_lr")
PHASE_NAMES: tuple[PhaseName, ...] = ("dpt", "dft", "sft")
MODELS = ("student", "student_weights", "teacher", "vision_tower", "language_model")
# Options that change when a run ends and what it prints, not what it learns.
MOST, MOST_SAMPLES = 2**40, 2**20  # larger ones are slips of the finger
SPEED_OPTIONS = (
    "device", "num_workers", "memory_gib", "checkpoint_every", "keep_checkpoints", "log_every",
    "gradient_checkpointing", "verify", "report_to",
)  # fmt: skip
# How runs name it that were described before both stages had one word for it; fingerprints stay what they are.
_PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def _within(owner: object, name: str, low: int, high: int | None = None, unit: str = "") -> None:
    """Refuse a field that is a number outside of a range, whose end may be open; None is no number."""
    value = getattr(owner, name)
    ok = value is None or (low <= value and (high is None or value <= high))
    require(ok, name, value, f"{low} {'or more' if high is None else f'to {high}'} {unit}".rstrip())


_ACCUMULATION = Word(
    values={1: SAYS_NOTHING},
    note="it follows from batch_size, the samples of a step over all processes, and micro_batch_size, the most in one "
    "pass of one process. Write batch_size=(samples a pass) x (processes) x (accumulation steps)",
)


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

    WORDS: ClassVar[Mapping[str, Word]] = {
        "learning_rate": Word(options=("lr",)),
        "mm_projector_lr": Word(options=("projector_lr",)),
        "mm_vision_tower_lr": Word(options=("tower_lr",)),
        "num_train_epochs": Word(options=("epochs",)),
        "max_steps": Word(options=("steps",), values={-1: SAYS_NOTHING}, others=True),
        "per_device_train_batch_size": Word(
            options=("micro_batch_size",),
            note="the most samples in one pass of one process. A step has batch_size samples, over all processes and passes",
        ),
        "warmup_ratio": Word(options=("warmup",)),
        "lr_scheduler_type": Word(
            options=("schedule",),
            values={"cosine": "cosine", "constant_with_warmup": "constant"},
            note="write schedule=cosine or schedule=constant, and warmup=0 for none",
        ),
        **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), _ACCUMULATION),
        "global_batch_size": Word(options=("batch_size",)),
        "bs": Word(
            note="batch_size is the samples of a step over all processes, micro_batch_size the most in one pass"
        ),
        "wd": Word(options=("weight_decay",)),
        "lr_rate": Word(note="write lr=RATE"),
        "finetuning_type": Word(
            options=("trainable",),
            values={"full": "all", "lora": "lora"},
            note="write trainable=all, lora, projector or tower",
        ),
        **dict.fromkeys(
            ("freeze_vision_tower", "freeze_backbone"),
            Word(
                note="what is trained is an option of phases: write trainable=projector, all, lora or tower (the vision tower is "
                "frozen but for tower), and freeze=[...] for parts of it"
            ),
        ),
        "warmup_steps": Word(
            values={0: SAYS_NOTHING},
            note="the warm-up is a share of a phase's steps. Write warmup=(warm-up steps)/(steps)",
        ),
    }

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

    WORDS: ClassVar[Mapping[str, Word]] = {
        "r": Word(options=("rank",)),
        "lora_alpha": Word(options=("alpha",)),
        "lora_dropout": Word(options=("dropout",)),
    }

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "1 or more")
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a share in [0, 1)")


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


def _each(option: str) -> tuple[str, ...]:
    """An option of phases, of each of them."""
    return tuple(f"{phase}.{option}" for phase in PHASE_NAMES)


_OF_PHASES = [part.name for part in fields(PhaseConfig) if part.name not in ("losses", "data", "images", "cache")]
_DTYPES = {"no": "float32", False: "float32", "fp32": "float32", "bf16": "bfloat16"} | {
    name: name for name in _PRECISIONS
}
_STAGE_ONE = (
    "split store signals temperatures attention_dtype grid map_preset map_grid answers max_new_tokens "
    "answer_temperature answer_top_p answer_seed hidden_layers hidden_dtype groups layers long_samples shard_size "
    "device_map quantisation quantization max_failed_share max_unknown_share fidelity_samples threads "
    "top_p do_sample teacher_license data_license source dataset_split quantise quantize per_device_eval_batch_size"
)
_TEMPERATURE = Word(
    note="that of the losses on logits is an option of a phase, one of those that the cache was built for: write "
    "dft.losses.temperature=T; that of answers which the teacher writes is answer_temperature in stage one"
)
_KD_WEIGHT = Word(
    note="each loss of a phase has its own weight: write dft.losses.logits=W for the teacher's logits, dft.losses.lm=W for the "
    "data's answers (the scale of adapters is lora.alpha)"
)
_LENGTH = Word(options=("max_length",), note="a longer sample is left out, not cut")


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
        template: Prompt template; none: the cache's, the only one that fits its labels.
        data: Data set, as for stage one; none: what the cache was built from. A mixture's weights say how often its samples
            are seen in an epoch.
        images: Folder that relative image paths start from.
        limit: Use only the first samples; none: all.
        data_share: Use only this share of each phase's samples, the first ones, in (0, 1].
        cache: Teacher cache: a folder, or an address (``s3://``, ``hf://datasets/``, ``https://``). Of a mixture whose entries
            have a cache each, any of these; all are read.
        output: Folder for everything the run writes.
        phases: Phases to run, in this order.
        dpt: Distilled pre-training.
        dft: Distilled fine-tuning.
        sft: Supervised fine-tuning.
        lora: Adapters of the phases that set ``trainable=lora``.
        gradient_checkpointing: Compute each decoder layer again in the backward pass: less memory, a third more time, the
            same result.
        seed: Seed of the student's fresh weights and of the order of samples.
        dtype: ``float32``, or ``bfloat16`` for mixed precision: the arithmetic; weights stay in float32.
        device: ``auto`` (an accelerator if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        clip: Gradients are clipped to this norm.
        num_workers: Loading threads; 0 loads on the training thread.
        memory_gib: Memory for encoded samples, GiB; for small data sets.
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

    WORDS: ClassVar[Mapping[str, Word]] = {
        **{name: Word(options=_each(name)) for name in _OF_PHASES},
        **{
            name: replace(word, options=tuple(found for option in word.options for found in _each(option)))
            for name, word in PhaseConfig.WORDS.items()
        },
        **NOT_HERE,
        **dict.fromkeys(
            ("model_name_or_path", "model", "model_name", "student_model_name_or_path"), Word(options=("student",))
        ),
        "teacher_model_name_or_path": Word(
            note="the teacher runs in stage one, `teacher-cache build --teacher`; here its cache is given, cache=FOLDER. Write "
            "teacher=FOLDER for what a student pruned:KEEP is cut out of"
        ),
        "mm_projector_type": Word(note="write projector=ldpnet, ldpnetv2, mlp or taf"),
        "data_seed": Word(options=("seed",), note="it is the seed of fresh weights, too"),
        "output_dir": Word(options=("output",)),
        **SHARED_WORDS,
        "limit": Word(options=("limit",), values={0: None}, others=True),
        "images": Word(options=("images",), values={"": None}, others=True),
        "template": Word(options=("template",), values={"": None, "auto": None}, others=True),
        "max_length": Word(options=("max_length",), values={0: None}, others=True),
        **dict.fromkeys(("max_seq_length", "model_max_length", "cutoff_len", "sequence_len"), _LENGTH),
        **dict.fromkeys(("temperature", "kd_temperature", "distill_temperature"), _TEMPERATURE),
        **dict.fromkeys(("alpha", "beta", "kd_weight", "kd_alpha", "kd_ratio"), _KD_WEIGHT),
        "losses": Word(note="each phase has losses of its own: write dft.KEY"),
        **dict.fromkeys(
            ("top_k", "k"),
            Word(
                note="how many of the teacher's tokens a student learns from is fixed when the cache is built: write "
                "logits=fixed:K in stage one, `teacher-cache build`"
            ),
        ),
        "dtype": Word(options=("dtype",), values=_DTYPES, others=True),
        **dict.fromkeys(
            ("precision", "mixed_precision"),
            Word(options=("dtype",), values=_DTYPES, note="students are trained in these"),
        ),
        "bf16": Word(options=("dtype",), values={True: "bfloat16", False: "float32"}),
        "fp16": Word(
            values={False: SAYS_NOTHING}, note="students are trained in float32 or bfloat16. Write dtype=bfloat16"
        ),
        "torch_dtype": Word(note="weights are trained in float32. Write dtype=bfloat16 for mixed precision"),
        "max_grad_norm": Word(options=("clip",)),
        "save_steps": Word(options=("checkpoint_every",)),
        "save_total_limit": Word(options=("keep_checkpoints",)),
        "logging_steps": Word(options=("log_every",)),
        **dict.fromkeys(
            ("report_to", "log_with"),
            Word(
                options=("report_to",),
                values={
                    **{name: [name] for name in TRACKERS},
                    **{nothing: [] for nothing in ("none", None, "no", "off", False)},
                },
                others=True,
            ),
        ),
        **dict.fromkeys(("lora_r", "lora_rank"), Word(options=("lora.rank",))),
        "lora_alpha": Word(options=("lora.alpha",)),
        "lora_dropout": Word(options=("lora.dropout",)),
        **{
            name: Word(values={False: SAYS_NOTHING}, note="write trainable=lora")
            for name in ("lora_enable", "use_peft")
        },
        **dict.fromkeys(
            ("lora_target_modules", "lora_target"),
            Word(
                values={"all": SAYS_NOTHING},
                note="adapters are on all linear layers of the language model; leave it out",
            ),
        ),
        "cache_dir": Word(
            note="write cache=FOLDER for the teacher's cache; downloads of the hub go where the variable HF_HOME says"
        ),
        **dict.fromkeys(
            ("optim", "optimizer"),
            Word(
                values=dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), SAYS_NOTHING),
                note="students are trained by AdamW; leave it out",
            ),
        ),
        **dict.fromkeys(
            ("fsdp", "deepspeed"),
            Word(
                values=dict.fromkeys(("", None, False), SAYS_NOTHING),
                note="each process holds the whole student; leave it out",
            ),
        ),
        "resume_from_checkpoint": Word(
            values=dict.fromkeys((True, False, None), SAYS_NOTHING),
            note="the same command with the same output goes on from its last checkpoint; leave it out",
        ),
        "eval_steps": Word(options=("evaluation.every",)),
        **dict.fromkeys(
            ("eval_strategy", "evaluation_strategy", "do_eval"),
            Word(
                values=dict.fromkeys(("no", "steps", False, None), SAYS_NOTHING),
                note="students are scored when they are trained, by `distill run` or `distill evaluate`, and while they are "
                "with evaluation.every=STEPS",
            ),
        ),
        "metric_for_best_model": Word(note="write evaluation.best=SCORE, such as likelihood or questions"),
        "save_strategy": Word(
            values={"steps": SAYS_NOTHING}, note="checkpoints are written by steps: write checkpoint_every=STEPS"
        ),
        "logging_strategy": Word(values={"steps": SAYS_NOTHING}, note="the log has a line a step; leave it out"),
        "run_name": Word(note="a run is called by its folder: write output=FOLDER"),
        "logging_dir": Word(note="the log and TensorBoard's files are in the output folder; leave it out"),
        "do_train": Word(values={True: SAYS_NOTHING}, note="`distill evaluate` scores without training; leave it out"),
        **dict.fromkeys(
            (
                "remove_unused_columns",
                "group_by_length",
                "push_to_hub",
                "ddp_find_unused_parameters",
            ),
            Word(values=dict.fromkeys((False, None), SAYS_NOTHING), note="there is no such thing here; leave it out"),
        ),
        "load_best_model_at_end": Word(
            values=dict.fromkeys((False, None), SAYS_NOTHING),
            note="with evaluation.every=STEPS the best student is kept in OUTPUT/best, beside OUTPUT/final; leave it out",
        ),
        "overwrite_output_dir": Word(
            values={False: SAYS_NOTHING}, note="give another output, or delete the folder to begin again"
        ),
        **dict.fromkeys(
            ("load_in_4bit", "load_in_8bit", "bits"),
            Word(values={False: SAYS_NOTHING, 16: SAYS_NOTHING}, note="students are trained unquantised; leave it out"),
        ),
        **dict.fromkeys(
            _STAGE_ONE.split(), Word(note="it is an option of stage one, `teacher-cache build`, not of `distill`")
        ),
    }

    student: str = "mobilevlm"
    student_weights: str | None = None
    teacher: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    projector: str | None = None
    pool_teacher_tokens: bool = False
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
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    clip: float = 1.0
    num_workers: int = 1
    memory_gib: float = 1.0
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
        _within(self, "limit", 1, None, "samples")
        _within(self, "max_length", 1, None, "tokens")
        require(0 < self.data_share <= 1, "data_share", self.data_share, "above 0 and at most 1")
        need = f"the directory of the teacher (--teacher) that student {self.student} is cut out of"
        require(kept_share(self.student) is None or self.teacher is not None, "teacher", self.teacher, need)

    def sample_limit(self, samples: int) -> int | None:
        """How many of a data set's samples a run uses at most; None: all."""
        if self.data_share == 1:
            return self.limit
        shared = max(1, math.ceil(self.data_share * samples))
        return shared if self.limit is None else min(shared, self.limit)

    def phase(self, name: PhaseName) -> PhaseConfig:
        """A phase's configuration with the run's data, images and cache filled in."""
        phase: PhaseConfig = getattr(self, name)
        return replace(
            phase, data=phase.data or self.data, images=phase.images or self.images, cache=phase.cache or self.cache
        )


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
    described["precision"] = _PRECISIONS[described.pop("dtype")]
    described["cache"] = cache_hashes.get(config.cache)
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
