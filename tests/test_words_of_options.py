"""Options in other programs' words, one word in both stages, and a run's own file as its configuration."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.config import config_from_dict, config_to_dict, load_config, load_options, save_replay
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.locations import slips
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, LoraConfig, PhaseConfig, TrainConfig, describe
from vlm_distill_cache.stage2_student.run import load_run_config
from vlm_distill_cache.stage2_student.train import choose_gpu

NEEDED = {"cache": "c", "output": "o"}
CLASSES = (BuildConfig, TrainConfig)


def stage_two(*overrides: str, **values: object) -> TrainConfig:
    return load_options(TrainConfig, NEEDED | values, overrides)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as far as configurations look at one."""
    folder = tmp_path / "cache"
    folder.mkdir()
    plan = Plan(store="zarr", sample_count=1, shard_size=1, teacher={"hidden_size": 64}, signals={}, fields={})
    write_plan(folder, plan)
    return folder


@pytest.mark.parametrize("given", ["file", "set", "flag"])
def test_words_of_other_trainers_reach_the_same_options_from_every_place(tmp_path, cache, monkeypatch, given):
    words = {
        "model_name_or_path": "mobilevlm-tiny", "output_dir": str(tmp_path / "o"), "dataset_name": "shapes",
        "learning_rate": 0.25, "per_device_train_batch_size": 3, "num_train_epochs": 2.0, "warmup_ratio": 0.5,
        "lr_scheduler_type": "constant_with_warmup", "max_grad_norm": 2.0, "bf16": True, "fp16": False, "save_steps": 7,
        "logging_steps": 8, "save_total_limit": 9, "dataloader_num_workers": 3, "gradient_checkpointing": True,
        "report_to": "none", "lora_r": 4, "lora_alpha": 5.0, "lora_dropout": 0.5, "max_seq_length": 99, "weight_decay": 0.5,
    }  # fmt: skip
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in words.items()}
    arguments = ["--cache", str(cache)]
    if given == "file":
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(words))
        arguments += ["--config", str(tmp_path / "mine.yaml")]
    elif given == "set":
        arguments += [part for key, text in texts.items() for part in ("--set", f"{key}={text}")]
    else:
        switches = ["--bf16", "True", "--gradient_checkpointing", "yes"]
        arguments += [
            part
            for key, text in texts.items()
            if key not in ("bf16", "gradient_checkpointing")
            for part in (f"--{key.replace('_', '-')}", text)
        ]
        arguments += switches
    found: list[TrainConfig] = []
    monkeypatch.setattr("vlm_distill_cache.stage2_student.cli.refuse_uncut", lambda *_: 1 / 0)  # as far as options go
    monkeypatch.setattr(
        "vlm_distill_cache.stage2_student.cli.runs.load_run_config",
        lambda *args, **named: found.append(load_run_config(*args, **named)) or found[-1],
    )
    result = CliRunner().invoke(group_of("stage2_student"), ["train", *arguments])
    assert isinstance(result.exception, ZeroDivisionError), result.output
    config = found[0]
    assert config == dataclasses.replace(
        config, student="mobilevlm-tiny", output=str(tmp_path / "o"), data="shapes", clip=2.0, dtype="bfloat16",
        checkpoint_every=7, log_every=8, keep_checkpoints=9, num_workers=3, gradient_checkpointing=True, report_to=(),
        lora=LoraConfig(rank=4, alpha=5.0, dropout=0.5), max_length=99,
    )  # fmt: skip
    for name in PHASE_NAMES:
        phase = getattr(config, name)
        assert phase == dataclasses.replace(
            phase,
            lr=0.25,
            micro_batch_size=3,
            epochs=2.0,
            steps=None,
            warmup=0.5,
            schedule="constant",
            weight_decay=0.5,
        )


