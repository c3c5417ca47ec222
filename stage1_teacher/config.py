"""What a cache is built from: one frozen dataclass, read from YAML and ``--set``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar, Literal

from vlm_distill_cache.common.cache.document_rules import TEMPERATURES
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.description import check_whole_number
from vlm_distill_cache.common.codecs.logits import preset_settings
from vlm_distill_cache.common.codecs.registry import CODECS
from vlm_distill_cache.common.config import NOT_HERE, SAYS_NOTHING, SHARED_WORDS, Word, take_paths
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal.next_step import DEFAULT_SIGNALS
from vlm_distill_cache.data.sample import FrameSampling

SIGNALS = tuple(name for name, codec in CODECS.items() if codec is not AnswersCodec)
"""What a cache can keep; answers that the teacher writes are kept where ``answers`` says so."""


_DTYPES = {"no": "float32", False: "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_LENGTH = Word(
    options=("max_length",), note="a longer sample is a recorded failure, unless long_samples=truncate cuts it"
)
_QUANTISED: dict[str, Mapping[bool, object]] = {
    "load_in_4bit": {True: "4bit", False: SAYS_NOTHING},
    "load_in_8bit": {True: "8bit", False: SAYS_NOTHING},
}
_STAGE_TWO = (
    "student student_weights vision_tower language_model projector pool_teacher_tokens data_share phases dpt dft sft "
    "lora pruning gradient_checkpointing sharding optimizer weights seed clip memory_gib pixel_cache pixel_cache_gib "
    "shuffle_window checkpoint_every keep_checkpoints log_every report_to verify shuffle_teacher_images evaluation steps epochs "
    "lr projector_lr tower_lr warmup schedule weight_decay trainable freeze losses learning_rate num_train_epochs max_steps "
    "mm_projector_lr mm_vision_tower_lr warmup_ratio warmup_steps lr_scheduler_type gradient_accumulation_steps max_grad_norm "
    "save_steps save_total_limit logging_steps lora_r lora_alpha lora_dropout lora_enable lora_target_modules use_peft optim "
    "fsdp deepspeed resume_from_checkpoint overwrite_output_dir optimizer global_batch_size grad_accum wd alpha beta kd_weight "
    "kd_alpha lora_rank eval_steps eval_strategy evaluation_strategy do_eval save_strategy logging_strategy run_name logging_dir "
    "student_model_name_or_path freeze_vision_tower freeze_backbone mm_projector_type finetuning_type lora_target lr_rate kd_ratio "
    "data_seed do_train remove_unused_columns load_best_model_at_end group_by_length push_to_hub ddp_find_unused_parameters "
    "log_with metric_for_best_model visual_tokens token_selection sink_penalty merge_frames decoding_tokens decoding_selection "
    "shift_threshold visual_token_num num_visual_tokens retained_tokens fastv_attention_rank fast_v_attention_rank "
    "token_keep_ratio visual_token_ratio subset_ratio fastv_r fast_v_r pruning_ratio prune_ratio fastv_k fast_v_agg_layer "
    "layer_list image_token_ratio_list dominant_num contextual_num mu_s mu_t most_pictures pictures_beyond visual_token_budget"
)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Options of ``teacher-cache build``; only the command line and ``extract()`` see this object.

    Attributes:
        data: Data set: ``shapes``, ``easy-vqa``, ``photo-scenes``, a path, ``ORG/NAME`` of the hub, or a mixture
            (``FILE.yaml``); docs/families.md lists the forms. Of a mixture whose entries have a cache each, the entry whose
            ``cache`` this is.
        images: Folder that image paths start from; default: the folder of the data.
        split: Split of a built-in data set, of a folder with splits, or of the hub.
        limit: Use only the first samples; 0 means all.
        teacher: A folder, or a name on the hub (``org/name[@revision]``), which is downloaded; empty means the built-in
            teacher of a built-in data set.
        cache: The cache folder to write.
        store: Shard format.
        signals: What to keep; docs/cache-format.md says what each signal holds.
        logits: Preset of the logit codec: ``lean``, ``default``, ``wide``, ``full``, ``exact`` or ``fixed:K``.
        temperatures: Temperatures at which the tail mass is exact, dimensionless.
        attention_dtype: ``u1`` (8-bit codes) or ``f4`` (exact) for attention signals.
        grid: Side of the grid that answer and text attention are pooled to; 0 means the teacher's own grid, at most 12.
        frame_grid: Side of the grid that they are pooled to on frames of a video; 0 means the same as on pictures.
        frames: Which frames of a video are read: ``frames.fps`` a second, and where those are more than ``frames.most``, so
            many at uniform times.
        map_preset: What is kept of ``visual_map`` with ``attention_dtype=u1``: ``exact`` serves every loss, ``blocks`` and
            ``compact`` the sink-filtered one; ``exact8``, of older caches, has a sink mask that is not exact: the sink-filtered
            loss's gradient then has a cosine of 0.9 with the exact one at worst, 0.69 with few visual tokens. See
            docs/cache-format.md.
        map_grid: Side of the grid that a tile's visual tokens are pooled to for ``visual_map``. Give the students' own grid,
            for which the map is then exact; 0 keeps the teacher's tokens.
        answers: ``data`` scores the data set's answers. With ``generate`` the teacher writes the answers turn by turn, signals
            belong to these, and students learn them.
        max_new_tokens: Longest generated answer in tokens; a longer one is a recorded failure.
        answer_temperature: Sampling temperature of generated answers, dimensionless; 0 is greedy.
        answer_top_p: Sample from the smallest set of tokens with this share of the mass.
        answer_seed: Seed of sampled answers.
        hidden_layers: Layers of the signals ``hidden`` and ``visual_hidden``: 0 is the input of the first layer, negative numbers
            count from the last layer, whose states are normalised.
        hidden_dtype: ``f2``, or ``f4`` where float16 cannot hold the states.
        groups: Number of layer groups whose attention is kept; 0: the published 7, or as many as a teacher of fewer than 14
            layers has middle layers.
        layers: Layers whose attention is kept: the published middle ones, or all.
        template: Prompt template; ``auto`` is ``short`` for built-in teachers and the family's own for others.
        max_length: Longest sequence in tokens; a longer sample is a recorded failure, as is a conversation of more
            tokens than the teacher's config.json knows positions. 0: 2048, or more where a picture alone may need them.
        long_samples: ``truncate`` cuts what is longer at its end, as LLaVA's training code does, and students are cut at the same
            token. Failures are then those in which no answer begins before the limit, and prompts too long to be answered.
        batch_size: Samples per forward pass; part of the plan, because the last bits depend on it. 0: as in an existing cache, else
            what fits the memory (on a GPU found by running the teacher on its longest input, at most 16 on a CPU). For
            parts in separate folders give a number, so that they can be merged.
        shard_size: Samples per shard.
        dtype: Computation dtype; ``auto`` is float32 on CPU and bfloat16 on CUDA.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: How to spread the teacher over several devices, as the model library takes it (``auto``, ``balanced``);
            empty: one device.
        tensor_parallel: Processes, each on a GPU of its own, that hold the teacher together, a part of every layer each; part of
            the plan, because the last bits depend on it. 0: as in an existing cache, else 1. `--nproc` counts all of them.
        quantisation: Quantisation of the teacher's language model by bitsandbytes; ``4bit`` is NF4.
        max_failed_share: Largest tolerated share of unreadable samples, in [0, 1].
        max_unknown_share: Largest tolerated share of targets that are words the teacher's tokenizer lacks, in [0, 1]; they
            are taught as its unknown token.
        fidelity_samples: Samples of the fidelity probe; 0 skips it.
        threads: CPU threads of the arithmetic; part of the plan, because the last bits depend on it. 0: as in an existing
            cache, else ``OMP_NUM_THREADS``, else all cores but one, or one for each of several processes.
        num_workers: Processes that read, decode and tokenise ahead of the teacher; the bytes do not depend on it. 0: a thread of
            the main process. -1: up to 4 beside a GPU, one beside a CPU, none for a small data set.
        license: Licence of the cache, as an identifier of the Hugging Face Hub; for the card.
        teacher_license: The teacher's licence, free text; for the card.
        data_license: The data set's licence, free text; for the card.
        source: Where teacher and data come from, or whom to ask; free text for the card.
    """

    WORDS: ClassVar[Mapping[str, Word]] = {
        **NOT_HERE,
        **dict.fromkeys(
            ("model_name_or_path", "model", "model_name", "teacher_model_name_or_path"), Word(options=("teacher",))
        ),
        "top_p": Word(options=("answer_top_p",)),
        "do_sample": Word(
            values={False: SAYS_NOTHING}, note="write answers=generate and answer_temperature=1 for sampled answers"
        ),
        "bits": Word(options=("quantisation",), values={4: "4bit", 8: "8bit", 16: SAYS_NOTHING, None: SAYS_NOTHING}),
        "output": Word(options=("cache",)),  # as `--output`, which the documentation has, so that nothing is said of it
        "output_dir": Word(options=("cache",), note="the folder that is written"),
        **SHARED_WORDS,
        "dataset_split": Word(options=("split",)),
        **{
            name: Word(options=(name,), values={None: nothing}, others=True)
            for name, nothing in {"limit": 0, "max_length": 0, "images": "", "template": "auto", "teacher": ""}.items()
        },
        **dict.fromkeys(("max_seq_length", "model_max_length", "cutoff_len", "sequence_len"), _LENGTH),
        **dict.fromkeys(
            ("bs", "micro_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"),
            Word(options=("batch_size",), note="the samples of one forward pass"),
        ),
        **dict.fromkeys(
            ("dtype", "precision", "mixed_precision", "torch_dtype"),
            Word(options=("dtype",), values=_DTYPES, others=True),
        ),
        "bf16": Word(options=("dtype",), values={True: "bfloat16", False: SAYS_NOTHING}),
        "fp16": Word(options=("dtype",), values={True: "float16", False: SAYS_NOTHING}),
        **dict.fromkeys(
            ("quantization", "quantisation", "quantise", "quantize"),
            Word(options=("quantisation",), values={None: "none", "int8": "8bit", "nf4": "4bit"}, others=True),
        ),
        **{name: Word(options=("quantisation",), values=values) for name, values in _QUANTISED.items()},
        **dict.fromkeys(
            ("temperature", "kd_temperature", "distill_temperature"),
            Word(
                note="write temperatures=[1,2] for those at which the tail mass is exact, so that a student may learn at them "
                "(dft.losses.temperature=2 in stage two), or answer_temperature=1 for sampled answers"
            ),
        ),
        **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), Word(options=("tensor_parallel",))),
        **dict.fromkeys(("top_k", "k"), Word(note="write logits=fixed:K for the K likeliest tokens of each row")),
        "cache_dir": Word(
            note="write cache=FOLDER for the cache that is written; downloads of the hub go where the variable HF_HOME says"
        ),
        **dict.fromkeys(
            _STAGE_TWO.split(), Word(note="it is an option of stage two, `distill`, not of `teacher-cache`")
        ),
    }

    data: str = "shapes"
    images: str = ""
    split: str = "train"
    limit: int = 0
    teacher: str = ""
    cache: str = "build/cache/shapes-zarr"
    store: Literal["zarr", "webdataset"] = "zarr"
    signals: tuple[str, ...] = DEFAULT_SIGNALS
    logits: str = "default"
    temperatures: tuple[float, ...] = (1.0, 2.0)
    attention_dtype: Literal["u1", "f4"] = "u1"
    grid: int = 0
    frame_grid: int = 4
    frames: FrameSampling = field(default_factory=FrameSampling)
    map_preset: Literal["exact", "blocks", "compact", "exact8"] = "exact"
    map_grid: int = 0
    answers: Literal["data", "generate"] = "data"
    max_new_tokens: int = 256
    answer_temperature: float = 0.0
    answer_top_p: float = 1.0
    answer_seed: int = 0
    hidden_layers: tuple[int, ...] = (-1,)
    hidden_dtype: Literal["f2", "f4"] = "f2"
    groups: int = 1
    layers: Literal["middle", "all"] = "middle"
    template: str = "auto"
    max_length: int = 0
    long_samples: Literal["refuse", "truncate"] = "refuse"
    batch_size: int = 0
    shard_size: int = 256
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: str = ""
    tensor_parallel: int = 0
    quantisation: Literal["none", "8bit", "4bit"] = "none"
    max_failed_share: float = 0.01
    max_unknown_share: float = 0.25
    fidelity_samples: int = 64
    threads: int = 0
    num_workers: int = -1
    license: str = ""
    teacher_license: str = ""
    data_license: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse values no build could use, naming the field."""
        take_paths(self)
        unknown = [name for name in self.signals if name not in SIGNALS]
        if unknown or not self.signals:
            raise ConfigError(f"signals: {unknown or 'none given'}; choose from {', '.join(SIGNALS)}")
        if len(set(self.signals)) != len(self.signals):
            raise ConfigError(f"signals: {self.signals} names one twice")
        preset_settings(self.logits)
        least, most = TEMPERATURES
        if any(not least <= temperature <= most for temperature in self.temperatures):
            raise ConfigError(f"temperatures: expected numbers from {least} to {most}, got {self.temperatures}")
        for name, low, high in (
            ("limit", 0, 2**40), ("grid", 0, 64), ("frame_grid", 0, 64), ("frames.most", 1, 2**16 - 1), ("map_grid", 0, 64),
            ("groups", 0, 64), ("max_length", 0, 2**20),
            ("batch_size", 0, 2**16), ("shard_size", 1, 2**20), ("fidelity_samples", 0, 2**20), ("threads", 0, 1024),
            ("tensor_parallel", 0, 256), ("num_workers", -1, 256),
        ):  # fmt: skip
            check_whole_number(name, attrgetter(name)(self), low, high)
        if not 0.001 <= self.frames.fps <= 1000:
            raise ConfigError(f"frames.fps: expected frames a second from 0.001 to 1000, got {self.frames.fps}")
        beside = f"device_map={self.device_map}" if self.device_map else f"quantisation={self.quantisation}"
        if self.tensor_parallel > 1 and (self.device_map or self.quantisation != "none"):
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel} with {beside}: each is a way of its own to fit a large teacher, and they "
                "do not go together; leave one of them out"
            )
        if "://" in self.cache:
            raise ConfigError(
                f"cache: a build writes to a folder, got {self.cache!r}; build into a folder, then run "
                f"`cachectl push FOLDER {self.cache}`"
            )
        if not self.cache:
            raise ConfigError("cache: expected a folder, got nothing")
        for name in ("max_failed_share", "max_unknown_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        for name in ("license", "teacher_license", "data_license", "source"):
            if not getattr(self, name).isprintable():
                raise ConfigError(f"{name}: expected one line of text, got {getattr(self, name)!r}")
