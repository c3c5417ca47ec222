"""A new signal goes through both stages from four places: a codec, an extractor, a loss term and its weight.

The toy: how strong a hidden state of each supervised row is (root mean square), which students of any width can
match.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.hidden import HiddenRequest, student_layers
from vlm_distill_cache.common.cache.schema import Field
from vlm_distill_cache.common.codecs import registry
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.text.collate import supervised_rows
from vlm_distill_cache.stage1_teacher import config as stage_one
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS, Extractor
from vlm_distill_cache.stage2_student.batches.signals import LossTerm, Seen, Sides, Value
from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.objective import Shares
from vlm_distill_cache.stage2_student.losses.terms import TERMS
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.preparation import prepare

NAME = "strength"


@dataclass(frozen=True, kw_only=True)
class StrengthCodec(Codec):
    """What is kept of it: float32 ``[A]``."""

    layer: int

    signal: ClassVar[str] = NAME

    def fields(self):
        return (Field(name=NAME, dtype="f4", axis="row"),)

    def encode(self, live):
        return {NAME: np.asarray(live, np.float32)}

    def decode(self, record):
        return record[NAME]

    def to_dict(self):
        return {"codec": NAME, "layer": self.layer}

    @classmethod
    def from_dict(cls, stored):
        return cls(layer=stored["layer"])


def strength(states: Tensor) -> Tensor:
    """``[..., D]`` to float32 ``[...]``."""
    return states.float().square().mean(dim=-1).sqrt()


class StrengthExtractor(Extractor):
    """How stage one gets it."""

    def codec(self, config, sizes):
        return StrengthCodec(layer=max(sizes.layers))

    def request(self, batch, at, codec, groups):
        return HiddenRequest(at(supervised_rows), (codec.layer,))

    def reduce(self, found, batch, codec, *, checked):
        counts = (supervised_rows(batch) >= 0).sum(dim=1).tolist()
        return tuple(strength(found[index, :count, 0]) for index, count in enumerate(counts))

    def encode(self, live, batch, codec):
        return [codec.encode(of_sample) for of_sample in live]

    def check(self, live):
        assert all(bool(of_sample.isfinite().all()) for of_sample in live)


@dataclass(frozen=True, kw_only=True)
class StrengthTerm(LossTerm):
    """What the student learns of it: the mean squared difference over supervised rows."""

    def fit(self, plan, losses, student, where: str) -> int:
        layers = (plan.signals[NAME]["layer"],)
        return student_layers(layers, teacher_depth=plan.teacher["layers"], student_depth=student.depth)[0]

    def target(self, sides: Sides) -> Tensor:
        return torch.as_tensor(sides.decode(self.reads[0]))

    def collate(self, targets: Sequence[Tensor], places: Sequence[int]) -> Tensor:
        return torch.cat(list(targets))

    def count(self, target: Tensor) -> int:
        return len(target)

    def requests(self, batch, target: Tensor, groups, fit: int) -> dict[str, HiddenRequest]:
        return {NAME: HiddenRequest(batch.rows, (fit,))}

    def value(self, seen: Seen, target: Tensor, fit: int) -> Value:
        states = seen.hidden[NAME][:, :, 0][(seen.batch.rows >= 0).to(target.device)]  # [A, D]
        return (strength(states) - target).square().mean(), {}


@dataclass(frozen=True, kw_only=True)
class ToyWeights(LossWeights):
    """The configuration's losses, with one line more."""

    strength: float = 0.0


@pytest.fixture
def toy(monkeypatch):
    """The four places."""
    monkeypatch.setitem(registry.CODECS, NAME, StrengthCodec)
    monkeypatch.setitem(TERMS, NAME, StrengthTerm(reads=(NAME,), at_images=False))
    monkeypatch.setattr(stage_one, "SIGNALS", (*stage_one.SIGNALS, NAME))
    monkeypatch.setitem(EXTRACTORS, NAME, StrengthExtractor())


@pytest.fixture
def cache(toy, tmp_path, build_cache):
    """A cache of logits, hidden states and the toy."""
    options = {"hidden_layers": (2,), "hidden_dtype": "f4", "fidelity_samples": 0}
    build_cache(tmp_path / "cache", signals=("logits", "hidden", NAME), **options)
    return open_cache(tmp_path / "cache")


def training(cache, output, **weights: Any) -> TrainConfig:
    phase = PhaseConfig(steps=2, batch_size=4, losses=ToyWeights(**weights))
    return TrainConfig(
        student="mobilevlm-tiny", data="shapes", cache=str(cache.path), output=str(output), phases=("dft",), dft=phase
    )


def test_stage_one_keeps_the_signal_and_the_cache_describes_it(cache):
    codec = codec_from_dict(cache.plan.signals[NAME])
    assert isinstance(codec, StrengthCodec)
    for sample_id in cache.sample_ids:
        record = cache.read(sample_id)
        states = torch.from_numpy(np.array(record["hidden"]))[:, 0]
        np.testing.assert_allclose(codec.decode(record), strength(states), rtol=1e-5)
    assert verify(cache.path, deep=True) == []


def test_stage_two_trains_with_its_loss_and_logs_it(cache, tmp_path):
    log = train(training(cache, tmp_path / "run", lm=1.0, logits=0.5, strength=2.0)).log
    assert len(log) == 2
    for record in log:
        assert record[NAME] > 0
        expected = record["lm"] + 0.5 * record["logits"] + 2.0 * record[NAME]
        assert record["total"] == pytest.approx(expected, rel=1e-5)


def test_its_loss_has_a_gradient_that_brings_it_down(cache, tmp_path):
    run = prepare(training(cache, tmp_path / "run", lm=0.0, strength=1.0))
    phase, student = run.phases[0], run.student
    batch = phase.dataset.batch(range(4))
    parameters = student.trainable_parameters("dft")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = phase.objective(student, None, batch, Shares()).total
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.9 * found[0]
