"""YAML and overrides into frozen dataclasses; errors name the field."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from vlm_distill_cache.common.config import config_from_dict, config_to_dict, load_config, save_config
from vlm_distill_cache.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    steps: int = 10
    optim: Optim = Optim(lr=5e-4)
    phases: tuple[Literal["dpt", "dft", "sft"], ...] = ("dft",)
    output: str = "out"
    limit: int | None = None
    compile: bool = False


def load(*overrides: str, path: Path | None = None) -> Config:
    return load_config(Config, path, ["name=x", *overrides])


def test_later_sources_win_and_unset_options_keep_their_default(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: file\nsteps: 5\noptim:\n  betas: [0.8, 0.9]\n")
    config = load_config(Config, path, ["steps=7"])
    # The nested default's own lr (5e-4) stays, not the class's (1e-3).
    assert config == Config(name="file", steps=7, optim=Optim(lr=5e-4, betas=(0.8, 0.9)))


def test_values_take_the_type_of_their_field():
    config = load("optim.lr=1e-4", "phases=[dpt, sft]", "output=a/b", "limit=3", "optim.betas=[1, 0.5]", "compile=true")
    assert config.optim == Optim(lr=1e-4, betas=(1.0, 0.5))  # YAML 1.1 reads 1e-4 as text
    assert config.phases == ("dpt", "sft")
    assert (config.output, config.limit, config.compile) == ("a/b", 3, True)
    assert load("limit=null").limit is None


def test_saved_configs_load_equal(tmp_path):
    config = load("optim.lr=2e-5", "optim.betas=[1e-9]", "limit=4", "output=é")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Config, tmp_path / "c.yaml") == config
    assert config_from_dict(Config, config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=1"], r"unknown option stepz; did you mean steps\?"),
        (["optim.lrr=1"], r"unknown option optim\.lrr; did you mean optim\.lr\?"),
        (["steps=1.5"], r"steps is 1.5 \(float\); expected a whole number"),
        (["steps=true"], "steps is True"),
        (["optim.lr=fast"], "optim.lr is 'fast'.*expected a number"),
        (["optim.lr=-1"], "optim.lr must be positive"),
        (["optim=3"], "optim.* is 3; expected a mapping"),
        (["optim.betas=[1, x]"], r"optim.betas\[1\] is 'x'.*expected a number"),
        (["phases=true"], "phases is True; expected a list"),
        (["phases=dtf"], r"phases\[0\] is 'dtf'; expected one of"),
        (["phases=[late]"], r"phases\[0\] is 'late'; expected one of 'dpt', 'dft', 'sft'"),
        (["compile=1"], "compile is 1.*expected true or false"),
        (["limit=many"], "limit is 'many'"),
        (["steps.a=1", "steps=1", "steps.a=1"], "steps is 1, which has no options"),
        (["steps"], "expected KEY=VALUE"),
        (["steps=[1"], "the value is not YAML"),
        (["optim={lr: 1, lr: 2}"], "the value is not YAML: line 1, column 9: 'lr' stands twice"),
    ],
)
def test_errors_name_the_option_and_what_was_expected(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_files_that_are_no_mapping_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load(path=path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load(path=path)
    path.write_text("steps: 5\noptim: {lr: 1}\nsteps: 7\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read as YAML: line 3, column 1: 'steps' stands twice"):
        load(path=path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path=tmp_path / "missing.yaml")
    path.write_text("")
    assert load(path=path).steps == 10
    with pytest.raises(ConfigError, match="option name is required"):
        load_config(Config, path)
    with pytest.raises(ConfigError, match="expected a config dataclass"):
        config_to_dict({"a": 1})


@dataclass(frozen=True, kw_only=True)
class _Named:
    name: str = ""
    path: str | None = None
    count: int = 0


@pytest.mark.parametrize(
    "text",
    [
        "held #2.json",
        "a=b, c: d.json",
        "@a.json",
        "[a.json",
        "{a}.json",
        "%s.json",
        "true",
        "123",
        "1e3",
        "- a",
        "a: b",
    ],
)
def test_a_text_that_is_set_is_taken_as_it_stands(text):
    assert load_config(_Named, None, [f"name={text}"]).name == text
    assert load_config(_Named, None, [f"path={text}"]).path == text


def test_quotes_nothing_and_other_kinds_are_still_yaml():
    assert load_config(_Named, None, ['name="a # b"']).name == "a # b"
    assert load_config(_Named, None, ["path=null"]).path is None
    assert load_config(_Named, None, ["count=3 # of them"]).count == 3
    with pytest.raises(ConfigError, match="the value is not YAML"):
        load_config(_Named, None, ["count=[1"])
