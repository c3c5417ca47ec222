"""A training that reads its pictures from disk learns what one learns that decodes them each time, to the last bit."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tower_runs
import train_runs
from accelerate.state import AcceleratorState

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.text import pixel_cache
from vlm_distill_cache.data.text.media import encode_media
from vlm_distill_cache.data.text.pixel_cache import FILE, PixelCache
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.run import arms
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.output_folder import PIXELS, drop_pixels, refuse_pixel_folder
from vlm_distill_cache.stage2_student.training.pixels import keep_pixels, reads_again


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Ten samples of which five have a picture, and a cache of them."""
    return tower_runs.mixed_cache(tmp_path_factory.mktemp("mixed") / "data")


def config_of(mixed, output, **changes):
    """Four epochs; nothing stays in memory."""
    dft = {"steps": 10, "batch_size": 4, "losses": {"logits": 1.0}}
    options = {"phases": ["dft"], "dft": dft, "memory_gib": 0.0, "checkpoint_every": 100, "report_to": ["none"]}
    return train_runs.make_config(mixed / "cache", output, data=str(mixed / "data.json"), **options | changes)


def trained(config, monkeypatch, during=lambda output: None):
    """The weights' bytes, the losses, and how many samples' pictures were encoded while it trained."""
    encoded = []

    def encode(of, media):
        encoded.append(media)
        return encode_media(of, media)

    def begin(*given):
        encoded.clear()  # what was looked at before
        keep_pixels(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pixel_cache, "encode_media", encode)
        patch.setattr("vlm_distill_cache.stage2_student.train.keep_pixels", begin)
        found = train(config, after_step=lambda *_: during(Path(config.output)))
    AcceleratorState._reset_state(reset_partial_state=True)
    weights = (found.final / "model.safetensors").read_bytes()
    return weights, train_runs.losses(found.log), sum(map(len, encoded))


def test_kept_pictures_change_nothing_but_the_time(mixed, tmp_path, monkeypatch):
    weights, losses, decoded = trained(config_of(mixed, tmp_path / "none", pixel_cache="none"), monkeypatch)
    assert decoded == 20  # five in each of four epochs
    sizes = []

    def look(output):
        sizes.append((output / PIXELS / FILE).stat().st_size)

    own = trained(config_of(mixed, tmp_path / "auto", num_workers=0), monkeypatch, look)
    assert own == (weights, losses, 5)
    assert sizes[0] > 0
    assert not (tmp_path / "auto" / PIXELS).exists()
    shared = {"pixel_cache": str(tmp_path / "shared")}
    assert trained(config_of(mixed, tmp_path / "first", **shared), monkeypatch)[:2] == (weights, losses)
    assert trained(config_of(mixed, tmp_path / "second", **shared), monkeypatch) == (weights, losses, 0)
    assert (tmp_path / "shared" / FILE).is_file()
    assert not (tmp_path / "second" / PIXELS).exists()


def phases_of(steps, *samples):
    """Phases of so many steps of 4 samples each, one for each number of samples, of a data set of its own."""
    return [
        SimpleNamespace(
            steps=steps, dataset=range(count), config=SimpleNamespace(data=str(n), images=None, cache="c", batch_size=4)
        )
        for n, count in enumerate(samples)
    ]


def opened_at(config, phases):
    """What a training opens, and with what limit."""
    found = []
    keep_pixels(config, phases, SimpleNamespace(open=lambda *given: found.append(given)))
    return found


def test_by_itself_it_keeps_pictures_where_they_are_read_again(tmp_path):
    config = TrainConfig(cache="c", output=str(tmp_path / "run"), pixel_cache_gib=0.5)
    assert not opened_at(config, phases_of(5, 20))
    assert opened_at(config, phases_of(6, 20)) == [(tmp_path / "run" / PIXELS, 2**29)]
    assert not reads_again(phases_of(5, 20, 20))
    assert reads_again(phases_of(8, 20, 30))
    two = phases_of(3, 20)
    assert reads_again([*two, *two])
    assert opened_at(replace(config, pixel_cache=str(tmp_path)), phases_of(1, 20)) == [(tmp_path, 2**29)]
    assert not opened_at(replace(config, pixel_cache="none"), phases_of(6, 20))


