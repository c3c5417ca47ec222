"""What a server said of a model's own prompts makes the cache that stage one makes of the model."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, write_lines
from family_caches import build
from tiny_families import save_tiny

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.inspect import describe_cache
from vlm_distill_cache.common.tools.verify import verify

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
    target.mkdir()
    for file in teacher.iterdir():
        if file.suffix not in (".safetensors", ".bin"):
            (target / file.name).write_bytes(file.read_bytes())
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
