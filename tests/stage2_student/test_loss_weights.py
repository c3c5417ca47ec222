"""Options of losses: refused with their name where they make no sense, and handed to the objective as they are."""

from dataclasses import replace

import pytest
from tiny_cache import build_tiny_cache
from train_runs import make_config

from vlm_distill_cache.common.config import config_from_dict, config_to_dict
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.terms import TERMS, choose_terms
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.preparation import prepare

DATA = "shapes:images=6,seed=5"
ALL = ("logits", "answer_attention", "text_attention", "visual_columns", "visual_map")


@pytest.fixture(scope="module")
def single_layers(tmp_path_factory):
    """A cache of every layer of a teacher of four, with every attention signal."""
    path = tmp_path_factory.mktemp("losses") / "cache"
    build_tiny_cache(path, data=DATA, signals=ALL, groups=4, layers="all")
    return path


def options(cache, output, losses):
    phase = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "losses": losses}
    return replace(make_config(cache, output, dft=phase, data=DATA), phases=("dft",))


def test_a_loss_reads_its_own_signals_and_no_others():
    losses = LossWeights(logits=1.0, visual_map=0.5, all_attention=2.0)
    assert losses.distilled == ("logits", "visual_map", "all_attention")
    read = [term.reads for term in choose_terms(losses.distilled).values()]
    assert read == [("logits",), ("visual_map",), ("visual_map", "text_attention")]
    assert choose_terms(LossWeights().active()) == {}


def test_every_term_has_a_weight_and_every_weight_a_term():
    assert {*LossWeights.names()} == {"lm", *TERMS}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("logit_kind", "kl"),
        ("answer_kind", "mse"),
        ("visual_map_kind", "mae"),
        ("attention_reduction", "max"),
        ("matching", "nearest"),
        ("attention_layers", "lower"),
    ],
)
def test_unknown_kinds_are_refused_by_the_options_name(option, value):
    with pytest.raises(ConfigError, match=rf"{option} is '{value}'; expected one of"):
        config_from_dict(LossWeights, {option: value})


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_finite_number_of_at_least_zero(value):
    with pytest.raises(ConfigError, match=r"all_attention is .* a finite weight of 0 or more"):
        LossWeights(all_attention=value)


def test_losses_go_through_json_unchanged():
    losses = LossWeights(logit_kind="tvd", matching="adaptive", attention_layers="late", visual_map=1.0)
    assert config_from_dict(LossWeights, config_to_dict(losses)) == losses


@pytest.mark.parametrize(
    "chosen",
    [
        {"logit_kind": "reverse_kl", "answer_kind": "kl_with_rest", "visual_map_kind": "kl"},
        {"logit_kind": "jsd", "matching": "simple", "attention_reduction": "sum", "visual_map_kind": "mse"},
        {"logit_kind": "tvd", "matching": "adaptive", "attention_layers": "all", "visual_map_kind": "cosine"},
        {"matching": "group", "attention_layers": "early"},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
@pytest.mark.slow(quick=1)
def test_every_kind_trains_from_one_cache_of_single_layers(single_layers, tmp_path, chosen):
    losses = {**dict.fromkeys(ALL, 1.0), "all_attention": 1.0, **chosen}
    config = options(single_layers, tmp_path / "run", losses)
    objective = prepare(config).phases[0].objective
    assert objective.losses == config.dft.losses
    log = train(config).log
    assert len(log) == 2
    assert all(log[-1][name] > 0 for name in (*ALL, "all_attention"))
    measured = {"sink_pairs", "sink_mass"} & log[-1].keys()
    assert bool(measured) == (config.dft.losses.visual_map_kind == "sink_filtered")
    assert all(0 < record[name] < 1 for record in log for name in measured)


def test_losses_that_a_cache_does_not_serve_are_refused_before_the_first_step(tiny_cache, tmp_path):
    refused = {
        "loss 'all_attention' needs a signal that .* does not hold: text_attention": {"all_attention": 1.0},
        "build a cache of single layers": {"visual_columns": 1.0, "matching": "simple"},
        "group matching of the late layers": {"visual_columns": 1.0, "attention_layers": "late"},
    }
    for message, losses in refused.items():
        config = replace(
            make_config(tiny_cache[0], tmp_path / "run", dft={"steps": 1, "losses": losses}), phases=("dft",)
        )
        with pytest.raises(CacheMismatchError, match=message):
            prepare(config)