def test_what_holds_for_all_phases_stands_under_what_a_phase_says_in_the_same_place(tmp_path, cache):
    file = tmp_path / "mine.yaml"
    file.write_text("dft: {learning_rate: 0.5}\nlr: 0.25\n")

    def rates(*overrides):
        config = load_run_config(file, [f"output={tmp_path / 'o'}", *overrides], cache=cache)
        return [getattr(config, name).lr for name in PHASE_NAMES]

    assert rates() == [0.25, 0.5, 0.25]
    assert rates("dft={learning_rate: 3}") == [0.25, 3.0, 0.25]
    assert rates("sft.lr=2", "lr=1") == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        (TrainConfig, "gradient_accumulation_steps=4", r"follows from batch_size.*Write batch_size="),
        (TrainConfig, "dft.gradient_accumulation_steps=4", r"dft\.gradient_accumulation_steps=4 .*Write batch_size="),
        (TrainConfig, "warmup_steps=9", "share of a phase's steps"),
        (TrainConfig, "lr_scheduler_type=linear", r"expected cosine or constant"),
        (TrainConfig, "report_to=wandbb", r"'wandbb'; expected one of 'tensorboard', 'wandb', 'mlflow', 'trackio'"),
        (TrainConfig, "report_to=[wandb, wandb]", r"report_to.*without repetition"),
        (TrainConfig, "report_to=[none, wandb]", r"report_to \(--log-with\) is .'none', 'wandb'.; .*, or none alone"),
        (TrainConfig, "report_to=all", r"'all'; expected one of 'tensorboard'"),
        (TrainConfig, "fp16=true", "Write dtype=bfloat16"),
        (TrainConfig, "bf16=maybe", "expected true or false"),
        (TrainConfig, "bf16", "expected true or false"),
        (TrainConfig, "cache_dir=x", "HF_HOME"),
        (TrainConfig, "quantization=4bit", r"dpt\.trainable is 'all'; it must be projector or lora"),
        (TrainConfig, "quantisation=8bit", "expected one of 'none', '4bit'"),
        (TrainConfig, "load_in_8bit=true", "write quantisation=4bit"),
        (TrainConfig, "optim=sgd", "expected one of 'adamw', 'adamw8bit'"),
        (TrainConfig, "dtype=float16", "expected one of 'float32', 'bfloat16'"),
        (TrainConfig, "kd_temperature=2", r"write dft\.losses\.temperature"),
        (TrainConfig, "top_k=5", r"write logits=fixed:K in stage one"),
        (TrainConfig, "losses.logits=2", r"write dft\.losses\.logits$"),
        (TrainConfig, "losses={logits: 2}", r"write dft\.losses$"),
        (TrainConfig, "alpha=0.5", r"write dft\.losses\.logits"),
        (TrainConfig, "dataset_dir=x", "images=FOLDER"),
        (TrainConfig, "eval_strategy=epoch", r"evaluation\.every=STEPS"),
        (TrainConfig, "save_strategy=epoch", "checkpoint_every"),
        (TrainConfig, "run_name=x", "write output=FOLDER"),
        (BuildConfig, "kd_temperature=2", r"dft\.losses\.temperature=2 in stage two"),
        (TrainConfig, "rank=3", r"belongs to lora: write lora\.rank"),
        (TrainConfig, "answer_attention=3", r"write dft\.losses\.answer_attention"),
        (TrainConfig, "dft.seed=3", "seed is no option of dft: write seed"),
        (TrainConfig, "dft.batchsize=3", r"did you mean dft\.batch_size\?"),
        (TrainConfig, "shard_sizes=3", r"did you mean shard_size\? But it is an option of stage one"),
        (TrainConfig, "dtype.x=1", "dtype has no options of its own"),
        (TrainConfig, "lr.x=1", "lr has no options of its own"),
        (TrainConfig, "dft.learning_rate.x=1", r"dft\.learning_rate\.x: learning_rate has no options"),
        (BuildConfig, "weight_decay=0", "option of stage two"),
        (BuildConfig, "lr=1", "option of stage two"),
        (BuildConfig, "temperature=1", "temperatures=.*answer_temperature="),
        (BuildConfig, "wamup_ratio=1", r"did you mean warmup_ratio\? But"),
        (BuildConfig, "batchsize=1", r"did you mean batch_size\?"),
        (TrainConfig, "dtf.lr=1", r"unknown option dtf; did you mean dft\?"),
        (
            TrainConfig,
            "train.lr=1",
            r"unknown option train: frames, dpt, dft, sft, lora, pruning, evaluation have options of their own",
        ),
        (TrainConfig, "dft.lora_r=1", r"lora_r is no option of dft: write lora_r"),
        (TrainConfig, "LEARNING_RATE=1", r"did you mean learning_rate\?"),
        (TrainConfig, "Lr=1", r"did you mean lr\?"),
        (TrainConfig, "logits_kind=tvd", r"did you mean dft\.losses\.logit_kind\?"),
        (TrainConfig, "lr=", r"--set: lr is None"),
        (TrainConfig, "lr=fast", r"--set: lr is 'fast' .*expected a number"),
        (TrainConfig, "freeze_vision_tower=true", "write trainable=projector"),
        (TrainConfig, "mm_projector_type=linear", "write projector=ldpnet"),
        (TrainConfig, "teacher_model_name_or_path=x", "`teacher-cache build --teacher`"),
        (TrainConfig, "attn_implementation=eager", "leave it out"),
        (TrainConfig, "nproc=2", "--nproc N"),
        (BuildConfig, "do_sample=true", "write answers=generate"),
        (BuildConfig, "k=3", "write logits=fixed:K"),
        (BuildConfig, "signals=logit", "choose from logits, answer_attention"),
    ],
)
def test_what_means_something_else_is_refused_with_what_to_write(stage, given, message):
    with pytest.raises(ConfigError, match=message):
        load_options(stage, NEEDED if stage is TrainConfig else {}, [given])


