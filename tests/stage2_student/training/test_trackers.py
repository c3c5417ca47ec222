"""Trackers: each is told every step once, a resumed training goes on with its run, and none of them ends a training."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage2_student.config import TRACKERS
from vlm_distill_cache.stage2_student.training.log import LOG, TrainingLog
from vlm_distill_cache.stage2_student.training.trackers import KNOWN, refuse_missing

SERVICES = TRACKERS[1:]
SETTINGS = {"dft": {"lr": 0.5, "freeze": ["projector"]}, "seed": 3}
FLAT = {"dft.lr": 0.5, "dft.freeze": '["projector"]', "seed": 3}


class Service(types.ModuleType):
    """What accelerate's trackers call of wandb, trackio and mlflow, by their published interfaces."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a fake")
        self.runs, self.config_of, self.refuses = {}, {}, ""
        self.config = types.SimpleNamespace(update=lambda values, **_: self.config_of.update({self.current: values}))
        self.utils = types.SimpleNamespace(
            validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def take(self, values, step):
        if self.refuses:
            raise ConnectionError(self.refuses)
        self.runs[self.current].append((step, dict(values)))

    def init(self, *, project, resume, name, id=None, settings=None, **_):  # noqa: A002 - as wandb calls it
        self.settings = settings
        assert (project, resume) == ("vlm-distill-cache", "allow")
        self.current = id or name
        self.runs.setdefault(self.current, [])
        log = lambda values, step: self.take(values, step)  # noqa: E731
        return types.SimpleNamespace(id=self.current, name=name, log=log, finish=lambda: None)

    def search_experiments(self, **_):
        return [types.SimpleNamespace(experiment_id="1")]

    def start_run(self, *, run_id, **_):
        self.current = run_id or f"run{len(self.runs)}"
        assert run_id is None or run_id in self.runs
        self.runs.setdefault(self.current, [])
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.current))

    def log_params(self, values):
        self.config_of[self.current] = values

    def log_metrics(self, values, step):
        self.take(values, step)

    def end_run(self):
        pass


@pytest.fixture
def services(monkeypatch):
    """Services that are installed and take all."""
    made = {name: Service(name) for name in SERVICES}
    for name, service in made.items():
        monkeypatch.setitem(sys.modules, name, service)
    for variable in (
        "WANDB_PROJECT",
        "WANDB_INIT_TIMEOUT",
        "TRACKIO_PROJECT",
        "MLFLOW_RUN_ID",
        "MLFLOW_EXPERIMENT_NAME",
    ):
        monkeypatch.delenv(variable, raising=False)
    return made


def train_steps(output, first, last, names=TRACKERS):
    """Log steps as a training does that goes on behind ``first - 1``."""
    done = [("dpt", first - 1)] if first > 1 else []
    log = TrainingLog(output, Accelerator(cpu=True), done=done, flush_every=2, trackers=names, settings=SETTINGS)
    for step in range(first, last + 1):
        times = {"step_s": 0.5, "samples_per_s": 8.0, "data_wait": 0.0}
        log.add({"total": torch.tensor(1.0 / step)}, step=step, phase="dpt", **times)
    log.flush()
    log.draw("eval", {"likelihood": 0.25, "items": 4}, step=last)
    log.close()


def test_every_tracker_is_told_each_step_and_goes_on_with_its_run(services, tmp_path):
    train_steps(tmp_path, 1, 3)
    train_steps(tmp_path, 3, 5)  # killed behind the checkpoint of step 2
    expected = [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (3, pytest.approx(1 / 3)),
        (4, 0.25),
        (5, pytest.approx(0.2)),
    ]
    known = json.loads((tmp_path / KNOWN).read_text())
    for name, service in services.items():
        assert list(service.runs) == [known[name]]
        told = service.runs[known[name]]
        assert [(step, values["train/total"]) for step, values in told if "train/total" in values] == expected
        assert [(step, values) for step, values in told if "train/total" not in values] == [
            (3, {"eval/likelihood": 0.25}),
            (5, {"eval/likelihood": 0.25}),
        ]
        assert service.config_of == {known[name]: FLAT}
    assert services["wandb"].settings == {"init_timeout": 30.0}  # no network is told soon
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in curves.Scalars("train/total")]
    assert shown == [(step, pytest.approx(1 / step)) for step in range(1, 6)]  # what came again stands there once
    train_steps(tmp_path, 1, 1)  # begun again: another run
    assert {len(service.runs) for service in services.values()} == {2}


def test_a_service_that_fails_is_left_out_and_the_training_goes_on(services, tmp_path, caplog):
    services["wandb"].refuses = "the line is cut: token=secret"
    train_steps(tmp_path, 1, 4, ("wandb", "mlflow"))
    assert len((tmp_path / LOG).read_text().splitlines()) == 4
    assert len(next(iter(services["mlflow"].runs.values()))) == 5
    said = [record.message for record in caplog.records if "told no more" in record.message]
    assert len(said) == 1
    assert said[0].startswith("wandb fails")


def test_a_service_that_does_not_start_is_refused_before_the_first_step(services, tmp_path):
    said = f"{'this is why, ' * 40}and set `MLFLOW_X=1` to mend it."  # what helps stands at the end

    def refuse(**_):
        raise RuntimeError(said)

    services["mlflow"].search_experiments = refuse
    told = r"--log-with \(report_to\): mlflow does not start: this .*MLFLOW_X=1.* leave mlflow out \(--log-with none\); MLFLOW_"
    with pytest.raises(ConfigError, match=told):
        train_steps(tmp_path, 1, 1, ("mlflow",))
    train_steps(tmp_path, 1, 2, ("wandb",))
    services["wandb"].init = lambda **_: 1 / 0
    with pytest.raises(ConfigError, match=r"if its run is gone there: delete .*trackers\.json"):
        train_steps(tmp_path, 3, 3, ("wandb",))


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(services, monkeypatch, tmp_path):
    refuse_missing(TRACKERS)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for missing in (["trackio"], ["wandb", "trackio"]):
        monkeypatch.delitem(sys.modules, missing[0])
        (tmp_path / missing[0]).mkdir()  # a folder of that name is no package
        with pytest.raises(ConfigError, match=rf"--log-with \(report_to\).*`pip install {' '.join(missing)}`") as told:
            refuse_missing(TRACKERS)
        rest = ",".join(name for name in TRACKERS if name not in missing)
        assert f"(--log-with {rest})" in str(told.value)
        refuse_missing(rest.split(","))