def test_it_takes_half_of_what_is_free_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_distill_cache.stage2_student.training.pixels.free_bytes", lambda place: 1000)
    config = TrainConfig(cache="c", output=str(tmp_path / "run"), pixel_cache=str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / FILE).write_bytes(bytes(600))  # is to be overwritten, or read
    assert opened_at(config, phases_of(1, 20)) == [(tmp_path / "kept", 800)]


def test_students_of_a_run_share_a_folder_that_goes_with_the_run(tmp_path):
    config = TrainConfig(cache="c", output=str(tmp_path))
    assert {arm.pixel_cache for arm in arms(config).values()} == {str(tmp_path / PIXELS)}
    PixelCache().open(tmp_path / PIXELS, 1)
    for arm in arms(config).values():
        drop_pixels(arm)
    assert (tmp_path / PIXELS).is_dir()
    drop_pixels(config)
    assert not (tmp_path / PIXELS).exists()
    for given in ("none", str(tmp_path / "elsewhere")):
        asked = replace(config, pixel_cache=given)
        assert {arm.pixel_cache for arm in arms(asked).values()} == {given}


def test_processes_that_train_together_share_a_folder_and_keep_every_picture_once(
    in_two_processes, mixed, tmp_path, monkeypatch
):
    """What they learn is held to one process that keeps nothing in `test_tower` and `test_sharded`."""
    file = in_two_processes["pixels"] / FILE
    before, end, keys = file.read_bytes(), 0, []
    while end < len(before):
        keys.append(before[end + 4 : end + 20])
        end += 36 + int.from_bytes(before[end + 20 : end + 28], "little")
    assert end == len(before)
    assert len(keys) == len(set(keys)) == 5
    _, _, decoded = trained(config_of(mixed, tmp_path, pixel_cache=str(file.parent)), monkeypatch)
    assert decoded == 0
    assert file.read_bytes() == before


def test_a_place_where_nothing_can_be_kept_is_refused_or_left_out(tmp_path):
    (tmp_path / "file").touch()
    given = TrainConfig(cache="c", output=str(tmp_path / "run"), pixel_cache=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"pixel_cache=.*/file: .*give another folder, or none"):
        keep_pixels(given, phases_of(9, 20), PixelCache())
    in_cache = replace(given, cache=str(tmp_path / "cache"), pixel_cache=str(tmp_path / "cache" / "pixels"))
    with pytest.raises(ConfigError, match="lie inside each other"):
        refuse_pixel_folder(in_cache)
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"pixel_cache=.*/file is a file; give another folder, or none"):
            refuse_pixel_folder(replace(given, pixel_cache=str(tmp_path / place)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / PIXELS).touch()
    keep_pixels(replace(given, pixel_cache="auto"), phases_of(9, 20), PixelCache())  # it trains without


@pytest.mark.parametrize(
    ("given", "found"), [("off", "none"), ("no", "none"), (False, "none"), (True, "auto"), ("a/b", "a/b")]
)
def test_words_for_nowhere(given, found):
    from vlm_distill_cache.common.config import load_options

    assert load_options(TrainConfig, {"cache": "c", "output": "o", "pixel_cache": given}, []).pixel_cache == found
    with pytest.raises(ConfigError, match="pixel_cache"):
        TrainConfig(cache="c", output="o", pixel_cache="https://x/y")
    with pytest.raises(ConfigError, match="pixel_cache_gib"):
        TrainConfig(cache="c", output="o", pixel_cache_gib=-1.0)
    assert os.fspath(Path("a/b")) == TrainConfig(cache="c", output="o", pixel_cache=Path("a/b")).pixel_cache