def test_lists_may_be_given_as_plain_text_and_words_of_others_are_taken():
    build = load_options(
        BuildConfig, {}, ["signals=logits, hidden", "temperatures=2", "model=t", "top_p=0.5", "bits=4"]
    )
    assert build == BuildConfig(
        signals=("logits", "hidden"), temperatures=(2.0,), teacher="t", answer_top_p=0.5, quantisation="4bit"
    )
    assert load_options(BuildConfig, {}, ["signals=logits hidden", "temperatures=1 2", "bs=4"]) == BuildConfig(
        signals=("logits", "hidden"), temperatures=(1.0, 2.0), batch_size=4
    )
    assert stage_two(*(f"dft.{name}=None" for name in ("steps", "epochs", "tower_lr")), "limit=none") == stage_two()
    given = stage_two(
        "phases=dft,sft", "model=s", "finetuning_type=lora", "lora_target=all", "data_seed=3", "packing=false"
    )
    assert given == stage_two("phases=[dft, sft]", "student=s", "trainable=lora", "seed=3")
    with pytest.raises(ConfigError, match=r"signals is 'logits'; expected a list, such as \[logits\]"):
        load_options(BuildConfig, {"signals": "logits"})


def edits(one: str, other: str) -> int:
    """The slow way: letters that are the same, exchanged, or not there."""
    if not one or not other:
        return len(one) + len(other)
    ways = [edits(one[1:], other) + 1, edits(one, other[1:]) + 1, edits(one[1:], other[1:]) + (one[0] != other[0])]
    if len(one) > 1 and len(other) > 1 and one[:2] == other[1::-1]:
        ways.append(edits(one[2:], other[2:]) + 1)
    return min(ways)


def test_a_slip_is_told_from_another_name_as_the_slow_way_tells_it():
    def plain(word: str) -> str:
        return word.lower().replace("_", "")

    words = [
        "dft",
        "dtf",
        "dpt",
        "data",
        "date",
        "loss",
        "lr",
        "Lr",
        "rate",
        "l_r",
        "top_k",
        "top_p",
        "tf32",
        "tf23",
        "bf16",
        "steps",
    ]
    for one in words:
        most = 0 if len(plain(one)) < 3 else 1 if len(plain(one)) < 6 else 2
        far = {word: edits(plain(one), plain(word)) for word in words if word != one}
        far = {word: count for word, count in far.items() if re.findall(r"\d", word) == re.findall(r"\d", one)}
        least = min(far.values(), default=most + 1)
        assert slips(one, far) == ([word for word, count in far.items() if count == least] if least <= most else [])


def test_flags_that_there_are_not_are_told_the_nearest_and_no_others():
    for words, meant in (
        ("train --dtf.lr 1", "Did you mean --dft.lr?"), ("run --nprocs 2", "Did you mean --nproc?"),
        ("train --LR 1", "Did you mean --lr?"), ("train --cahce x", "Did you mean --cache?"),
        ("export --no-verfy x", "No such option '--no-verfy'."), ("train --nothing 1", "No such option '--nothing'."),
    ):  # fmt: skip
        told = CliRunner().invoke(group_of("stage2_student"), words.split())
        assert (told.exit_code, told.output.strip().endswith(meant)) == (2, True), told.output


