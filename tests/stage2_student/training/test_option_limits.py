"""Options that no run could use are refused by name, before anything is read."""

from pathlib import Path

import pytest

from vlm_distill_cache.common.config import load_config
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage2_student import run, train
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.training.output_folder import claim_output


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("dft.lr=.inf", "lr is inf"), ("clip=.inf", "clip is inf"), ("dft.losses.logits=.inf", "dft.losses.logits is inf"),
        ("dft.losses.temperature=.nan", "dft.losses.temperature is nan"), ("dft.weight_decay=.inf", "weight_decay is inf"),
        ("memory_gib=1.0e+300", "memory_gib is 1e\\+300"), ("memory_gib=.inf", "memory_gib is inf"),
        ("seed=99999999999999999999999", "seed is 9999"), ("dft.batch_size=100000000", "batch_size is 100000000"),
        ("dft.epochs=.inf", "epochs is inf"), ("dft.epochs=.nan", "epochs is nan"), ("dft.losses.lm=0", "at least one above 0"),
    ],
)  # fmt: skip
def test_numbers_that_no_run_could_use_are_refused_by_name(option: str, named: str):
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(TrainConfig, None, ["cache=c", "output=o", option], where="options")
    assert "losses.losses" not in str(caught.value)


def test_a_run_holds_the_folder_of_the_arm_that_it_trains(tmp_path: Path, monkeypatch):
    """Else `distill train` could write the same checkpoints."""
    arm = TrainConfig(cache="c", output=str(tmp_path / "run" / "distilled"))
    seen = []

    def train_nothing(config, *, caches, extends):
        with pytest.raises(ConfigError, match="another process"), claim_output(Path(config.output)):
            pass
        seen.append(config)

    monkeypatch.setattr(train, "train", train_nothing)
    run.train_arm(arm, processes=1)
    assert seen == [arm]
    with claim_output(Path(arm.output)):  # free again
        pass
