"""Layers that leave, layers of different sizes, and by what they are chosen: against slow and obvious references."""

import copy
import json
import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prune import FAMILIES, SAMPLES, logits, open_tiny
from tiny_families import save_tiny
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from vlm_distill_cache.common.attention.hidden import HiddenCapture, HiddenRequest, kept_layers, student_layers
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec
from vlm_distill_cache.common.errors import ConfigError, DataError, ModelError
from vlm_distill_cache.common.models.changed import CHANGES, change_model, changes_of
from vlm_distill_cache.common.models.layer_sizes import apply_layer_sizes
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.models import FamilyModel, open_family_model
from vlm_distill_cache.data.families.table import submodule
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.terms import TERMS
from vlm_distill_cache.stage2_student.prune.cut import (
    _features_of_layers,
    _kept_of_kept,
    _renumber_decoding,
    cut,
    head_width,
    plan_pruning,
    prune_directory,
    shallower_config,
)
from vlm_distill_cache.stage2_student.prune.importance import measure_importance
from vlm_distill_cache.stage2_student.prune.plan import (
    Importance,
    Widths,
    choose_layers,
    keep_over_layers,
    rank_over_layers,
)
from vlm_distill_cache.stage2_student.pruned_folder import Kept, PruningConfig, layers_kept
from vlm_distill_cache.stage2_student.students.prunable import prunable_layers, refuse_unprunable

TAYLOR = PruningConfig(importance="taylor", depth_importance="taylor", ratios="global", spare_first=0, spare_last=0)
ENDS = PruningConfig(spare_first=1, spare_last=0)


def zero(model, family, pruning):
    """Make of a teacher what it is without the parts that leave: their last projections give nothing."""
    layers = prunable_layers(submodule(model, family.language_model))
    width = layers[0].self_attn.o_proj.in_features // pruning.have.heads
    stays = dict(zip(pruning.layers, pruning.parts, strict=True))
    mergers = getattr(submodule(model, family.vision_tower), "deepstack_merger_list", ())
    with torch.no_grad():
        for index, layer in enumerate(layers):
            heads = stays[index].heads.tolist() if index in stays else ()
            channels = stays[index].channels.tolist() if index in stays else ()
            for head in set(range(pruning.have.heads)) - set(heads):
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0.0
            layer.mlp.down_proj.weight[:, sorted(set(range(pruning.have.channels)) - set(channels))] = 0.0
            if index not in stays and index < len(mergers):
                mergers[index].linear_fc2.weight.zero_()
                mergers[index].linear_fc2.bias.zero_()


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, TAYLOR) for name in (*FAMILIES, "llava_original", "paligemma2", "llava_next", "internvl")]
    + [(name, ENDS) for name in ("qwen2_vl", "gemma3")],
)
@pytest.mark.slow(quick=1)
def test_a_smaller_student_is_the_teacher_with_all_else_zeroed(name, how, tmp_path):
    opened, batches = open_tiny(name, tmp_path)
    kept = Kept(width=0.75, depth=0.67)
    pruning = prune_directory(tmp_path / name, tmp_path / "student", kept=kept, how=how, samples=SAMPLES)
    assert (len(pruning.layers), pruning.depth) == (2, 3)
    assert pruning.changed
    student = open_family_model(tmp_path / "student")
    assert student.family == opened.family
    before = logits(opened.model, batches[0])
    zero(opened.model, opened.family, pruning)
    for batch in batches:
        expected = logits(opened.model, batch)
        torch.testing.assert_close(logits(student.model, batch), expected, atol=5e-5, rtol=1e-4)
    assert not torch.allclose(logits(opened.model, batches[0]), before, atol=1e-3)  # or nothing was dropped
    own = prunable_layers(submodule(student.model, student.family.language_model))
    for layer, size in zip(own, pruning.sizes, strict=True):
        assert layer.self_attn.q_proj.out_features == size.heads * head_width(opened)
        assert layer.mlp.down_proj.in_features == size.channels
    if how is ENDS:
        assert pruning.sizes[0] == pruning.have
    named = json.loads((tmp_path / "student" / "config.json").read_text())["auto_map"]["AutoModel"]
    assert (named == "changed.LlavaOfAnyDepth") == (name == "llava_original")  # the library's looks up its image token


