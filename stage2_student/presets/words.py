"""Other programs' words for options of stage two: each is turned into ours, or refused with what to write instead."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm_distill_cache.common.config import NOT_HERE, SAYS_NOTHING, SHARED_WORDS, Word

_ACCUMULATION = Word(
    values={1: SAYS_NOTHING},
    note="it follows from batch_size, the samples of a step over all processes, and micro_batch_size, the most in one "
    "pass of one process. Write batch_size=(samples a pass) x (processes) x (accumulation steps)",
)

WORDS_OF_A_PHASE: Mapping[str, Word] = {
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
    "bs": Word(note="batch_size is the samples of a step over all processes, micro_batch_size the most in one pass"),
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
WORDS_OF_ADAPTERS: Mapping[str, Word] = {
    "r": Word(options=("rank",)),
    "lora_alpha": Word(options=("alpha",)),
    "lora_dropout": Word(options=("dropout",)),
}

_DTYPES = {
    "no": "float32",
    False: "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "float32": "float32",
    "bfloat16": "bfloat16",
}
_STAGE_ONE = (
    "split store signals temperatures attention_dtype grid frame_grid map_preset map_grid answers max_new_tokens "
    "answer_temperature answer_top_p answer_seed hidden_layers hidden_dtype groups layers long_samples shard_size "
    "device_map tensor_parallel tp tp_size tensor_parallel_size max_failed_share max_unknown_share fidelity_samples threads "
    "top_p do_sample teacher_license data_license source dataset_split per_device_eval_batch_size"
)
_TEMPERATURE = Word(
    note="that of the losses on logits is an option of a phase, one of those that the cache was built for: write "
    "dft.losses.temperature=T; that of answers which the teacher writes is answer_temperature in stage one"
)
_KD_WEIGHT = Word(
    note="each loss of a phase has its own weight: write dft.losses.logits=W for the teacher's logits, dft.losses.lm=W for the "
    "data's answers (the scale of adapters is lora.alpha)"
)
# Of those who choose among visual tokens: FastV, SparseVLM, VisionZip, VisPruner, DivPrune, PyramidDrop, SToP.
_TOKENS: Mapping[str, Word] = {
    **dict.fromkeys(
        ("visual_token_num", "num_visual_tokens", "retained_tokens", "fastv_attention_rank", "fast_v_attention_rank"),
        Word(options=("visual_tokens",)),
    ),
    **dict.fromkeys(("token_keep_ratio", "visual_token_ratio", "subset_ratio"), Word(options=("visual_tokens",))),
    **{
        name: Word(note=f"it is the share of visual tokens that is left out. Write visual_tokens=(1 - {name})")
        for name in ("fastv_r", "fast_v_r", "pruning_ratio", "prune_ratio")
    },
    **dict.fromkeys(
        ("fastv_k", "fast_v_agg_layer", "layer_list", "image_token_ratio_list"),
        Word(note="tokens are left out before the first layer of the language model: write visual_tokens=K alone"),
    ),
    **dict.fromkeys(
        ("dominant_num", "contextual_num"),
        Word(
            note="tokens are chosen or pooled, not both: write visual_tokens=K, and token_selection=attention or grid"
        ),
    ),
    "mu_s": Word(options=("sink_penalty",)),
    "mu_t": Word(note="it is 0.07, as published, where merge_frames=COSINE is set; leave it out"),
}
_LENGTH = Word(options=("max_length",), note="a longer sample is left out, not cut")


def words_of_a_run(phases: Sequence[str], phase_options: Sequence[str], trackers: Sequence[str]) -> dict[str, Word]:
    """The words of a whole run; those of a phase stand for the option of each phase."""

    def each(*options: str) -> tuple[str, ...]:
        return tuple(f"{phase}.{option}" for option in options for phase in phases)

    return {
        **{name: Word(options=each(name)) for name in phase_options},
        **{name: replace(word, options=each(*word.options)) for name, word in WORDS_OF_A_PHASE.items()},
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
        "pixel_cache": Word(
            options=("pixel_cache",),
            values={**dict.fromkeys((None, False, "no", "off"), "none"), True: "auto"},
            others=True,
        ),
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
        **_TOKENS,
        "dtype": Word(options=("dtype",), values=_DTYPES, others=True),
        **dict.fromkeys(
            ("precision", "mixed_precision"),
            Word(options=("dtype",), values=_DTYPES, note="students are trained in these"),
        ),
        "bf16": Word(options=("dtype",), values={True: "bfloat16", False: "float32"}),
        "fp16": Word(
            values={False: SAYS_NOTHING}, note="students are trained in float32 or bfloat16. Write dtype=bfloat16"
        ),
        "torch_dtype": Word(
            note="write dtype=bfloat16 for mixed precision, and weights=bfloat16 to keep weights in it, too"
        ),
        "max_grad_norm": Word(options=("clip",)),
        "save_steps": Word(options=("checkpoint_every",)),
        "save_total_limit": Word(options=("keep_checkpoints",)),
        "logging_steps": Word(options=("log_every",)),
        **dict.fromkeys(
            ("report_to", "log_with"),
            Word(
                options=("report_to",),
                values={
                    **{name: [name] for name in trackers},
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
                options=("optimizer",),
                values={
                    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
                    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw8bit"),
                },
                others=True,
                note="students are trained by AdamW; write optimizer=adamw, or adamw8bit for averages in 8 bits",
            ),
        ),
        **dict.fromkeys(
            ("fsdp", "deepspeed"),
            Word(
                values=dict.fromkeys(("", None, False), SAYS_NOTHING),
                note="write sharding=fsdp2 to divide the student among processes",
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
            ("quantization", "quantisation", "quantise", "quantize"),
            Word(options=("quantisation",), values={None: "none", "nf4": "4bit"}, others=True),
        ),
        "load_in_4bit": Word(options=("quantisation",), values={True: "4bit", False: SAYS_NOTHING}),
        "bits": Word(
            options=("quantisation",),
            values={4: "4bit", 16: SAYS_NOTHING, None: SAYS_NOTHING},
            note="students are packed in 4 bits or not at all: write quantisation=4bit",
        ),
        "load_in_8bit": Word(
            values={False: SAYS_NOTHING}, note="students are packed in 4 bits: write quantisation=4bit"
        ),
        **dict.fromkeys(
            _STAGE_ONE.split(), Word(note="it is an option of stage one, `teacher-cache build`, not of `distill`")
        ),
    }
