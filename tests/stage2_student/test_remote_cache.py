"""Training straight from an address: the same student as from the folder, and clear words when it goes away."""

import json
import os
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler

import pytest
from click.testing import CliRunner
from servers import Http
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import TransferError
from vlm_distill_cache.common.locations import whole_location
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes import mirror as mirror_module
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.mirror import local_folder
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.stage2_student import run as run_module
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.run import load_run_config, run
from vlm_distill_cache.stage2_student.train import train


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Server:
    """A folder behind HTTP that can be switched off for good."""

    def __init__(self, root):
        self._server = Http(("127.0.0.1", 0), partial(_Quiet, directory=root))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.runs = True

    def stop(self):
        if self.runs:
            self.runs = False
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


@pytest.fixture(scope="module")
def places(tiny_cache, tmp_path_factory):
    """The tiny cache in either store: files in folders, or an archive a shard."""
    place = tmp_path_factory.mktemp("zarr") / "cache"
    build_tiny_cache(place, store="zarr")
    return {"zarr": place, "webdataset": tiny_cache[0]}


@pytest.fixture
def server(request, places, tmp_path, monkeypatch):
    server = Server(places[getattr(request, "param", "webdataset")])
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    # One try: these tests switch the server off for good.
    monkeypatch.setattr(mirror_module, "open_remote", lambda url: open_remote(url, attempts=1, timeout=5))
    mirror_module._pinned.clear()
    yield server
    server.stop()


def make_config(cache, output, **changes):
    options = {
        "student": "mobilevlm-tiny",
        "data": DATA,
        "cache": str(cache),
        "output": str(output),
        "device": "cpu",
        "memory_gib": 0,
        "shuffle_window": 1,
        "phases": ("dpt", "dft"),
        "dpt": {"steps": 1, "batch_size": 4, "trainable": "projector", "losses": {"logits": 1.0}},
        "dft": {"steps": 4, "batch_size": 6, "losses": {"logits": 1.0, "answer_attention": 1.0}},
    }
    return config_from_dict(TrainConfig, options | changes)


def losses(result):
    return [{k: v for k, v in record.items() if not k.endswith(("_s", "wait"))} for record in result.log]


@pytest.fixture(scope="module")
def from_folder(places, tmp_path_factory):
    """The student of a projector, learnt from a folder, once."""

    @cache
    def trained(projector=None, store="webdataset"):
        return train(make_config(places[store], tmp_path_factory.mktemp("whole") / "run", projector=projector))

    return trained


@pytest.mark.parametrize(
    ("server", "store", "projector"), [("zarr", "zarr", None), ("webdataset", "webdataset", "taf")], indirect=["server"]
)
@pytest.mark.slow
def test_a_student_learns_from_an_address_what_it_learns_from_the_folder(
    server, places, store, tmp_path, monkeypatch, from_folder, projector
):
    monkeypatch.setenv("VLM_DISTILL_CACHE_BYTES", "1")  # each shard leaves as soon as it is closed
    expected = from_folder(projector, store)
    found = train(make_config(f"{server.url}?signature=secret", tmp_path / "b", projector=projector))
    assert losses(found) == losses(expected)
    assert "secret" not in (found.final / "distillation.json").read_text()
    provenance = json.loads((found.final / "distillation.json").read_text())
    assert provenance["caches"] == {server.url: open_cache(places[store]).manifest_hash}
    assert provenance["config"]["cache"] == server.url
    assert found.preparation.fingerprint == expected.preparation.fingerprint  # a moved cache is the same


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_in_words_and_it_goes_on_later(
    tiny_cache, server, tmp_path, monkeypatch, from_folder
):
    monkeypatch.setenv("VLM_DISTILL_CACHE_BYTES", "1")
    config = make_config(server.url, tmp_path / "run", checkpoint_every=1, num_workers=0)

    def stop(position, _student):
        if position.total_steps == 2:
            server.stop()

    with pytest.raises(TransferError, match=server.url):
        train(config, after_step=stop)
    again = Server(tiny_cache[0])
    try:
        resumed = train(make_config(again.url, tmp_path / "run", checkpoint_every=1))
    finally:
        again.stop()
    assert losses(resumed)[-1] == losses(from_folder())[-1]