def test_a_student_without_some_layers_is_a_plain_one_of_its_library_and_its_states_are_the_teachers(tmp_path):
    opened, batches = open_tiny("llava", tmp_path)
    how = PruningConfig(spare_first=0, spare_last=1)
    pruning = prune_directory(tmp_path / "llava", tmp_path / "student", kept=Kept(depth=0.67), how=how, samples=SAMPLES)
    student = open_family_model(tmp_path / "student").model
    assert not changes_of(student.config)
    assert type(student) is type(opened.model)
    kept = kept_layers(student.model.language_model.config, teacher_depth=3)
    assert kept == pruning.layers
    assert kept_layers(student.model.language_model.config, teacher_depth=4) is None
    zero(opened.model, opened.family, pruning)
    found = []
    for model in (opened.model, student):
        capture = HiddenCapture(model.model.language_model)
        rows = torch.arange(batches[0].labels.shape[1])[None]
        with capture.record({"all": HiddenRequest(rows, tuple(range(capture.depth + 1)))}) as seen:
            logits(model, batches[0])
        found.append(seen["all"][0])
    meet = student_layers((0, 1, 2, 3), teacher_depth=3, student_depth=2, kept=kept)
    for layer, own in enumerate(meet):
        torch.testing.assert_close(found[1][:, own], found[0][:, layer], atol=1e-5, rtol=1e-4)


def test_states_before_the_final_norm_meet_none_behind_it():
    assert student_layers((0, 1, 2, 3, 4), teacher_depth=4, student_depth=2, kept=(0, 1)) == (0, 1, 1, 1, 2)
    assert student_layers((0, 1, 2, 3, 4), teacher_depth=4, student_depth=3, kept=(0, 2, 3)) == (0, 1, 1, 2, 3)
    codec = HiddenCodec(layers=(0, 1, 3, 4), width=8)
    cache: Any = SimpleNamespace(signals={"hidden": codec.to_dict()}, stated=lambda *_: 4)
    for kept, expected in (
        (None, (0, 1, 2, 3)),
        ((0, 2, 3), (0, 1, 2, 3)),
        ((0, 1, 3), (0, 1, 2, 3)),
        ((1, 2, 3), (0, 0, 2, 3)),
    ):
        student: Any = SimpleNamespace(width=8, depth=3, kept_layers=lambda _depth, kept=kept: kept)
        assert TERMS["hidden"].fit(cache, LossWeights(hidden=1.0), student, "cache") == expected
    for told in (
        [0],
        {"of": 4, "kept": [0, 1, 2], "before": {"of": 2}},
        {"of": 4, "kept": [0, 0, 1]},
        {"of": 2, "kept": [0, 1, 2]},
        {"of": 4, "kept": [0, 1]},
    ):
        with pytest.raises(ModelError, match="kept_layers is"):
            kept_layers(SimpleNamespace(num_hidden_layers=3, kept_layers=told), teacher_depth=4)