@pytest.mark.parametrize("stage", CLASSES)
def test_what_is_far_from_all_options_is_not_taken_for_one(stage):
    with pytest.raises(ConfigError) as error:
        load_options(stage, NEEDED if stage is TrainConfig else {}, ["zebra=1"])
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "one", "other"),
    [
        (TrainConfig, "lr=1", "learning_rate=1"), (TrainConfig, "dft.lr=1", "dft.learning_rate=1"),
        (TrainConfig, "bf16=true", "dtype=float32"),
        (TrainConfig, "precision=bf16", "dtype=bfloat16"), (TrainConfig, "lora_r=1", "lora.r=1"),
        (BuildConfig, "output_dir=x", "cache=y"), (BuildConfig, "quantization=4bit", "load_in_4bit=true"),
    ],
)  # fmt: skip
def test_one_option_in_two_words_is_an_error_and_either_alone_is_none(stage, one, other):
    base = NEEDED if stage is TrainConfig else {}
    assert load_options(stage, base, [one]) != load_options(stage, base)
    load_options(stage, base, [other])
    for pair in ((one, other), (other, one)):
        with pytest.raises(ConfigError, match=r"are the same option.*give one of them"):
            load_options(stage, base, pair)


def test_what_other_trainers_write_for_nothing_says_nothing():
    for nothing in (
        "gradient_accumulation_steps=1", "dft.gradient_accumulation_steps=1", "fsdp=[]", "fsdp=''", "fsdp=false", "deepspeed=null",
        "resume_from_checkpoint=false", "optimizer=adamw_torch", "eval_strategy=no", "save_strategy=steps", "push_to_hub=false",
    ):  # fmt: skip
        assert stage_two(nothing) == TrainConfig(**NEEDED), nothing
    for nothing in ("[]", "no", "off", "false", "none", "null"):
        assert stage_two(f"report_to={nothing}").report_to == ()
    assert stage_two("log_with=wandb,mlflow") == stage_two("report_to=[wandb, mlflow]")
    assert stage_two("optim=adamw_bnb_8bit") == stage_two("optimizer=adamw8bit")
    assert stage_two("load_in_4bit=true", "trainable=lora") == stage_two("quantisation=nf4", "trainable=lora")
    assert stage_two("log_with=trackio").report_to == ("trackio",)
    assert TrainConfig(**NEEDED, report_to="none").report_to == ()  # as Python callers had it
    assert stage_two("dataset=d", "cutoff_len=7", "lora_rank=3", "global_batch_size=5") == stage_two(
        "data=d", "max_length=7", "lora.rank=3", "batch_size=5"
    )


def test_a_mapping_given_by_set_is_merged_as_one_of_a_file(tmp_path, cache):
    (tmp_path / "mine.yaml").write_text("dft: {steps: 3, losses: {hidden: 2}}\n")
    output = f"output={tmp_path / 'o'}"
    by_file = load_run_config(tmp_path / "mine.yaml", [output], cache=cache)
    assert load_run_config(None, [output, "dft={steps: 3, losses: {hidden: 2}}"], cache=cache) == by_file
    assert load_run_config(None, [output, "dft={}"], cache=cache) == load_run_config(None, [output], cache=cache)
    assert by_file.dft.losses.logits > 0  # of the preset


@pytest.mark.parametrize(
    ("stage", "words", "problem"),
    [
        ("stage2_student", ("train", "--cache", "a", "--set", "cache=b"), "--cache a and --set cache=b are the same option"),
        ("stage2_student", ("run", "--cache", "a", "--output", "x", "--output-dir", "y"), "--output x and --set output=y"),
        ("stage1_teacher", ("build", "--limit", "3", "--max-train-samples", "4"), "--limit 3 and --set limit=4"),
        ("stage1_teacher", ("extend", ".", "--set", "output=b"), "cache . and --set cache=b"),
    ],
)  # fmt: skip
def test_an_option_and_set_of_the_same_option_do_not_hide_each_other(stage, words, problem):
    told = CliRunner().invoke(group_of(stage), words)
    assert (told.exit_code, problem in told.output) == (2, True), told.output


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("stage2_student", ["frobnicate", "--json"]),
        ("stage2_student", ["--json", "run"]),
        ("common", ["verfy", "c", "--json"]),
        ("common", ["verify", "a\nb", "--json"]),
    ],
)
def test_what_is_wrong_before_a_command_is_known_is_a_document_too(package, words):
    told = CliRunner().invoke(group_of(package), words)
    assert told.exit_code == 2
    assert json.loads(told.stdout)["error"]


