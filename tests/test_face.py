"""`import vlm_distill_cache as vdc`: instant, and every name there."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import vlm_distill_cache as vdc
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.codecs.registry import codec_from_dict


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> TeacherCache:
    place = tmp_path_factory.mktemp("face") / "cache"
    options = {"teacher": str(tiny_llava), "template": "short", "shard_size": 2, "fidelity_samples": 0, "limit": 5}
    vdc.build(vdc.BuildConfig(cache=str(place), **options))
    return vdc.open_cache(str(place))


def test_importing_it_imports_no_library_and_takes_no_time():
    code = """
import sys, time
before, began = set(sys.modules), time.perf_counter()
import vlm_distill_cache
print(time.perf_counter() - began)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(ran[0]) < 2  # 0.02 s on an idle machine
    assert ran[1:] == ["vlm_distill_cache"]


def test_every_name_is_there_and_nothing_else():
    assert set(vdc.__all__) <= set(dir(vdc))
    assert all(callable(getattr(vdc, name)) for name in vdc.__all__)
    assert all(getattr(vdc, name).__doc__ for name in vdc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        vdc.nonsense  # noqa: B018


def test_editors_and_the_type_checker_see_the_names_that_there_are():
    tree = ast.parse(Path(vdc.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name: (n.module, alias.name) for n in block.body for alias in n.names}
    assert set(seen) == set(vdc.__all__)
    for name, (module, inner) in seen.items():
        assert getattr(import_module(module), inner) is getattr(vdc, name)


def test_every_error_of_the_project_is_offered():
    from vlm_distill_cache.common import errors

    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(vdc.__all__)


def test_a_cache_is_read_like_a_dictionary(cache):
    assert list(cache) == list(cache.sample_ids)
    assert len(cache) == len(list(cache)) == 5
    for sample_id, record in cache.items():
        assert sample_id in cache
        assert record.keys() == cache[sample_id].keys() == {field.name for field in cache.fields}
        assert all(np.array_equal(array, cache[sample_id][name]) for name, array in record.items())


def test_an_unknown_sample_is_a_key_error_in_words(cache):
    with pytest.raises(KeyError) as caught:
        cache["other"]
    with pytest.raises(KeyError):
        cache[3]
    assert isinstance(caught.value, vdc.CacheMismatchError | vdc.SampleNotCachedError)
    assert str(caught.value).endswith("use the data set and split the cache was built from")


def test_signals_are_decoded_by_the_codec_that_wrote_them(cache):
    record = cache[next(iter(cache))]
    for signal in cache.signals:
        assert cache.codec(signal) is cache.codec(signal)
        assert cache.codec(signal) == codec_from_dict(cache.plan.signals[signal])
    rows = len(record["labels"])
    assert np.asarray(cache.decode("logits", record).log_probs).shape[0] == rows
    assert np.asarray(cache.decode("answer_attention", record).cells).shape == (rows, 1, 36)
    with pytest.raises(vdc.CacheMismatchError, match=r"no signal 'hidden'; the cache holds answer_attention, logits"):
        cache.decode("hidden", record)
    with pytest.raises(vdc.CacheMismatchError, match=r"opened without codecs; `open_cache`"):
        TeacherCache(cache.path).codec("logits")


def test_places_may_be_paths(tmp_path):
    assert vdc.BuildConfig(cache=tmp_path, data=tmp_path / "data.json").cache == str(tmp_path)
    phase = vdc.PhaseConfig(images=tmp_path)
    config = vdc.TrainConfig(cache=tmp_path, output=tmp_path / "run", dft=phase)
    assert (config.cache, config.output, config.dft.images) == (str(tmp_path), str(tmp_path / "run"), str(tmp_path))


def test_a_student_is_not_trained_into_the_cache(cache):
    with pytest.raises(vdc.ConfigError, match="not the folder of one"):
        vdc.train(vdc.TrainConfig(student="mobilevlm-tiny", cache=cache.path, output=cache.path))
    assert vdc.verify(cache.path) == []


def test_an_address_is_not_verified_and_a_selection_is_no_text(tmp_path):
    with pytest.raises(vdc.ConfigError, match="pull the cache into a folder first"):
        vdc.verify("s3://bucket/cache")
    for wrong in ({"signals": "logits"}, {"shards": "0-1"}, {"shards": (-1,)}):
        with pytest.raises(vdc.ConfigError, match="expected"):
            vdc.Selection(**wrong)


@pytest.mark.parametrize("command", ["teacher_cache", "distill", "cachectl"])
def test_ctrl_c_during_the_imports_of_a_command_ends_it_without_a_traceback(command):
    code = (
        "import vlm_distill_cache.commands as commands\n"
        "def interrupted(name): raise KeyboardInterrupt\n"
        f"commands.import_module = interrupted\ncommands.{command}()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "stopped; run the same command again to continue\n")