def test_taylor_importance_is_the_sum_over_a_parts_weights_of_weight_times_gradient(tmp_path):
    opened, batches = open_tiny("llava_onevision", tmp_path)  # with biases, and two query heads a key-value head
    model, heads, width = opened.model, 4, head_width(opened)
    language_model = submodule(model, opened.family.language_model)
    found = measure_importance(model, language_model, batches, heads=heads, width="taylor", depth="taylor")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    layers = prunable_layers(language_model)
    picked, targets = [], []
    for batch in batches:
        rows = batch.labels[0] != IGNORE_INDEX
        picked.append(model(**batch.inputs, use_cache=False).logits[0, rows])
        targets.append(batch.labels[0, rows])
    F.cross_entropy(torch.cat(picked), torch.cat(targets)).backward()
    for index, layer in enumerate(layers):
        product = {
            name: (value * value.grad).abs().detach() for name, value in layer.named_parameters() if "proj" in name
        }
        query, served = (
            [product[f"self_attn.{part}_proj.weight"].sum(1) + product[f"self_attn.{part}_proj.bias"] for part in kind]
            for kind in ("q", "kv")
        )
        total = 0.0
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            expected = query[0][own].sum() + product["self_attn.o_proj.weight"][:, own].sum()
            torch.testing.assert_close(found.heads[index, head], expected, rtol=1e-3, atol=1e-7)
            total += float(expected)
        for head in range(2):
            expected = sum(part[head * width : (head + 1) * width].sum() for part in served)
            torch.testing.assert_close(found.key_values[index, head], expected, rtol=1e-3, atol=1e-7)
            total += float(expected)
        for channel in range(64):
            expected = sum(product[f"mlp.{part}_proj.weight"][channel].sum() for part in ("gate", "up"))
            expected += product["mlp.down_proj.weight"][:, channel].sum()
            torch.testing.assert_close(found.channels[index, channel], expected, rtol=1e-3, atol=1e-7)
            total += float(expected)
        assert float(found.layers[index]) == pytest.approx(total, rel=1e-3)


def test_a_small_part_changes_the_loss_by_no_more_than_its_taylor_importance_when_it_leaves(tmp_path):
    opened, batches = open_tiny("llava", tmp_path)
    model = opened.model.double()
    batches = [batch._replace(inputs={k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()})
               for batch in batches]  # fmt: skip
    layer = prunable_layers(submodule(model, opened.family.language_model))[1]
    parts = [layer.mlp.down_proj.weight.data[:, channel] for channel in range(4)]
    parts += [layer.self_attn.o_proj.weight.data[:, 8 * head : 8 * head + 8] for head in range(4)]
    for part in parts:
        part.mul_(1e-4)

    @torch.no_grad()
    def loss():
        picked = [model(**b.inputs, use_cache=False).logits[b.labels != IGNORE_INDEX] for b in batches]
        return float(
            F.cross_entropy(torch.cat(picked), torch.cat([b.labels[b.labels != IGNORE_INDEX] for b in batches]))
        )

    language_model = submodule(model, opened.family.language_model)
    found = measure_importance(model, language_model, batches, heads=4, width="taylor")
    before = loss()
    for part, importance in zip(parts, [*found.channels[1, :4], *found.heads[1]], strict=True):
        own = part.clone()
        part.zero_()
        change = abs(loss() - before)
        part.copy_(own)
        assert 0 < change <= float(importance) * 1.01


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_influence_is_one_minus_the_cosine_of_what_enters_a_layer_and_the_next(name, tmp_path):
    opened, batches = open_tiny(name, tmp_path)
    language_model = submodule(opened.model, opened.family.language_model)
    found = measure_importance(opened.model, language_model, batches, heads=4, depth="influence")
    cosines = [[] for _ in language_model.layers]
    states = []
    for module in (*language_model.layers, language_model.norm):
        module.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
    for batch in batches:
        states.clear()
        logits(opened.model, batch)
        for index, (enters, leaves) in enumerate(pairwise(states)):
            for one, other in zip(enters[0], leaves[0], strict=True):
                cosines[index].append(float(one @ other / (one.norm() * other.norm())))
    assert found.layers.tolist() == pytest.approx([1 - sum(one) / len(one) for one in cosines], abs=1e-5)
    assert found.rows == len(cosines[0])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.floats(0.05, 1), st.integers(0, 3), st.integers(0, 3))
def test_the_most_influential_layers_stay_and_the_ends_that_are_spared(importance, keep, first, last):
    depth = len(importance)
    expected_count = max(1, math.floor(keep * depth + 0.5))
    kept, how = Kept(depth=keep), PruningConfig(spare_first=first, spare_last=last)
    if first + last > expected_count and expected_count < depth:
        with pytest.raises(ConfigError, match="fewer than the"):
            layers_kept(depth, kept, how)
        return
    count, first, last = layers_kept(depth, kept, how)
    ends = {*range(first), *range(depth - last, depth)} if count < depth else set(range(depth))
    between = sorted(set(range(depth)) - ends, key=lambda layer: (-importance[layer], layer))
    expected = sorted([*ends, *between[: expected_count - len(ends)]])
    assert choose_layers(torch.tensor(importance).float(), count, first=first, last=last) == expected