def test_both_stages_take_each_others_words_and_values():
    for word in ("dtype", "precision", "mixed_precision"):
        for value, meant in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("no", "float32")):
            assert load_options(BuildConfig, {}, [f"{word}={value}"]).dtype == meant
            assert stage_two(f"{word}={value}").dtype == meant
    for value in ("null", "0"):
        assert load_options(BuildConfig, {}, [f"limit={value}", f"max_length={value}"]) == BuildConfig()
        assert stage_two(f"limit={value}", f"max_length={value}") == TrainConfig(**NEEDED)
    assert load_options(BuildConfig, {"images": None, "template": None}) == BuildConfig()
    assert stage_two(images="", template="auto") == TrainConfig(**NEEDED)
    assert load_options(BuildConfig, {}, ["quantization=4bit"]).quantisation == "4bit"
    assert stage_two("device=cuda:1").device == "cuda:1"
    with pytest.raises(ConfigError, match="device"):
        stage_two("device=gpu")


def test_each_stage_knows_every_word_of_the_other():
    """So that a word at the wrong place is never called unknown."""

    def words(cls):
        return {*cls.WORDS, *(field.name for field in dataclasses.fields(cls))}

    phase = {field.name for field in dataclasses.fields(PhaseConfig)} | PhaseConfig.WORDS.keys()
    assert words(BuildConfig) >= words(TrainConfig) | phase
    assert words(TrainConfig) | {"losses", "logits"} >= words(BuildConfig)


def test_every_word_names_options_that_there_are():
    for cls in (*CLASSES, PhaseConfig, LoraConfig):
        for name, word in cls.WORDS.items():
            for option in word.options:
                node = cls
                for part in option.split("."):
                    assert part in node.__dataclass_fields__, (name, option)
                    node = node.__dataclass_fields__[part].type if part not in PHASE_NAMES else PhaseConfig
                    node = LoraConfig if part == "lora" else node
            assert word.options or word.note


def test_fingerprints_of_runs_are_those_they_had_under_the_old_word():
    for dtype, digest in (
        ("float32", "0be38ce6b1119e4e139728b2d65bd903"),
        ("bfloat16", "b9cf36de497812e2d9a139969023bd74"),
    ):
        config = TrainConfig(**NEEDED, dft=PhaseConfig(lr=1e-4, steps=3), dtype=dtype, report_to="none")
        assert fingerprint(describe(config, {"c": "1"})) == digest


def test_configurations_of_older_versions_are_read_and_ours_are_stored():
    old = config_to_dict(TrainConfig(**NEEDED, dtype="bfloat16"))
    old["precision"] = {"float32": "no", "bfloat16": "bf16"}[old.pop("dtype")]
    del old["report_to"]
    config = config_from_dict(TrainConfig, old)
    assert config == TrainConfig(**NEEDED, dtype="bfloat16")
    assert "precision" not in config_to_dict(config)


def test_steps_over_a_file_with_epochs_mean_steps(tmp_path, cache):
    file = tmp_path / "mine.yaml"
    file.write_text("dft: {steps: null, epochs: 0.5}\n")
    given = [f"output={tmp_path / 'o'}"]
    for more, found in (([], (None, 0.5)), (["dft.steps=3"], (3, None)), (["max_steps=4"], (4, None))):
        dft = load_run_config(file, [*given, *more], cache=cache).dft
        assert (dft.steps, dft.epochs) == found


def test_cache_and_output_are_asked_for_only_where_nothing_names_them(tmp_path, cache):
    with pytest.raises(ConfigError, match=r"cache: none is given; add --cache FOLDER, or cache: FOLDER"):
        load_run_config(None, [f"output={tmp_path}"])
    with pytest.raises(ConfigError, match=r"output: none is given; add --output"):
        load_run_config(None, [], cache=cache)
    with pytest.raises(ConfigError, match=r"cache: nowhere is neither a folder nor an address"):
        load_run_config(None, [f"output={tmp_path}", "cache=nowhere"])
    with pytest.raises(ConfigError, match=r"output is 's3://b/o'; it must be a folder of this machine"):
        load_run_config(None, ["output=s3://b/o"], cache=cache)


def test_a_builds_options_lie_beside_its_cache_and_nobody_elses_file_is_lost(tmp_path):
    config = BuildConfig(cache=str(tmp_path / "c"), limit=3)
    path = save_replay(config, config.cache)
    assert path == tmp_path / "c.build.yaml"
    assert load_config(BuildConfig, path) == config
    path.write_text("mine: 1\n")
    assert save_replay(config, config.cache) is None
    assert path.read_text() == "mine: 1\n"
    assert save_replay(config, tmp_path / "none" / "c") is None


def test_a_gpu_that_is_not_there_is_refused_before_training():
    choose_gpu("cpu", processes=1)
    choose_gpu("auto", processes=2)
    with pytest.raises(ConfigError, match="CUDA devices are here"):
        choose_gpu("cuda:77", processes=1)
