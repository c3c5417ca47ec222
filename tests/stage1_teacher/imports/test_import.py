"""What a server said of a model's own prompts makes the cache that stage one makes of the model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, write_lines
from family_caches import build
from tiny_families import save_tiny

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.errors import CacheMismatchError, TemperatureNotCachedError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.inspect import describe_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import recompute_fidelity
from vlm_distill_cache.stage1_teacher.imports import align
from vlm_distill_cache.stage1_teacher.imports.teacher import ServedTeacher
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.run import load_run_config
from vlm_distill_cache.stage2_student.run import run as run_student

K = 8


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_tiny("llava", tmp_path_factory.mktemp("llava") / "teacher")


@pytest.fixture(scope="module")
def server(llava: Path, family_data: Path) -> FakeServer:
    return FakeServer(llava, family_data)


@pytest.fixture(scope="module")
def built(llava: Path, family_data: Path, tmp_path_factory):
    options = {"signals": ("logits",), "logits": f"fixed:{K}", "temperatures": (1.0,)}
    return build(llava, family_data, tmp_path_factory.mktemp("built") / "cache", **options)


def without_weights(teacher: Path, target: Path) -> Path:
    shutil.copytree(teacher, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    return target


def run(files, data: Path, teacher: Path, cache: Path, *options: str):
    files = files if isinstance(files, list) else [files]
    words = ["import-logprobs", *map(str, files), "--data", str(data), "--teacher", str(teacher), "--cache", str(cache)]
    return CliRunner().invoke(group_of("common"), [*words, *options])


FORMS = {
    "vllm": lambda server, sample: {
        "custom_id": sample.sample_id,
        "response": {"body": server.vllm(sample, K)},
        "error": None,
    },
    "vllm-top": lambda server, sample: {"sample_id": sample.sample_id, **server.vllm(sample, K)["choices"][0]},
    "sglang": lambda server, sample: {"id": sample.sample_id, **server.sglang(sample, K)},
    "openai": lambda server, sample: {"custom_id": sample.sample_id, "response": {"body": server.openai(sample, K)}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow(quick=1)
def test_the_cache_is_the_one_that_stage_one_builds(form, server, built, llava, family_data: Path, tmp_path: Path):
    dump = write_lines(tmp_path / "dump.jsonl", [FORMS[form](server, sample) for sample in server.samples])
    teacher = without_weights(llava, tmp_path / "teacher")
    result = run(dump, family_data, teacher, tmp_path / "cache", "--set", f"logits=fixed:{K}")
    assert result.exit_code == 0, result.output
    cache = open_cache(tmp_path / "cache")
    assert list(cache) == list(built)
    for sample_id, expected in built.items():
        found = cache[sample_id]
        for name in ("labels", "image_hash", "tiles", "entry_count", "token_ids"):
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        ours, theirs = cache.decode("logits", found), built.decode("logits", expected)
        np.testing.assert_allclose(np.exp(ours.log_probs), np.exp(theirs.log_probs), atol=2e-3)
        np.testing.assert_allclose(np.exp(ours.tail_log_mass), np.exp(theirs.tail_log_mass), atol=1e-3)
    assert not list(verify(tmp_path / "cache", deep=True))
    assert "not measured" in describe_cache(tmp_path / "cache")
    card = (tmp_path / "cache" / "README.md").read_text()
    assert "the teacher was served" in card


@pytest.fixture(scope="module")
def dump(server, tmp_path_factory) -> Path:
    rows = [FORMS["vllm"](server, sample) for sample in server.samples]
    return write_lines(tmp_path_factory.mktemp("dump") / "dump.jsonl", rows)


def changed(dump: Path, target: Path, change) -> Path:
    """A dump with a change to each row: ``change(row)`` gives a row, or None to leave it out."""
    rows = [change(json.loads(line)) for line in dump.read_text().splitlines()]
    return write_lines(target, [row for row in rows if row is not None])


def choice_of(row: dict) -> dict:
    return row["response"]["body"]["choices"][0]


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow
def test_a_student_learns_from_it_and_all_tools_work_on_it(store, dump, llava, family_data, tmp_path: Path):
    cache = tmp_path / "cache"
    done = run(dump, family_data, llava, cache, "--store", store, "--teacher-name", "big model")
    assert done.exit_code == 0, done.output
    assert "Teacher cache written: 10 samples" in done.output
    assert "dft.losses.answer_attention=0" in done.output
    again = run(dump, family_data, llava, cache, "--store", store, "--teacher-name", "big model")
    assert "Teacher cache is up to date: 10 samples" in again.output
    tools = group_of("common")
    other = "webdataset" if store == "zarr" else "zarr"
    for words in (
        ["verify", cache, "--deep"], ["inspect", cache], ["inspect", cache, "s3"],
        ["convert", cache, tmp_path / "other", "--store", other],
        ["push", cache, tmp_path / "pushed"], ["verify", tmp_path / "pushed", "--deep"], ["repair", cache],
        ["pull", str(cache), tmp_path / "less", "--top-k", "4", "--samples", "5"],
        ["verify", tmp_path / "less", "--deep"],
    ):  # fmt: skip
        ran = CliRunner().invoke(tools, [str(word) for word in words])
        assert ran.exit_code == 0, ran.output
        if words == ["inspect", cache]:
            assert "teacher         big model, family llava, dtype served" in ran.output
    settings = [
        "student=mobilevlm",
        f"data={family_data}",
        f"output={tmp_path / 'run'}",
        "device=cpu",
        "phases=[dft]",
        "dft.steps=2",
    ]
    settings += [
        "dft.batch_size=4",
        "dft.losses.answer_attention=0",
        "evaluation.limit=2",
        "evaluation.letters=false",
    ]
    result = run_student(load_run_config(None, settings, cache=cache))
    assert result.report.is_file()


def test_no_other_temperature_is_known(dump, llava, family_data, tmp_path: Path):
    result = run(dump, family_data, llava, tmp_path / "cache", "--set", "temperatures=[1.0, 2.0]")
    assert result.exit_code == 1
    assert "temperatures: [1.0, 2.0] cannot be known" in result.output
    assert not (tmp_path / "cache").exists()
    assert run(dump, family_data, llava, tmp_path / "cache").exit_code == 0
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(
        TemperatureNotCachedError, match=r"no tail mass at temperature 2.0: .* hold temperatures \[1.0\]"
    ):
        as_tensors(cache.decode("logits", cache["s0"])).at(2.0)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("dft.losses.temperature=2.0", "or {anew} --set temperatures=[2.0]"),
        (
            "dft.losses.answer_attention=1",
            "or {anew} --signals answer_attention,...",
        ),
        ("dft.losses.hidden=1", "or {anew} --signals answer_attention,hidden,..."),
        ("data={other}", "or build a cache for this data (cachectl import-logprobs --data ...)"),
    ],
)
def test_training_advises_nothing_that_a_served_teachers_cache_cannot_have(
    setting: str, said: str, dump, llava, family_data, tmp_path: Path
):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(family_data.read_text())[:3]))
    cache = tmp_path / "cache"
    assert run(dump, family_data, llava, cache).exit_code == 0
    base = [
        "student=mobilevlm",
        f"data={family_data}",
        f"output={tmp_path / 'run'}",
        "device=cpu",
        "phases=[dft]",
        "dft.steps=1",
    ]
    off = [] if "answer_attention" in said or "hidden" in said else ["dft.losses.answer_attention=0"]
    with pytest.raises(CacheMismatchError) as refused:
        run_student(load_run_config(None, [*base, *off, setting.format(other=other)], cache=cache))
    anew = (
        "build a cache from the teacher's weights (this one was imported from a server's log-probabilities, which hold no more): "
        "teacher-cache build --teacher DIR"
    )
    assert said.format(anew=anew) in " ".join(str(refused.value).split())
    with pytest.raises(CacheMismatchError) as lacking:
        open_cache(cache).codec("hidden")
    assert f"or {anew} --signals logits,hidden" in str(lacking.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("signals=[logits, answer_attention]", "signals: logits, answer_attention cannot be had of a served teacher"),
        ("answers=generate", "a served teacher cannot be asked"),
        ("template=nonsense", "nonsense"),
    ],
)
def test_what_only_a_teacher_at_hand_could_do_is_refused(setting, said, dump, llava, family_data, tmp_path: Path):
    result = run(dump, family_data, llava, tmp_path / "cache", "--set", setting)
    assert result.exit_code == 1
    assert said in result.output


def test_failures_are_recorded_and_too_many_stop_it(dump, llava, family_data, tmp_path: Path):
    def spoil(row: dict):
        if row["custom_id"] == "s1":
            choice_of(row)["prompt_token_ids"][-3] = 70
        return None if row["custom_id"] == "s2" else row

    spoilt = changed(dump, tmp_path / "spoilt.jsonl", spoil)
    cache = tmp_path / "cache"
    stopped = run(spoilt, family_data, llava, cache)
    assert stopped.exit_code == 1
    assert "2 of 10 samples cannot be used, more than the tolerated 1 %" in stopped.output
    assert "s2: no row of the files has its id" in stopped.output
    went = run(spoilt, family_data, llava, cache, "--set", "max_failed_share=0.2")
    assert went.exit_code == 0, went.output
    assert "8 samples, " in went.output
    assert "s1: the server's prompt differs at its token" in went.output
    more = run(dump, family_data, llava, cache, "--set", "max_failed_share=0.2")
    assert more.exit_code == 1
    assert "data.responses" in more.output
    assert "add --overwrite to `cachectl import-logprobs`" in more.output
    assert run(dump, family_data, llava, cache, "--overwrite").exit_code == 0


def test_a_stopped_import_goes_on(dump, llava, family_data, tmp_path: Path, monkeypatch):
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    options = ("--set", "shard_size=3", "--set", "num_workers=0")
    calls = iter(range(100))
    monkeypatch.setattr(align.Aligner, "distributions", stop_after(align.Aligner.distributions, calls, 7))
    assert isinstance(run(dump, family_data, llava, cache, *options).exception, SystemExit)
    monkeypatch.undo()
    missing = missing_shards(cache, read_plan(cache))
    assert 0 < len(missing) < 4
    shown = CliRunner().invoke(group_of("common"), ["verify", str(cache)]).output
    assert "Next: cachectl import-logprobs with the same options makes the missing shards" in shown
    assert run(dump, family_data, llava, cache, *options).exit_code == 0
    assert run(dump, family_data, llava, whole, *options).exit_code == 0
    assert {p.relative_to(cache): p.read_bytes() for p in cache.rglob("*") if p.is_file()} == {
        p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()
    }


def stop_after(function, calls, count: int):
    def stopping(*arguments):
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopping


def test_caches_of_two_dumps_of_one_teacher_are_merged(dump, llava, family_data, tmp_path: Path):
    entries = json.loads(family_data.read_text())
    for name, part in (("first", entries[:5]), ("second", entries[5:])):
        data = family_data.parent / f"{name}.json"
        data.write_text(json.dumps(part))
        ids = {entry["id"] for entry in part}
        own = changed(dump, tmp_path / f"{name}.jsonl", lambda row, ids=ids: row if row["custom_id"] in ids else None)
        assert run(own, data, llava, tmp_path / name).exit_code == 0
    words = ["merge", tmp_path / "first", tmp_path / "second", "--output", tmp_path / "both"]
    merged = CliRunner().invoke(group_of("common"), [str(word) for word in words])
    assert merged.exit_code == 0, merged.output
    assert run(dump, family_data, llava, tmp_path / "whole").exit_code == 0
    both, whole = open_cache(tmp_path / "both"), open_cache(tmp_path / "whole")
    for sample_id, record in whole.items():
        for name, array in record.items():
            np.testing.assert_array_equal(both[sample_id][name], array)


def test_the_fidelity_of_a_served_teachers_cache_cannot_be_measured(dump, llava, family_data, tmp_path: Path):
    assert run(dump, family_data, llava, tmp_path / "cache").exit_code == 0
    with pytest.raises(CacheMismatchError, match="no live teacher to compare it with"):
        recompute_fidelity(
            BuildConfig(teacher=str(llava), data=str(family_data), cache=str(tmp_path / "cache")), samples=2
        )


def test_responses_of_several_models_need_a_name(dump, llava, family_data, tmp_path: Path):
    def rename(row: dict) -> dict:
        row["response"]["body"]["model"] = f"m{row['custom_id'] == 's1'}"
        return row

    mixed = changed(dump, tmp_path / "mixed.jsonl", rename)
    refused = run(mixed, family_data, llava, tmp_path / "cache")
    assert "the responses are of several models: 'mFalse', 'mTrue'; give those of one" in " ".join(
        refused.output.split()
    )
    assert run(mixed, family_data, llava, tmp_path / "cache", "--teacher-name", "m").exit_code == 0


def test_a_prompt_with_the_picture_as_one_placeholder(dump, llava, family_data, server, tmp_path: Path):
    image = server.teacher.image_token_id

    def collapse(row: dict) -> dict:
        choice = choice_of(row)
        ids = choice["prompt_token_ids"]
        kept = [place for place, token in enumerate(ids) if token != image or ids[place - 1] != image]
        choice["prompt_token_ids"] = [ids[place] for place in kept]
        choice["prompt_logprobs"] = [choice["prompt_logprobs"][place] for place in kept]
        return row

    folded = changed(dump, tmp_path / "folded.jsonl", collapse)
    assert run(folded, family_data, llava, tmp_path / "folded").exit_code == 0
    assert run(dump, family_data, llava, tmp_path / "whole").exit_code == 0
    one, other = open_cache(tmp_path / "folded"), open_cache(tmp_path / "whole")
    for sample_id, record in other.items():
        np.testing.assert_array_equal(one[sample_id]["log_gap"], record["log_gap"])


def test_what_could_not_be_checked_and_what_says_little_is_said(server, llava, family_data, tmp_path: Path, caplog):
    rows = [FORMS["openai"](server, sample) for sample in server.samples]
    assert run(write_lines(tmp_path / "answers.jsonl", rows), family_data, llava, tmp_path / "a").exit_code == 0
    assert "of 10 samples the response holds the answer alone" in caplog.text
    rows = [{"sample_id": sample.sample_id, **server.vllm(sample, 0)} for sample in server.samples]
    assert run(write_lines(tmp_path / "bare.jsonl", rows), family_data, llava, tmp_path / "b").exit_code == 0
    assert "of 10 samples the response tells how likely each answer token is and nothing" in caplog.text
    assert not list(verify(tmp_path / "b", deep=True))


@pytest.mark.parametrize(
    "name",
    [
        "llava_next",
        "llava_onevision",
        "qwen2_5_vl",
        "smolvlm",
        "internvl",
        "paligemma",
        "gemma3",
        "mobilevlm_v1",
        "mobilevlm_v2",
        "compodistill",
    ],
)
@pytest.mark.slow(quick=("gemma3", "qwen2_5_vl", "smolvlm"))
def test_every_family_is_described_without_its_weights(name: str, tmp_path: Path):
    teacher = Teacher(save_tiny(name, tmp_path / "teacher"))
    served = ServedTeacher(without_weights(tmp_path / "teacher", tmp_path / "served"))
    assert served.image_encoder.to_dict() == teacher.image_encoder.to_dict()
    assert served.fingerprints()["tokenizer"] == teacher.fingerprints()["tokenizer"]
    assert (served.depth, served.image_token_id, served.family) == (
        teacher.depth,
        teacher.image_token_id,
        teacher.family,
    )
    assert served.groups(2, "middle") == teacher.groups(2, "middle")
    assert served.vocabulary == text_config(teacher.config).vocab_size


def test_a_family_that_is_not_listed_is_imported_too(unlisted_teacher: Path, family_data: Path, tmp_path: Path):
    server = FakeServer(unlisted_teacher, family_data)
    asked = write_lines(tmp_path / "dump.jsonl", [FORMS["vllm"](server, sample) for sample in server.samples])
    teacher = without_weights(unlisted_teacher, tmp_path / "teacher")
    result = run(asked, family_data, teacher, tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert not list(verify(tmp_path / "cache", deep=True))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_teacher_that_lacks_a_file_is_told(missing: str, dump, llava, family_data, tmp_path: Path):
    teacher = without_weights(llava, tmp_path / "teacher")
    (teacher / missing).unlink()
    result = run(dump, family_data, teacher, tmp_path / "cache")
    assert result.exit_code == 1
    assert str(teacher) in result.output
    assert "Traceback" not in result.output


def test_the_help_needs_no_torch():
    code = (
        "import sys\nfrom vlm_distill_cache.commands import group_of\n"
        "print(group_of('common').get_help(__import__('click').Context(group_of('common'))))\n"
        "sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "import-logprobs" in shown


@pytest.mark.parametrize("name", ["llava_original", "mobilevlm_v1", "mobilevlm_v2", "compodistill"])
@pytest.mark.slow(quick=("compodistill",))
def test_teachers_whose_picture_has_an_id_of_its_own_are_imported(name: str, family_data: Path, tmp_path: Path):
    """The picture's id lies beyond their rows; servers write it as it is, once, or as the -200 of the original code."""
    server = FakeServer(save_tiny(name, tmp_path / "weights"), family_data)
    teacher, image = without_weights(tmp_path / "weights", tmp_path / "teacher"), server.teacher.image_token_id
    samples = server.samples[:4]
    for form in ("each", "once", "original", "sglang"):
        rows = []
        for sample in samples:
            row = FORMS["sglang" if form == "sglang" else "vllm-top"](server, sample)
            if form == "once":
                ids = row["prompt_token_ids"]
                kept = [place for place, token in enumerate(ids) if token != image or ids[place - 1] != image]
                row |= {key: [row[key][place] for place in kept] for key in ("prompt_token_ids", "prompt_logprobs")}
            elif form == "original":
                row["prompt_token_ids"] = [-200 if token == image else token for token in row["prompt_token_ids"]]
            rows.append(row)
        asked = write_lines(tmp_path / f"{form}.jsonl", rows)
        result = run(asked, family_data, teacher, tmp_path / form, "--limit", "4", "--set", f"logits=fixed:{K}")
        assert result.exit_code == 0, result.output
        cache = open_cache(tmp_path / form)
        for sample in samples:
            found = cache.decode("logits", cache[sample.sample_id])
            exact = server.log_probs(sample)[sample.supervised_rows].exp().numpy()
            listed = np.take_along_axis(exact, found.token_ids, axis=1)
            np.testing.assert_allclose(np.exp(found.log_probs), listed, atol=2e-3, err_msg=form)
            np.testing.assert_allclose(np.exp(found.tail_log_mass[:, 0]), 1 - listed.sum(1), atol=2e-3, err_msg=form)
