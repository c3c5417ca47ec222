"""What a training run is: phases, losses, budgets. Only the command line, `train()` and `run` see these."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config import config_to_dict, load_config
from common.errors import ConfigError
from common.mirror import public_location

PhaseName = Literal["dpt", "dft", "sft"]
Schedule = Literal["cosine", "constant"]
PHASE_NAMES: tuple[PhaseName, ...] = ("dpt", "dft", "sft")
PRESETS = Path(__file__).parent / "presets"
# A student should be clearly smaller than its teacher: widths up to each bound get the size beside it. The
# published pairing is teacher MobileVLM_V2-7B (4096) -> student V2-1.7B.
AUTO_SIZES = ((512, "tiny"), (4096, "1.7b"))
LARGEST = "3b"
# Options that change when a run ends and what it prints, not what it learns.
SPEED_OPTIONS = ("device", "num_workers", "memory_gib", "checkpoint_every", "keep_checkpoints", "log_every")


def _require(ok: bool, name: str, value: object, need: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; it must be {need}")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each loss term; 0 switches a term off, and its signal is then not even read.

    Attributes:
        lm: Cross-entropy on the supervised rows.
        logits: KL to the teacher's cached logits.
        answer_attention: Where the answer's rows look on the image.
        text_attention: Where all text rows behind the image look on it, those of questions too.
        visual_columns: Mean attention each visual token receives from the visual rows.
        visual_map: The visual x visual attention map.
        temperature: Of ``logits``, dimensionless; must be cached.
        answer_kind: Of both row losses, answer and text: ``kl`` over the image, ``cosine``, or ``relative``
            (rows divided by the sample's mean row).
        visual_map_kind: ``sink_filtered`` (the released code) or ``cosine`` (the paper's formula).
    """

    lm: float = 1.0
    logits: float = 0.0
    answer_attention: float = 0.0
    text_attention: float = 0.0
    visual_columns: float = 0.0
    visual_map: float = 0.0
    temperature: float = 1.0
    answer_kind: Literal["kl", "cosine", "relative"] = "kl"
    visual_map_kind: Literal["sink_filtered", "cosine"] = "sink_filtered"

    def __post_init__(self) -> None:
        for name, value in self.active(everything=True).items():
            _require(value >= 0, f"losses.{name}", value, "a weight of 0 or more")
        _require(bool(self.active()), "losses", self, "at least one weight above 0")
        _require(self.temperature > 0, "losses.temperature", self.temperature, "above 0 (dimensionless)")

    def active(self, *, everything: bool = False) -> dict[str, float]:
        """Weights by term, those above 0 only unless ``everything``."""
        named = {
            name: getattr(self, name)
            for name in (
                "lm",
                "logits",
                "answer_attention",
                "text_attention",
                "visual_columns",
                "visual_map",
            )
        }
        return {name: float(value) for name, value in named.items() if everything or value != 0}

    @property
    def signals(self) -> tuple[str, ...]:
        """The cache's signals that these losses read, in a fixed order."""
        return tuple(name for name in self.active() if name != "lm")

    @property
    def attends(self) -> bool:
        """Whether any loss reads attention."""
        return bool(set(self.signals) - {"logits"})


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of training.

    Attributes:
        steps: Optimizer steps; None: given by ``epochs``.
        epochs: Passes over the phase's samples; None: given by ``steps``.
        batch_size: Samples of an optimizer step, over all processes and micro-batches.
        micro_batch_size: Most samples in one forward pass of one process; None: no limit.
        lr: Peak learning rate.
        warmup: Share of the steps with a rising learning rate, in [0, 1).
        schedule: Learning-rate curve after the warm-up.
        weight_decay: Of matrices.
        trainable: ``projector`` (the student's projector side) or ``all`` (the language model too).
        losses: Loss weights.
        data: This phase's data set; None: the run's.
        images: This phase's image folder; None: the run's.
        cache: This phase's teacher cache; None: the run's.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr: float = 2e-3
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    trainable: Literal["projector", "all"] = "all"
    losses: LossWeights = field(default_factory=LossWeights)
    data: str | None = None
    images: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        both = self.steps is not None and self.epochs is not None
        _require(not both, "steps and epochs", (self.steps, self.epochs), "one of the two, not both")
        _require(self.steps is None or self.steps >= 0, "steps", self.steps, "0 or more optimizer steps")
        _require(self.epochs is None or self.epochs >= 0, "epochs", self.epochs, "0 or more passes")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more samples")
        _require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            "micro_batch_size",
            self.micro_batch_size,
            "1 or more samples",
        )
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "a share of the steps in [0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")

    def step_count(self, samples: int) -> int:
        """Optimizer steps of this phase over ``samples`` samples."""
        if self.steps is not None:
            return self.steps
        return -(-round((self.epochs or 0.0) * samples) // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How students are scored.

    Attributes:
        data: Data set of the held-out items; None: the run's.
        images: Its image folder; None: the run's.
        split: ``validation`` or ``test``, where the data set has splits.
        limit: Most items (of each sort); None: the data set's own number.
        letters: Also ask which of two captions is right by letter (two generations a pair).
        agreement_samples: Cached samples on which student and teacher are compared; 0: none.
        overlays: Pictures of attention in the report.
    """

    data: str | None = None
    images: str | None = None
    split: Literal["validation", "test"] = "test"
    limit: int | None = None
    letters: bool = True
    agreement_samples: int = 64
    overlays: int = 6

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more items")
        for name in ("agreement_samples", "overlays"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        student: A preset (``mobilevlm``, ``mobilevlm-tiny``, ``mobilevlm-1.7b``, ``mobilevlm-3b``) or a
            directory.
        projector: Projector type; None: the student's own.
        pool_teacher_tokens: With projector ``taf``: pool the teacher's tokens 2x2 before the post-projector.
        template: Prompt template; None: the cache's, which is the only one that fits its labels.
        data: Data set, as in ``data.registry``; None: what the cache was built from.
        images: Folder that relative image paths start from.
        limit: Use only the first so many samples.
        cache: Teacher cache: a folder, or an address (``s3://``, ``hf://datasets/``, ``https://``).
        output: Folder for everything the run writes.
        phases: Phases to run, in this order.
        dpt: Distilled pre-training.
        dft: Distilled fine-tuning.
        sft: Supervised fine-tuning.
        seed: Of the student's fresh weights and of the order of samples.
        precision: ``no`` (float32) or ``bf16`` mixed.
        device: ``auto`` (an accelerator if there is one) or ``cpu``.
        clip: Largest gradient norm.
        num_workers: Loading threads; 0 loads on the training thread.
        memory_gib: Encoded samples kept in memory, for small data sets, GiB.
        shuffle_window: Shards whose samples are mixed with each other.
        checkpoint_every: Optimizer steps between checkpoints.
        keep_checkpoints: Checkpoints kept.
        log_every: Steps between writes of the log (each step has its line).
        max_length: Longest sequence of a sample, tokens; None: the cache's.
        shuffle_teacher_images: Control experiment: attention signals come from another image.
        evaluation: How `distill run` and `distill evaluate` score the student.
    """

    student: str = "mobilevlm"
    projector: str | None = None
    pool_teacher_tokens: bool = False
    template: str | None = None
    data: str | None = None
    images: str | None = None
    limit: int | None = None
    cache: str = ""
    output: str = ""
    phases: tuple[PhaseName, ...] = ("dpt", "dft", "sft")
    dpt: PhaseConfig = field(default_factory=PhaseConfig)
    dft: PhaseConfig = field(default_factory=PhaseConfig)
    sft: PhaseConfig = field(default_factory=PhaseConfig)
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    clip: float = 1.0
    num_workers: int = 1
    memory_gib: float = 1.0
    shuffle_window: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    max_length: int | None = None
    shuffle_teacher_images: bool = False
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _require(self.cache != "", "cache", self.cache, "a teacher cache's folder or address (--cache)")
        _require(self.output != "", "output", self.output, "a folder to write to (--output)")
        _require(len(set(self.phases)) == len(self.phases), "phases", self.phases, "without repetition")
        _require(bool(self.phases), "phases", self.phases, "at least one of dpt, dft, sft")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.clip > 0, "clip", self.clip, "a gradient norm above 0")
        for name in ("shuffle_window", "checkpoint_every", "keep_checkpoints", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more threads")
        _require(self.memory_gib >= 0, "memory_gib", self.memory_gib, "0 or more GiB")
        _require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more samples")
        longest = self.max_length
        _require(longest is None or longest >= 1, "max_length", longest, "1 or more tokens")

    def phase(self, name: PhaseName) -> PhaseConfig:
        """A phase's configuration with the run's data, images and cache filled in."""
        phase: PhaseConfig = getattr(self, name)
        return replace(
            phase,
            data=phase.data or self.data,
            images=phase.images or self.images,
            cache=phase.cache or self.cache,
        )


def without_teacher(config: TrainConfig) -> TrainConfig:
    """The SFT baseline of a run: the same student, samples, steps and rates, with the LM loss alone."""
    plain = {name: replace(getattr(config, name), losses=LossWeights()) for name in PHASE_NAMES}
    return replace(config, **plain, projector=None, shuffle_teacher_images=False)


def public_config(config: TrainConfig) -> TrainConfig:
    """A run's configuration as it may be published with its student: addresses of caches without signatures."""
    public = {
        name: replace(getattr(config, name), cache=public_location(cache))
        for name in PHASE_NAMES
        if (cache := getattr(config, name).cache) is not None
    }
    return replace(config, cache=public_location(config.cache), **public)


def describe(config: TrainConfig, cache_hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a run is: everything that changes its result; folders, threads and log settings do not.

    Args:
        config: The run.
        cache_hashes: Manifest hash by cache folder.

    Returns:
        JSON; caches are named by their hash, so that a moved cache is the same cache.
    """
    described = config_to_dict(config)
    for name in ("output", "evaluation", *SPEED_OPTIONS):
        del described[name]
    described["cache"] = cache_hashes.get(config.cache)
    for name in PHASE_NAMES:
        described[name]["cache"] = cache_hashes.get(described[name]["cache"])
    return described


def choose_size(teacher_hidden_size: int) -> str:
    """Pick a size by the width of the teacher's language model."""
    for bound, size in AUTO_SIZES:
        if teacher_hidden_size <= bound:
            return size
    return LARGEST


def resolve_config(path: Path | None, overrides: Sequence[str], *, teacher_width: int) -> TrainConfig:
    """A preset, then a user's YAML, then ``a.b=c`` overrides.

    Args:
        path: The user's YAML; None for none.
        overrides: Of the command line.
        teacher_width: Width of the cached teacher's language model; picks the preset for student size
            ``auto``.

    Raises:
        ConfigError: For an unknown or unusable option.
    """
    given = [*_flatten(read_yaml(path)), *overrides]
    student = next((item.partition("=")[2] for item in reversed(given) if item.startswith("student=")), "")
    tiny = _size_of(student.strip("'\" "), teacher_width) == "tiny"
    for phase in PHASE_NAMES:
        # A preset says steps or epochs; whoever gives the other one means it instead.
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            keys = {item.partition("=")[0] for item in given}
            if f"{phase}.{one}" in keys and f"{phase}.{other}" not in keys:
                given.append(f"{phase}.{other}=null")
    preset = PRESETS / f"phases-{'tiny' if tiny else 'published'}.yaml"
    where = f"options ({path}, command line)" if path else "options"
    return load_config(TrainConfig, preset, given, where=where)


def _size_of(student: str, teacher_width: int) -> str:
    """The size a student is trained like: the one in its name, a directory's by its width, else by the teacher."""
    folder = Path(student)
    if folder.is_dir():
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return choose_size(int(found["text_config"]["hidden_size"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # whoever loads it says what is wrong with it
    name, dash, size = student.rpartition("-")
    return size if dash and name else choose_size(teacher_width)


def read_yaml(path: Path | None, *, missing_ok: bool = False) -> dict[str, Any]:
    """Read a YAML mapping of options; empty without a path.

    Raises:
        ConfigError: If it cannot be read, or is no mapping.
    """
    if path is None or (missing_ok and not path.exists()):
        return {}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(loaded).__name__}")
    return loaded or {}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested options as ``a.b=c``."""
    flat: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append(f"{prefix}{key}={json.dumps(value)}")
    return flat