def test_one_layer_at_either_end_is_spared_of_depth_unless_told_and_none_of_width():
    found = [layers_kept(4, Kept(depth=depth), PruningConfig()) for depth in (0.2, 0.5, 0.75, 1.0)]
    assert found == [(1, 0, 0), (2, 1, 1), (3, 1, 1), (4, 0, 0)]
    assert layers_kept(4, Kept(width=0.5, depth=0.75), PruningConfig(spare_last=0)) == (3, 1, 0)


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.01, 1), st.randoms())
def test_over_all_layers_the_best_of_each_stay_and_then_the_best_of_all(layers, units, keep, random):
    scores = [[random.randint(0, 5) for _ in range(units)] for _ in range(layers)]
    best = {(layer, max(range(units), key=row.__getitem__)) for layer, row in enumerate(scores)}
    places = [(layer, unit) for layer in range(layers) for unit in range(units)]
    others = sorted(set(places) - best, key=lambda place: (-scores[place[0]][place[1]], place))
    count = max(layers, math.floor(keep * len(places) + 0.5))
    expected = best | set(others[: count - layers])
    kept = keep_over_layers(torch.tensor(scores).float(), keep)
    assert {place for place in places if kept[place]} == expected


def test_ranked_over_layers_groups_stay_whole_channels_come_in_eights_and_one_key_value_head_is_cut_inside():
    torch.manual_seed(0)
    have = Widths(heads=6, key_value_heads=3, channels=20)
    importance = Importance(
        heads=torch.rand(2, 6), key_values=torch.rand(2, 3), channels=torch.rand(2, 20) * torch.tensor([[1.0], [9.0]]),
        layers=torch.zeros(2), rows=1,
    )  # fmt: skip
    first, second = rank_over_layers(importance, [0, 1], have=have, keep=0.5)
    for part in (first, second):
        assert part.heads.tolist() == [2 * head + i for head in part.key_value_heads.tolist() for i in (0, 1)]
    assert len(first.key_value_heads) + len(second.key_value_heads) == 3
    assert (len(first.channels), len(second.channels)) == (8, 16)  # of 6 blocks 3; those of the second layer weigh more
    assert first.channels.tolist() == sorted(importance.channels[0].argsort(descending=True)[:8].tolist())
    wide = Importance(heads=torch.rand(2, 6), key_values=torch.rand(2, 3), channels=torch.rand(2, 1100), layers=torch.zeros(2),
                      rows=1)  # fmt: skip
    parts = rank_over_layers(wide, [0, 1], have=Widths(heads=6, key_value_heads=3, channels=1100), keep=0.5)
    assert all(len(part.channels) % 64 == 0 for part in parts)
    alone = Widths(heads=6, key_value_heads=1, channels=20)
    for part in rank_over_layers(importance, [0, 1], have=alone, keep=0.5):
        assert part.key_value_heads.tolist() == [0]
        assert 1 <= len(part.heads) < 6


@pytest.mark.slow
def test_layers_of_different_sizes_answer_anywhere_and_with_a_cache_of_keys_and_values(tmp_path):
    for name in ("smolvlm", "mobilevlm_v2"):
        _, batches = open_tiny(name, tmp_path)
        folder = tmp_path / f"{name}-student"
        pruning = prune_directory(tmp_path / name, folder, kept=Kept(width=0.7), how=TAYLOR, samples=SAMPLES)
        student = open_family_model(folder).model.eval()
        assert len({size.key_value_heads for size in pruning.sizes}) == 2  # one kind would prove nothing
        inputs = {k: v for k, v in batches[0].inputs.items() if k != "position_ids"}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        answers = [
            student.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=one) for one in (True, False)
        ]
        assert torch.equal(*answers)
        with pytest.raises(ModelError, match=r"of different sizes already.*give the model that it was made from"):
            prune_directory(folder, tmp_path / "again", kept=Kept(width=0.5), samples=SAMPLES)
        if name == "smolvlm":  # our own class is registered here
            elsewhere = AutoModelForImageTextToText.from_pretrained(
                folder, trust_remote_code=True, local_files_only=True
            )
            assert torch.equal(logits(elsewhere, batches[0]), logits(student, batches[0]))


