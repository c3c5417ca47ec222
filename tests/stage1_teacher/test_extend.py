"""A sealed cache that is topped up: what one build of all of it gives, without running what is there again."""

import errno
import json
import os
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import hypothesis
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis.strategies import booleans, fixed_dictionaries, sampled_from
from PIL import Image

from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.cache.plan import Plan, read_plan, write_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.config import load_config, save_config
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, DistillError, SampleNotCachedError
from vlm_distill_cache.common.files.atomic import hold_folder
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.sources.mixture import entry_of_cache
from vlm_distill_cache.stage1_teacher import extend as extending
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import SIGNALS, BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extend import Extension, extend
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS, Sizes, build_codecs
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.extension import plan_of, unnamed_signals, with_options_of

QUESTIONS = ("what color is the circle ?", "is there a square ?")


def write_data(folder: Path, names: str, *, answer: str = "red") -> Path:
    """A LLaVA file of two conversations about each picture; of a name in capitals the picture cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name in names:
        for number, question in enumerate(QUESTIONS):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            entries.append({"id": f"{name.lower()}{number}", "image": f"{name.lower()}.png", "conversations": turns})
        picture = folder / f"{name.lower()}.png"
        if name.isupper():
            picture.write_bytes(b"cut off")
        else:
            Image.new("RGB", (40 + ord(name) % 7, 30), (2 * ord(name), 80, 90)).save(picture)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def settings(cache: Path, **options) -> BuildConfig:
    return BuildConfig(
        cache=str(cache),
        **{
            "template": "short",
            "shard_size": 4,
            "batch_size": 1,
            "fidelity_samples": 2,
            "max_failed_share": 0.5,
            **options,
        },
    )


def more(cache: Path, **options) -> Extension:
    """Extend with these options alone, and those of the cache."""
    options |= {"fidelity_samples": 2}
    return extend(BuildConfig(cache=str(cache), **options), given=options)


def plain(cache: TeacherCache) -> dict[str, dict[str, bytes]]:
    return {sample_id: {name: array.tobytes() for name, array in record.items()} for sample_id, record in cache.items()}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow(quick=("webdataset",))
def test_an_extended_cache_is_byte_for_byte_one_build_of_all_of_it(tmp_path: Path, tiny_llava: Path, store: str):
    """Signals, a larger k, repaired pictures and new ones in the middle, all at once."""
    cache, data = tmp_path / "cache", {"data": str(write_data(tmp_path / "data", "abCe")), "teacher": str(tiny_llava)}
    extract(settings(cache, **data, store=store, logits="lean", grid=4))
    before, opened, copied = tree(cache), open_cache(cache), deepcopy(open_cache(cache))
    records = plain(open_cache(cache))
    opened.read("a0", {"labels"})
    write_data(tmp_path / "data", "abcde")

    wanted = {"logits": "wide", "signals": ("visual_columns", "text_attention", "hidden")}
    found = more(cache, **data, **wanted)
    signals = (*wanted["signals"], "logits", "answer_attention")
    whole = settings(tmp_path / "whole", **data, store=store, grid=4, logits="wide", signals=signals)
    extract(whole)
    assert tree(cache) == tree(tmp_path / "whole")
    assert verify(cache, deep=True) == []
    assert (found.signals, found.samples) == (("hidden", "logits", "text_attention", "visual_columns"), 4)
    assert extract(replace(whole, cache=str(cache))).built == 0

    # Who has the old one open reads on, copies in other processes too, and nothing of it is gone.
    assert found.before is not None
    assert tree(found.before) == before
    assert plain(opened) == records
    assert plain(copied) == records  # as another process gets it, that has opened nothing
    with pytest.raises(SampleNotCachedError, match="c0"):
        opened.read("c0")

    assert more(cache, **data).summary is None
    more(cache, **data, signals=("projector_output",))
    assert not found.before.exists()  # kept until it is extended again


def test_the_teacher_runs_for_what_is_missing_alone(tmp_path: Path, tiny_llava: Path, monkeypatch):
    cache, data = tmp_path / "cache", {"data": str(write_data(tmp_path / "data", "aB")), "teacher": str(tiny_llava)}
    extract(settings(cache, **data, fidelity_samples=0, signals=("logits",)))
    run, asked = Build.run, []
    monkeypatch.setattr(
        Build,
        "run",
        lambda work, batch, *rest: asked.append((*batch.sample_ids, *work.codecs)) or run(work, batch, *rest),
    )

    def extended(**options) -> list[tuple[str, ...]]:
        asked.clear()
        options |= {"fidelity_samples": 0}
        extend(BuildConfig(cache=str(cache), **data, **options), given={*data, *options})
        return sorted(asked)

    assert extended() == []  # b's picture is still broken
    assert not list(tmp_path.glob("cache.*"))
    assert extended(signals=("hidden",)) == [("a0", "hidden"), ("a1", "hidden")]
    write_data(tmp_path / "data", "ab")
    assert [(one, *sorted(rest)) for one, *rest in extended()] == [
        ("b0", "hidden", "logits"),
        ("b1", "hidden", "logits"),
    ]
    assert extended(hidden_layers=(0, -1)) == [(name, "hidden") for name in ("a0", "a1", "b0", "b1")]
    assert extended(logits="default", signals=("logits", "hidden")) == []


def test_what_records_are_not_of_is_refused_by_name_and_nothing_changes(
    tmp_path: Path, tiny_llava: Path, deep_llava: Path
):
    cache, data = tmp_path / "cache", {"data": str(write_data(tmp_path / "data", "ab")), "teacher": str(tiny_llava)}
    extract(settings(cache, **data, signals=("logits",)))
    before = tree(tmp_path)
    picture = write_data(tmp_path / "pictures", "ab")
    Image.new("RGB", (50, 30)).save(picture.parent / "b.png")
    cases = {
        r"fingerprints.teacher: the cache has .*, this run has": {"teacher": str(deep_llava)},
        r"batch_size: the cache has 1, this run has 2": {"batch_size": 2},
        r"template.*the cache has .*short": {"template": "vicuna_v1"},
        r"extra.max_length": {"max_length": 100},
        r"1 of its samples are not in the data, first 'b1'": {"limit": 3},
        r"sample 'b0' has another picture .*expected [0-9a-f]{32}, got": {"data": str(picture)},
        r"sample 'a0' has another answer .*expected 2 tokens": {
            "data": str(write_data(tmp_path / "answers", "ab", answer="left"))
        },
        r"sample 'b0' has a record, and cannot be read any more": {"data": str(write_data(tmp_path / "broken", "aBc"))},
        r"answers of a cache stay .*leave answers out": {"answers": "generate"},
    }
    for message, options in cases.items():
        with pytest.raises(DistillError, match=message):
            more(cache, **{**data, "signals": ("hidden",), **options})
        found = tree(tmp_path)
        assert {name: found[name] for name in before} == before
        assert not list(tmp_path.glob("cache.*"))
    more(cache, **data, signals=("hidden",))
    assert open_cache(cache).signals == ("hidden", "logits")


@pytest.mark.slow
def test_parts_and_merged_caches_keep_their_samples_and_their_order(tmp_path: Path, tiny_llava: Path):
    data = {"data": str(write_data(tmp_path / "data", "abCd")), "teacher": str(tiny_llava)}
    extract(settings(tmp_path / "whole", **data, signals=("logits", "hidden")))
    extract(settings(tmp_path / "cache", **data, signals=("logits",)))
    pull_partial(tmp_path / "cache", tmp_path / "part", Selection(sample_ids=("a1", "d0"), top_k=8))
    pull_partial(tmp_path / "cache", tmp_path / "rest", Selection(shards=(1,), top_k=8))
    merge([tmp_path / "rest", tmp_path / "part"], tmp_path / "merged")
    whole = open_cache(tmp_path / "whole")
    for name in ("part", "merged"):
        before = open_cache(tmp_path / name)
        more(tmp_path / name, **data, signals=("hidden",))
        found = open_cache(tmp_path / name)
        assert list(found) == list(before)
        assert list(found.failed) == list(before.failed)
        assert found.plan.extra == before.plan.extra
        for sample_id in found:
            record = {**before[sample_id], "hidden": whole[sample_id]["hidden"]}
            assert {field: array.tobytes() for field, array in found[sample_id].items()} == {
                field: array.tobytes() for field, array in record.items()
            }
    elsewhere = {**data, "data": str(write_data(tmp_path / "less", "ab"))}
    with pytest.raises(CacheMismatchError, match=r"4 of its samples are not in the data, first 'd0'.*merged again"):
        more(tmp_path / "merged", **elsewhere, signals=("visual_columns",))


def test_answers_that_the_teacher_wrote_stay_and_new_samples_get_theirs(tmp_path: Path):
    data = {"data": "shapes:images=3", "teacher": str(builtin_teacher_directory()), "fidelity_samples": 0}
    options = {**data, "answers": "generate", "max_new_tokens": 12}
    extract(settings(tmp_path / "cache", **options, signals=("logits",), limit=1))
    wanted = {**data, "signals": ("hidden",), "limit": 2}
    extend(BuildConfig(cache=str(tmp_path / "cache"), **wanted), given=wanted)
    extract(settings(tmp_path / "whole", **options, signals=("logits", "hidden"), limit=2))
    assert "answers" in open_cache(tmp_path / "cache").signals
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_a_disk_that_cannot_exchange_folders_gets_words_and_loses_nothing(
    tmp_path: Path, tiny_llava: Path, monkeypatch
):
    cache, data = tmp_path / "cache", {"data": str(write_data(tmp_path / "data", "a")), "teacher": str(tiny_llava)}
    extract(settings(cache, **data, signals=("logits",)))
    before, exchange = tree(cache), extending.exchange_folders

    def refuse(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(one))

    monkeypatch.setattr(extending, "exchange_folders", refuse)
    with pytest.raises(ConfigError, match=r"cannot exchange two folders.*run: mv .*cache.*before.* && mv .*extending"):
        more(cache, **data, signals=("hidden",))
    assert tree(cache) == before
    monkeypatch.setattr(extending, "exchange_folders", exchange)
    with pytest.raises(CacheMismatchError, match=r"other options was begun there:(?s:.*)signals.hidden"):
        more(cache, **data, signals=("visual_columns",))
    (new,) = tmp_path.glob("cache.extending-*")
    shutil.copytree(cache, str(new).replace("extending", "before"))  # as of somebody who took a version back
    found = more(cache, **data, signals=("hidden",))
    assert found.summary is not None
    assert tree(cache) != before == tree(found.before)
    assert (found.summary.built, found.signals) == (0, ("hidden",))


def test_commands_on_one_cache_exclude_each_other_and_the_command_line_says_what_was_added(
    tmp_path: Path, tiny_llava: Path
):
    cache, data = tmp_path / "cache", {"data": str(write_data(tmp_path / "data", "aB")), "teacher": str(tiny_llava)}
    built = settings(cache, **data, signals=("logits",), logits="wide", license="mit", source="us")
    extract(built)
    command = [
        "extend",
        str(cache),
        "--data",
        data["data"],
        "--teacher",
        data["teacher"],
        "--set",
        "fidelity_samples=0",
    ]
    with hold_folder(cache, alone=False, busy="a build, a push"):
        refused = CliRunner().invoke(main, [*command, "--signals", "hidden"])
    assert (refused.exit_code, "another command builds, extends or copies this cache" in refused.output) == (1, True)
    with hold_folder(cache, busy="an extension"), pytest.raises(ConfigError, match="is being extended"):
        push(cache, tmp_path / "pushed")
    assert "failed failed again" in CliRunner().invoke(main, command).output
    write_data(tmp_path / "data", "ab")
    added = CliRunner().invoke(main, [*command, "--signals", "hidden"]).output
    assert "Added: 2 samples; signals hidden" in added
    assert f"rm -r {cache}.before-" in added
    with pytest.raises(
        CacheMismatchError, match=r"and more .*write signals: \[hidden, logits\] where logits stands"
    ) as less:
        extract(built)
    assert "overwrite" not in str(less.value)
    replayed = CliRunner().invoke(main, ["build", "--config", f"{cache}.build.yaml"])
    assert (replayed.exit_code, "is up to date" in replayed.output) == (0, True)
    refused = CliRunner().invoke(main, [*command, "--set", "cache=other"])
    assert (refused.exit_code, "cache=other are the same option" in refused.output) == (2, True)
    # The file of all options that a build leaves is one to extend with; words of other programs are options that are given.
    save_config(replace(built, batch_size=0, license="cc0-1.0"), tmp_path / "all.yaml")
    replayed = ["extend", str(cache), "--config", str(tmp_path / "all.yaml")]
    for dry in ((), ("--dry-run",)):
        said = CliRunner().invoke(main, [*replayed, *dry]).output
        assert ("nothing to do" if dry else "Nothing to add") in said
        assert "license='cc0-1.0' is not recorded, the cache states 'mit'" in said
    kept = load_config(BuildConfig, Path(f"{cache}.build.yaml"))
    assert (kept.logits, kept.license, kept.source) == ("wide", "mit", "us")
    refused = CliRunner().invoke(main, [*replayed, "--signals", "visual_columns", "--set", "precision=bfloat16"]).output
    assert "teacher.dtype: the cache has 'float32', this run has 'bfloat16'" in refused

    served = replace(read_plan(cache), teacher={**read_plan(cache).teacher, "served": True})
    write_plan(tmp_path / "served", served)
    with pytest.raises(CacheMismatchError, match=r"no teacher to run.*cachectl import-logprobs"):
        plan_of(tmp_path / "served")


def test_a_signals_options_are_those_that_its_codec_depends_on():
    """Or an option that is given would be ignored, or a record thrown away."""
    others = {
        "logits": "wide", "temperatures": (1.0,), "attention_dtype": "f4", "grid": 3, "map_preset": "blocks", "map_grid": 3,
        "frame_grid": 3,
        "hidden_layers": (0,), "hidden_dtype": "f4", "groups": 2, "max_length": 9, "shard_size": 9,
    }  # fmt: skip

    def codecs(config: BuildConfig) -> dict[str, dict]:
        grid = (config.grid, config.grid)
        sizes = Sizes(grid=grid, layers=config.hidden_layers, width=8, several=True, videos=True)
        return {name: codec.to_dict() for name, codec in build_codecs(config, sizes).items()}

    plain = BuildConfig(signals=SIGNALS, grid=2, hidden_layers=(1,))
    for option, value in others.items():
        changed = codecs(replace(plain, **{option: value}))
        depends = {name for name, codec in codecs(plain).items() if codec != changed[name]}
        listed = {name for name in SIGNALS if option in EXTRACTORS[name].options}
        assert depends == listed, option


_VALUES: dict[str, tuple[object, ...]] = {
    "logits": (*LOGIT_PRESETS, "fixed:2", "fixed:17", "fixed:255"), "temperatures": ((1.0,), (1.0, 2.0), (4.0, 1.0)),
    "grid": (0, 1, 3), "frame_grid": (0, 1, 4), "map_grid": (0, 2),
    "hidden_layers": ((0,), (-1,), (1, 0), (0, -1)), "groups": (1, 2),
    **{name: get_args(get_type_hints(BuildConfig)[name]) for name in ("attention_dtype", "map_preset", "hidden_dtype")},
}  # fmt: skip
_SHAPES = {option for extractor in EXTRACTORS.values() for option in extractor.options} - {"layers"}


@hypothesis.settings(max_examples=40)
@given(
    values=fixed_dictionaries({name: sampled_from(_VALUES[name]) for name in sorted(_SHAPES)}),
    square=booleans(),
    several=booleans(),
)
def test_options_are_told_from_the_codecs_that_they_gave_and_give_them_again(values: dict, square: bool, several: bool):
    """Or a signal would become another one, unasked, when an option beside is given, and the file of options would lie."""

    def codecs(config: BuildConfig) -> dict[str, dict]:
        grid = (config.grid, config.grid) if config.grid else (3, 3) if square else (2, 3)
        layers = tuple(layer % 3 for layer in config.hidden_layers)
        sizes = Sizes(grid=grid, layers=layers, width=32, several=several, videos=several)
        return {name: codec.to_dict() for name, codec in build_codecs(config, sizes).items()}

    built = codecs(BuildConfig(signals=SIGNALS, **values))
    plan, manifest = sealed(built, groups=values["groups"])
    plan = replace(plan, extra=plan.extra | ({"frames": {"fps": 1.0, "most": 8}} if several else {}))
    found = with_options_of(BuildConfig(), Path("cache"), plan, manifest, given=())
    assert codecs(found) == built
    assert unnamed_signals(found, plan) == []
    warmer = BuildConfig(temperatures=(1.0, 3.0))
    again = codecs(with_options_of(warmer, Path("cache"), plan, manifest, given=("temperatures",)))
    assert again["logits"] == built["logits"] | {"temperatures": [1.0, 3.0]}


LOGITS = {"logits": LogitCodec.from_preset("wide").to_dict()}


def sealed(signals: dict[str, dict], *, groups: int = 1) -> tuple[Plan, Manifest]:
    """Of a cache that holds these signals."""
    folder = Path(__file__).parents[1] / "common/fixtures/cache-v1-zarr"
    plan = read_plan(folder)
    teacher = {**plan.teacher, "layers": 2, "groups": [[layer] for layer in range(groups)]}
    fields = {name: codec_from_dict(codec).fields() for name, codec in signals.items()}
    data = {"name": "shapes"}
    return replace(plan, signals=signals, fields=fields, teacher=teacher, data=data), read_manifest(folder)


def test_settings_of_no_preset_are_not_replaced_by_another_ones():
    for other in ({"gap_steps": False, "balanced": False}, {"min_k": 3}, {"floor": 0.5, "max_k": 7, "min_k": 7}):
        plan, manifest = sealed({"logits": {**LOGITS["logits"], **other}})
        asked = BuildConfig(temperatures=(1.0, 4.0), logits="wide")
        with pytest.raises(ConfigError, match=r"temperatures would make logits anew.*give logits as well"):
            with_options_of(asked, Path("cache"), plan, manifest, given=("temperatures",))
        with_options_of(asked, Path("cache"), plan, manifest, given=("temperatures", "logits"))
        options = with_options_of(asked, Path("cache"), plan, manifest, given=())
        assert unnamed_signals(options, plan) == ["logits"]


def test_where_no_version_can_take_a_caches_place_is_refused_before_anything_is_opened(tmp_path: Path, monkeypatch):
    cache, kept = tmp_path / "cache", tmp_path / "cache.before-0123456789ab"
    for folder in (cache / "shards", kept):
        folder.mkdir(parents=True)
    for place, message in ((kept, rf"version of {cache}, kept"), (Path("/dev"), r"mount point.*copy the cache")):
        for dry in ([], ["--dry-run"]):
            said = CliRunner().invoke(main, ["extend", str(place), *dry]).output
            assert re.search(message, said), said
    for inside in (cache, cache / "shards"):
        monkeypatch.chdir(inside)
        with pytest.raises(ConfigError, match=r"inside of the cache.*cd out of it first"):
            more(Path(os.path.relpath(cache)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=r"plan\.json"):  # nothing of the place is in the way
        more(Path("cache"))


def test_data_that_are_not_given_are_those_that_the_cache_names_or_are_asked_for():
    plan, manifest = sealed(LOGITS)

    def data_of(name: str) -> str:
        return with_options_of(
            BuildConfig(), Path("cache"), replace(plan, data={"name": name}), manifest, given=()
        ).data

    for name in ("shapes", "shapes:images=30,seed=1", "easy-vqa"):
        assert [data_of(f"{name}{more}") for more in ("", "[:7]", "/test")] == [name] * 3
    for name in ("data.json", "shapes.json", "shapes:images=10000000,seed=0", "org/easy-vqa", "None"):
        with pytest.raises(ConfigError, match=rf"no data given \(--data\).*{re.escape(name)}"):
            data_of(name)


def test_the_next_command_names_the_data_that_were_taken(tmp_path: Path):
    extract(settings(tmp_path / "c", data="shapes:images=2", teacher="", limit=1, signals=("logits",)))
    said = CliRunner().invoke(main, ["extend", str(tmp_path / "c"), "--signals", "hidden"]).output
    assert "shapes:images=2" in said.splitlines()[-1], said


def test_a_limit_is_the_entrys_where_it_is_one_of_an_entry_and_the_caches_where_it_is_not(tmp_path: Path):
    plan, manifest = sealed(LOGITS)
    path, cache = tmp_path / "mixture.yaml", tmp_path / "one"

    def limit_of(was: int, entry: int | None, **given: int) -> int:
        lines = [
            f"- data: a.json\n  cache: one\n{f'  limit: {entry}' if entry else ''}",
            "- data: b.json\n  cache: two",
        ]
        path.write_text("\n".join(lines))
        options = BuildConfig(data=str(path), **given)
        of = replace(plan, data={"name": "a.json", "limit": was})
        found = with_options_of(options, cache, of, manifest, given=("data", *given))
        return entry_of_cache(found.data, found.base).limit_within(found.limit) or 0

    assert [limit_of(4, 4), limit_of(4, 6), limit_of(6, 4), limit_of(0, 4), limit_of(0, None)] == [4, 6, 4, 4, 0]
    assert [limit_of(4, None), limit_of(4, 6, limit=5), limit_of(4, None, limit=0)] == [4, 5, 0]


def test_a_look_writes_nothing_and_says_what_the_extension_then_does(
    tmp_path: Path, tiny_llava: Path, deep_llava: Path
):
    cache, data = tmp_path / "cache", str(write_data(tmp_path / "data", "aBc"))
    extract(settings(cache, data=data, teacher=str(tiny_llava), signals=("logits",)))
    write_data(tmp_path / "data", "abcd")

    def command(*words: str, teacher: Path = tiny_llava) -> dict:
        options = ["--data", data, "--teacher", str(teacher), "--set", "fidelity_samples=0", "--json", *words]
        found = CliRunner().invoke(main, ["extend", str(cache), *options])
        return json.loads(found.stdout) | {"exit": found.exit_code}

    before = tree(tmp_path)
    look = command("--dry-run", "--signals", "hidden")
    assert (look["exit"], look["starts"], look["problems"]) == (0, True, [])
    assert "samples: 4 have a record, 2 are new, 2 had failed and are tried again" in look["would"]
    assert "signals: hidden to add or to replace, beside logits" in look["would"]
    assert any(line.startswith("the teacher would run for 8 samples") for line in look["would"])
    look = command("--dry-run", "--signals", "hidden", "--set", "batch_size=2", teacher=deep_llava)
    assert (look["exit"], look["starts"], len(look["problems"])) == (1, False, 1)
    assert "batch_size: the cache has 1, this run has 2" in look["problems"][0]
    assert tree(tmp_path) == before

    done = command("--signals", "hidden")
    assert (done["exit"], done["added"]) == (0, {"signals": ["hidden"], "samples": 4})
    assert "holds all of that already: nothing to do" in " ".join(command("--dry-run")["would"])
