"""Nothing in a cache is run, believed beyond its range, or shown to a terminal as it is."""

import ast
import json
import pickle
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from cache_factory import build_cache, make_plan, make_record
from click.testing import CliRunner
from numcodecs.zstd import Zstd
from test_stores import write

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.sidecar import sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.cache.stores.webdataset_store import decode_member
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.checks import codec_damage
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.logits import LogitCodec, VisualLogitsCodec
from vlm_distill_cache.common.codecs.registry import CODECS, codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import MapPreset, VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.printing import one_line, printable
from vlm_distill_cache.common.tools.verify import verify

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("common", "data", "stage1_teacher", "stage2_student")
OURS = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NASTY = "\x1b]0;owned\x07\x1b[2K\rok: all is well\nok: \u202egpj.exe\x00\x9b1m"


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_no_code_of_ours_unpickles_or_evaluates():
    assert len(OURS) > 50
    for path in OURS:
        for call in calls(path):
            name = ast.unparse(call.func)
            assert name not in {"eval", "exec", "compile", "__import__", "yaml.load", "pickle.loads", "pickle.load",
                                "marshal.loads", "shelve.open"}, f"{path}: {name}"  # fmt: skip
            for keyword in call.keywords:
                asked = (keyword.arg, ast.unparse(keyword.value))
                assert asked not in {
                    ("allow_pickle", "True"),
                    ("trust_remote_code", "True"),
                    ("weights_only", "False"),
                }


class Evil:
    def __reduce__(self):
        return (Path("evil").write_text, ("ran",))


def test_pickles_in_the_place_of_arrays_are_neither_read_nor_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheFormatError):
        decode_member(bytes(Zstd().encode(pickle.dumps([Evil()] * 9))), "here")
    record = make_record(4) | {"labels": np.array([Evil()], dtype=object)}
    for store in ("zarr", "webdataset"):
        writer = write(tmp_path / store, store, [])
        with pytest.raises(CacheFormatError, match="labels has dtype object"):
            writer.append("x", record)
        writer.abort()
    assert not (tmp_path / "evil").exists()


LOGITS = {
    "codec": "logits",
    "floor": 0.0003,
    "min_k": 8,
    "max_k": 64,
    "temperatures": [1.0, 2.0],
    "exact": False,
}
ROWS = {"codec": "answer_attention", "grid": [6, 6], "groups": 1, "exact": False}
MAPS = {"codec": "visual_map", "groups": 1, "preset": "exact8"}
COLUMNS = {"codec": "visual_columns", "groups": 2, "exact": True}


@pytest.mark.parametrize(
    ("good", "change"),
    [
        *((LOGITS, {name: value}) for name, value in [
            ("max_k", 1 << 40), ("max_k", -1), ("max_k", 0), ("max_k", "64"), ("max_k", True), ("min_k", -5), ("min_k", 65),
            ("floor", -1.0), ("floor", 1.0), ("floor", "x"), ("temperatures", []), ("temperatures", [0.0]),
            ("temperatures", [1.0, -2.0]), ("temperatures", [1.0, "2"]), ("exact", 1), ("unknown", 1), ("codec", "evil"),
            ("codec", None), ("codec", ["logits"]),
        ]),
        *((ROWS, {name: value}) for name, value in [
            ("grid", [6]), ("grid", [0, 6]), ("grid", [-6, -6]), ("grid", "6x6"), ("groups", 0), ("groups", 1.5),
        ]),
        *((MAPS, {name: value}) for name, value in [("groups", -1), ("preset", "pickle"), ("preset", 3), ("grid", 1 << 40)]),
    ],
)  # fmt: skip
def test_hostile_codec_settings_are_refused(good, change):
    assert codec_from_dict(good).to_dict().items() >= good.items()  # newer settings have defaults
    with pytest.raises(CacheFormatError):
        codec_from_dict(good | change)
    assert codec_damage({"it": good | change}) != ([], [])


@pytest.mark.parametrize("missing", sorted(LOGITS))
def test_codec_settings_that_lack_one_are_refused(missing):
    with pytest.raises(CacheFormatError):
        codec_from_dict({name: value for name, value in LOGITS.items() if name != missing})