def test_a_model_is_narrowed_to_its_first_rows_and_other_sizes_are_refused(tmp_path):
    opened, batches = open_tiny("llava_onevision", tmp_path)
    model, parts = opened.model, {"language_model": opened.family.language_model}
    whole = {"heads": 4, "key_value_heads": 2, "channels": 64}
    before = logits(model, batches[0])
    change_model(model, parts, layer_sizes=[whole] * 3)
    assert torch.equal(logits(model, batches[0]), before)
    first = model.model.language_model.layers[0]
    rows = first.self_attn.k_proj.weight[:8].clone()
    change_model(model, parts, layer_sizes=[{"heads": 2, "key_value_heads": 1, "channels": 8}, whole, whole])
    assert torch.equal(first.self_attn.k_proj.weight, rows)
    assert first.self_attn.num_key_value_groups == 2
    assert logits(model, batches[0]).isfinite().all()
    for stored, message in (
        ([whole], "expected a list with the sizes of 3 layers"),
        ([{**whole, "heads": 3}, whole, whole], "layer 0: heads is 3, the configuration gives its layers 2"),
        ([whole, {"heads": 4}, whole], "layer 1: expected whole numbers|layer 0: heads is 4"),
        ([{"heads": 2, "key_value_heads": 1, "channels": True}, whole, whole], "layer 0: expected whole numbers"),
    ):
        with pytest.raises(ModelError, match=message):
            change_model(model, parts, layer_sizes=stored)
    config = json.loads(json.dumps(model.config.to_dict()))
    assert CHANGES in config