@pytest.mark.parametrize("server", ["zarr"], indirect=True)
@pytest.mark.slow
def test_the_whole_run_works_from_an_address_and_then_offline(server, tmp_path):
    overrides = [
        "dpt.steps=1", "dft.steps=1", "sft.steps=1", "dpt.batch_size=4", "dft.batch_size=4",
        "evaluation.limit=2", "evaluation.letters=false", "evaluation.agreement_samples=4",
        "evaluation.overlays=1", "device=cpu",
    ]  # fmt: skip

    def config(signature="secret"):
        given = ["student=mobilevlm", f"data='{DATA}'", f"output={tmp_path / 'run'}", *overrides]
        return load_run_config(None, given, cache=f"{server.url}?X-Amz-Signature={signature}")

    first = run(config())
    assert server.url in first.report.read_text()
    kept = {path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"secret" in path.read_bytes()}
    assert not kept
    cache = open_cache(server.url)
    for sample_id in cache.sample_ids:
        cache.read(sample_id)
    server.stop()
    mirror_module._pinned.clear()  # as a new process
    assert not run(config("of_another_day_secret")).fresh  # the same address, signed anew
    final = tmp_path / "run" / "distilled" / "final"
    result = CliRunner().invoke(main, ["evaluate", str(final), "--limit", "2"])
    assert result.exit_code == 0, result.output
    assert "Not compared" not in result.output


def test_training_processes_get_the_whole_address_and_nobody_sees_it(tmp_path, monkeypatch):
    started, place = [], "https://host/cache?X-Amz-Signature=secret"
    monkeypatch.setattr(run_module, "run_command", lambda command, environment: started.append((command, environment)))
    run_module.train_arm(make_config(place, tmp_path), processes=2)
    [(command, environment)] = started
    assert "https://host/cache" in command
    assert "secret" not in " ".join(command) + (tmp_path / "config.yaml").read_text()
    assert whole_location("https://host/cache") == "https://host/cache"
    monkeypatch.setattr(os, "environ", environment)
    assert whole_location("https://host/cache") == place


def test_an_address_with_nothing_behind_it_is_one_line(server, tmp_path):
    server.stop()
    arguments = ["train", "--cache", server.url, "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert server.url in result.output
    missing = CliRunner().invoke(main, ["train", "--cache", str(tmp_path / "no"), "--output", "x"])
    assert missing.exit_code == 1
    assert "neither a folder nor an address" in missing.output


def test_a_student_trains_on_a_part_with_logits_alone(tiny_cache, server, tmp_path):
    part = Selection(shards=(0, 2), signals=("logits",))
    pull_partial(server.url, tmp_path / "part", part)
    dft = {"steps": 2, "batch_size": 4, "losses": {"logits": 1.0}}
    result = train(make_config(tmp_path / "part", tmp_path / "run", dft=dft))
    assert all(record["logits"] > 0 for record in result.log)
    used = set(result.preparation.phases[0].dataset.sample_ids)
    cache = open_cache(tiny_cache[0])
    assert used == {*cache.shard_sample_ids(0), *cache.shard_sample_ids(2)}
    assert local_folder(server.url) != tmp_path / "part"


def test_a_student_trains_on_merged_parts_as_on_the_whole(tiny_cache, tmp_path, from_folder):
    shards = range(len(open_cache(tiny_cache[0]).manifest.shards))
    for name, chosen in (("a", shards[:2]), ("b", shards[2:])):
        pull_partial(tiny_cache[0], tmp_path / name, Selection(shards=tuple(chosen)))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    merged = train(make_config(tmp_path / "merged", tmp_path / "run"))
    assert losses(merged) == losses(from_folder())


def test_fewer_tokens_a_row_still_train(tiny_cache, tmp_path):
    build_tiny_cache(tmp_path / "cache", exact=False, signals=("logits",))
    pull_partial(tmp_path / "cache", tmp_path / "part", Selection(signals=("logits",), top_k=4))
    codec = LogitCodec.from_dict(open_cache(tmp_path / "part").plan.signals["logits"])
    cache = open_cache(tmp_path / "part")
    decoded = as_tensors(codec.decode(cache.read(cache.sample_ids[0])))
    assert int(decoded.entry_mask.sum(-1).max()) == 4
    dft = {"steps": 1, "batch_size": 4, "losses": {"logits": 1.0}}
    result = train(make_config(tmp_path / "part", tmp_path / "run", dft=dft))
    assert all(record["logits"] > 0 for record in result.log)