def damaged_records():
    """What checksums made anew would hide: records that no codec writes."""
    record = make_record(4)
    ids = record["token_ids"].copy()
    ids[0] = 1 << 31
    counts = record["entry_count"].copy()
    counts[0] = 0
    rising = record["log_gap"].copy()
    rising[0] = 9
    infinite = record["top_logprob"].copy()
    infinite[0] = np.inf
    positive = record["top_logprob"].copy()
    positive[0] = 1
    strangers = record["labels"].copy()
    strangers[0] = (strangers[0] + 50) % 100
    tiles = record["tiles"].copy()
    tiles[0, 0] = 0.5
    reversed_tiles = record["tiles"][:, [0, 1, 4, 5, 2, 3]]
    return {
        "the vocabulary has 100": {"token_ids": ids},
        "entry_count is 0": {
            "entry_count": counts,
            **{name: record[name][record["entry_count"][0] :] for name in ("token_ids", "log_gap")},
        },
        "log_gap is not 0 at the top": {"log_gap": rising},
        "log_gap is not 0 at the top token or falls": {"log_gap": record["log_gap"][::-1].copy()},
        "token_ids of a row repeat": {"token_ids": np.repeat(record["labels"], record["entry_count"])},
        "lack the ground truth": {"labels": strangers},
        "top_logprob holds inf": {"top_logprob": infinite},
        "expected log-probabilities of at most 0": {"top_logprob": positive},
        "expected whole numbers": {"tiles": tiles},
        "with x0 < x1 and y0 < y1": {"tiles": reversed_tiles},
        "visual_columns is": {"visual_columns": record["visual_columns"] + 1},
    }


@pytest.mark.parametrize("reason", list(damaged_records()))
def test_deep_verification_finds_values_that_no_codec_writes(reason, tmp_path):
    plan = make_plan("webdataset", samples=1, shard_size=1,
                     signals={"logits": LOGITS, "visual_map": COLUMNS})  # fmt: skip
    record = make_record(4) | damaged_records()[reason]
    write_plan(tmp_path, plan)
    writer = open_writer(plan.store, tmp_path, 0, plan.all_fields)
    writer.append("x", record)
    finish_shard(writer)
    seal(tmp_path)
    assert verify(tmp_path) == []
    [damage] = verify(tmp_path, deep=True)
    assert reason in damage.reason
    assert "sample 'x'" in damage.reason


@pytest.fixture(params=["zarr", "webdataset"])
def nasty(request, tmp_path):
    """A cache with escape sequences in every name that a program prints."""
    plan = make_plan(
        request.param, samples=2, shard_size=2, teacher={"name": NASTY, "family": NASTY, "license": NASTY},
        data={"name": NASTY, "spec": NASTY, "source": NASTY}, fingerprints={NASTY: NASTY},
        signals={NASTY: {"codec": NASTY, NASTY: [NASTY]}}, fields={NASTY: make_plan().fields["logits"]},
        extra={"derived": {NASTY: 1}},
    )  # fmt: skip
    write_plan(tmp_path / "cache", plan)
    writer = open_writer(plan.store, tmp_path / "cache", 0, plan.all_fields)
    writer.append(NASTY, {f.name: make_record(4)[f.name] for f in plan.all_fields})
    finish_shard(writer, [(NASTY + "2", NASTY)])
    seal(tmp_path / "cache", fidelity={NASTY: NASTY, "kl": 0.5})
    return tmp_path / "cache"


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", NASTY], ["inspect", "no" + NASTY], ["verify", "--deep"],
                                       ["repair", "--deep"]], ids=["cache", "record", "unknown", "verify", "repair"])  # fmt: skip
@pytest.mark.parametrize("damaged", [False, True])
def test_nothing_that_a_cache_says_controls_the_terminal(nasty, arguments, damaged):
    if damaged:
        (nasty / "shards" / NASTY.replace("\x00", "")).write_text("")
        path = sidecar_path(nasty, 0)
        body = read_document(path)
        body["field_bytes"][NASTY] = 1
        path.write_bytes(document_bytes(body))
    command, *rest = arguments
    result = CliRunner().invoke(main, [command, str(nasty), *rest])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    strange = {c for c in result.output if not c.isprintable()} - {"\n"}
    assert not strange
    assert not any(line.startswith("ok: all is well") for line in result.output.splitlines())


def test_text_is_spelt_out_and_cut():
    assert one_line("a\x1b[1mb\nc") == r"a\x1b[1mb\nc"
    assert one_line("\u202e\ud800é漢") == r"\u202e\ud800é漢"
    assert one_line("x" * 1000, limit=10) == "xxxxxxx..."
    assert printable("a\nb\r\t") == "a\nb\\r\\t"