def test_a_changed_student_that_is_cut_keeps_its_code_and_its_own_layers_of_decoding(tmp_path):
    opened, _ = open_tiny("llava", tmp_path)
    family = opened.family
    parts = {"language_model": family.language_model, "vision_tower": family.vision_tower}
    change_model(opened.model, parts, decoding_tokens={"keep": 2, "by": "fixed", "layers": [1, 2]})
    opened.model.save_pretrained(tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    named = {"AutoModel": "changed.LlavaForConditionalGeneration"}
    (tmp_path / "llava" / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    pruning = prune_directory(tmp_path / "llava", tmp_path / "student", kept=Kept(depth=0.67), samples=SAMPLES[:1])
    stored = json.loads((tmp_path / "student" / "config.json").read_text())
    assert pruning.layers == (0, 2)
    assert stored[CHANGES]["decoding_tokens"]["layers"] == [1]  # which was layer 2
    assert stored["auto_map"]["AutoModel"] == named["AutoModel"]
    assert (tmp_path / "student" / "changed.py").is_file()
    plain = open_family_model(save_tiny("llava", tmp_path / "plain")).model
    _renumber_decoding(plain.config, [0])
    assert not changes_of(plain.config)
    _renumber_decoding(opened.model.config, [0])
    assert changes_of(opened.model.config)["decoding_tokens"]["layers"] is None


def test_lists_of_layers_and_features_of_the_tower_are_cut_alike(tmp_path):
    opened, _ = open_tiny("gemma3", tmp_path)
    config = opened.model.config
    text = text_config(shallower_config(config, [0, 2]))
    assert (text.num_hidden_layers, text.layer_types) == (2, ["sliding_attention"] * 2)
    assert text.kept_layers == {"of": 3, "kept": [0, 2]}
    assert shallower_config(config, [0, 1, 2]).to_dict() == config.to_dict()
    again = shallower_config(shallower_config(shallower_config(config, [0, 2]), [0, 1]), [1])  # the second leaves all
    told = text_config(again).kept_layers
    assert told == {"of": 2, "kept": [1], "before": {"of": 3, "kept": [2]}}
    found = [kept_layers(text_config(again), teacher_depth=depth) for depth in (1, 2, 3)]
    assert found == [None, (1,), (2,)]
    twice = {"of": 4, "kept": [0, 1, 3], "before": {"of": 9, "kept": [0, 4, 8]}}
    assert _kept_of_kept(twice, [0, 2]) == {"of": 4, "kept": [0, 3], "before": {"of": 9, "kept": [0, 8]}}
    opened, _ = open_tiny("qwen2_5_vl", tmp_path)
    text_config(opened.model.config).max_window_layers = 2
    assert text_config(shallower_config(opened.model.config, [0, 2])).max_window_layers == 1
    opened, _ = open_tiny("qwen3_vl", tmp_path)
    vision = opened.model.config.vision_config
    vision.deepstack_visual_indexes = [4, 0, 2]  # features are added in the tower's order: places 1, 2, 0
    assert _features_of_layers(opened.model.config, [0, 2], "m.") == {"m.0.": "m.0.", "m.1.": "m.1.", "m.2.": None}
    assert vision.deepstack_visual_indexes == [4, 0]


def test_what_cannot_be_cut_so_is_refused_by_name(tmp_path):
    opened, batches = open_tiny("llava", tmp_path)
    packed = FamilyModel(*opened)._replace(
        model=SimpleNamespace(config=SimpleNamespace(quantization_config={"load_in_8bit": 1}))
    )
    with pytest.raises(ModelError, match=r"t: its weights are quantised.*give the model"):
        refuse_unprunable(Path("t"), packed)
    with pytest.raises(ConfigError, match="spare all 3 layers"):
        plan_pruning(opened, batches, kept=Kept(width=0.5), how=PruningConfig(spare_first=3))
    with pytest.raises(ConfigError, match=r"ratios is 'global'.*importance=taylor"):
        PruningConfig(ratios="global")
    with pytest.raises(ConfigError, match="spare_first is -1"):
        PruningConfig(spare_first=-1)
    silent = [batch._replace(labels=torch.full_like(batch.labels, IGNORE_INDEX)) for batch in batches]
    with pytest.raises(DataError, match="no sample with an answer"):
        plan_pruning(opened, silent, kept=Kept(width=0.5), how=TAYLOR)
    pruning = plan_pruning(opened, batches, kept=Kept(width=0.5), how=PruningConfig())
    layer = opened.model.model.language_model.layers[0]
    layer.mlp.down_proj.weight.data[0, 0] = math.inf
    for how in (PruningConfig(), TAYLOR):
        with pytest.raises(
            ModelError, match=r"importance of heads cannot be .* float32 .* not finite; look at its weights"
        ):
            plan_pruning(opened, batches, kept=Kept(width=0.5), how=how)
    layer.self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.sinks has the shape \[4\] behind the cut.*None"):
        cut(opened.model, opened.family, pruning)
    del layer.self_attn.sinks
    # Sizes of single layers: what no projection holds and each head has by itself would be the other heads'.
    sizes = [{"heads": heads, "key_value_heads": 2, "channels": 64} for heads in (4, 2, 4)]
    norms = torch.nn.ModuleList([torch.nn.LayerNorm(8) for _ in range(4)])
    parts = {"language_model": opened.family.language_model}
    refused = pytest.raises(
        ModelError, match=r"layer 1: self_attn\.q_norm\.\S*weight has values for each head by itself"
    )
    for norm, expected in ((torch.nn.RMSNorm(8), nullcontext()), (torch.nn.RMSNorm(32), refused), (norms, refused)):
        model = copy.deepcopy(opened.model)
        model.model.language_model.layers[1].self_attn.q_norm = norm
        with expected:
            apply_layer_sizes(model, parts, sizes)