def test_a_processor_with_code_of_its_own_is_refused_and_not_run(tmp_path):
    from vlm_distill_cache.data import builtin
    from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer

    builtin.save_processor(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, auto in (
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Evil"}}),
    ):  # fmt: skip
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(settings | auto))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    assert type(load_image_processor(tmp_path)).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_vision_tower_from_a_cache_cannot_name_code_to_fetch(tmp_path):
    from vlm_distill_cache.stage2_student.students.build import build_config
    from vlm_distill_cache.stage2_student.students.presets import load_preset

    tower = load_preset("1.7b")["vision_tower"]
    hostile = {
        "_attn_implementation": "evil/kernels",
        "attn_implementation": "evil/kernels",
        "auto_map": {"AutoModel": "x"},
    }
    (tmp_path / "vision_tower.json").write_text(json.dumps(tower | hostile))
    config = build_config(
        load_preset("tiny"), cache_dir=tmp_path, vocab_size=100, image_token_id=5,
        special_token_ids={"bos": 1, "eos": 2, "pad": 0},
    )  # fmt: skip
    assert config.vision_config.hidden_size == tower["hidden_size"]
    assert "evil" not in str(config.to_dict()) + str(config.vision_config._attn_implementation)


def test_every_promise_of_the_threat_model_names_a_test_in_the_file_where_it_is():
    page = (ROOT / "docs" / "threats.md").read_text()
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    name, claims = "", re.findall(r"`(?:[\w/]*/)?(test_\w+\.py)?::(test_\w+)`", page)
    for file, claim in claims:
        name = file or name  # else that of the one before
        assert f"def {claim}(" in tests[name], f"{name} has no {claim}"
    assert len(claims) > 25
    headings = [line for line in page.splitlines() if line.endswith("| checked in | tested by |")]
    promises = [line for line in page.splitlines() if line.startswith("| ") and line not in headings]
    assert [line for line in promises if "::test_" not in line] == []


def test_a_sound_cache_stands_every_check(tmp_path):
    build_cache(tmp_path / "cache", make_plan("zarr", samples=8, shard_size=8))
    assert verify(tmp_path / "cache", deep=True) == []


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"codec": "quantum"}, "newer", "codec 'quantum' is not known"),
        ({"codec": ["logits"]}, "newer", r"codec .* is not known"),
        ({}, "newer", "codec None is not known"),
        (LOGITS | {"entangled": True}, "newer", "settings .*entangled.* are not known"),
        (LOGITS | {"max_k": 10**400}, "plan", r"codec 'logits': .*max_k: .*got 1000.*\.\.\."),
        (LOGITS | {"floor": 1e308}, "plan", r"floor: .*got 1e\+308"),
        (LOGITS | {"temperatures": [1, 1]}, "plan", "temperatures: expected distinct"),
    ],
)
@pytest.mark.slow(quick=1)
def test_deep_verification_says_so_where_it_cannot_know_a_codecs_values(settings, kind, words, tmp_path):
    build_cache(tmp_path, make_plan(signals={"logits": settings, "visual_map": COLUMNS}))
    assert verify(tmp_path) == []  # every byte is as it was written
    [damage] = verify(tmp_path, deep=True)
    assert (damage.path, damage.kind) == ("plan.json", kind)
    assert re.search(words, damage.reason)
    result = CliRunner().invoke(main, ["verify", "--deep", str(tmp_path)])
    assert (result.exit_code, "every value" in result.output) == (1, False)


def test_verification_knows_every_codec_and_setting_that_there_is():
    codecs = [
        LogitCodec(floor=0.0003, min_k=8, max_k=64), VisualLogitsCodec(floor=0.0, min_k=2, max_k=2, temperatures=(0.5, 1.0)),
        RowAttentionCodec(grid=(6, 6), groups=1), TextAttentionCodec(grid=(1, 2), groups=4, exact=True),
        VisualColumnsCodec(groups=2), VisualMapCodec(groups=1, grid=6), TowerAttentionCodec(exact=True),
        HiddenCodec(layers=(0, 3), width=8),
        VisualHiddenCodec(layers=(1,), width=8), ProjectorOutputCodec(width=8), AnswersCodec(max_new_tokens=9, temperature=0.7),
        *(VisualMapCodec(groups=1, preset=preset) for preset in get_args(MapPreset)),
    ]  # fmt: skip
    assert {codec.signal for codec in codecs} == set(CODECS)
    for codec in codecs:
        assert codec_damage({codec.signal: codec.to_dict()}) == ([], [])
