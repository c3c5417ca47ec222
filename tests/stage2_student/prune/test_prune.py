"""Students cut out of their teacher: the same at 100 %, the teacher without its weakest parts below that."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import save_tiny
from torch.nn import functional as F
from transformers import AutoProcessor

from vlm_distill_cache.common.errors import ConfigError, DataError, ModelError
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.families.table import submodule
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage2_student.prune.cut import (
    cut,
    fits,
    head_width,
    model_batches,
    plan_pruning,
    prune_directory,
    teacher_encoder,
)
from vlm_distill_cache.stage2_student.prune.importance import measure_importance
from vlm_distill_cache.stage2_student.prune.plan import Widths, choose_layer_parts, narrow_widths
from vlm_distill_cache.stage2_student.pruned_folder import Kept, PruningConfig
from vlm_distill_cache.stage2_student.students.prunable import prunable_layers

# Llama without and Qwen with biases, heads fixed by the width, heads with norms, several tiles, a prefix, ours.
FAMILIES = (
    "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", "paligemma", "gemma3", "mobilevlm_v2",
    "compodistill",
)  # fmt: skip
DATA = open_dataset("shapes:images=4,seed=5")
# One turn each: where visual tokens see the question, conversations cannot share a picture.
SAMPLES = [replace(DATA[index], turns=DATA[index].turns[:1]) for index in range(3)]


def open_tiny(name, folder):
    opened = open_family_model(save_tiny(name, folder / name))
    return opened, list(model_batches(opened, teacher_encoder(folder / name, opened, None), SAMPLES, "cpu"))


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow(quick=("compodistill",))
def test_keeping_everything_gives_the_teacher_itself_bit_for_bit(name, tmp_path):
    opened, batches = open_tiny(name, tmp_path)
    prune_directory(tmp_path / name, tmp_path / "student", kept=Kept(), samples=SAMPLES)
    student = open_family_model(tmp_path / "student")
    assert student.model.config.to_dict().keys() - {"auto_map"} == opened.model.config.to_dict().keys() - {"auto_map"}
    for batch in batches:
        assert torch.equal(logits(student.model, batch), logits(opened.model, batch))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow(quick=("paligemma",))
def test_the_student_is_the_teacher_whose_dropped_parts_are_zeroed(name, tmp_path):
    opened, batches = open_tiny(name, tmp_path)
    pruning = plan_pruning(opened, batches, kept=Kept(width=0.5), how=PruningConfig())
    have, want, parts = pruning.have, pruning.sizes[0], pruning.parts
    written = prune_directory(tmp_path / name, tmp_path / "student", kept=Kept(width=0.5), samples=SAMPLES)
    assert written.sizes == pruning.sizes == [want] * 3
    student = open_family_model(tmp_path / "student")
    assert student.family == opened.family
    width = head_width(opened)
    layers = prunable_layers(submodule(opened.model, opened.family.language_model))
    before = [logits(opened.model, batch) for batch in batches]
    with torch.no_grad():
        for layer, part in zip(layers, parts, strict=True):
            dropped = sorted(set(range(have.heads)) - set(part.heads.tolist()))
            for head in dropped:
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0.0
            channels = sorted(set(range(have.channels)) - set(part.channels.tolist()))
            layer.mlp.down_proj.weight[:, channels] = 0.0
    for batch, teacher in zip(batches, before, strict=True):
        expected = logits(opened.model, batch)
        torch.testing.assert_close(logits(student.model, batch), expected, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(expected, teacher, atol=1e-3)  # or nothing was dropped
    own = prunable_layers(submodule(student.model, student.family.language_model))
    assert own[0].mlp.down_proj.in_features == want.channels < have.channels
    assert own[0].self_attn.o_proj.in_features == want.heads * width
    small, large = (sum(p.numel() for p in m.parameters()) for m in (student.model, opened.model))
    assert small < large


def test_importance_is_the_mean_square_of_what_leaves_with_a_part(tmp_path):
    opened, batches = open_tiny("llava_onevision", tmp_path)
    language_model = submodule(opened.model, opened.family.language_model)
    layers = prunable_layers(language_model)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, inputs, key=key: seen.setdefault(key, []).append(inputs[0]))
        for index, layer in enumerate(layers)
        for key, module in (
            ((index, "heads"), layer.self_attn.o_proj),
            ((index, "channels"), layer.mlp.down_proj),
        )
    ]
    found = measure_importance(opened.model, language_model, batches, heads=4)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(layers):
        for kind, module, size in (
            ("heads", layer.self_attn.o_proj, head_width(opened)),
            ("channels", layer.mlp.down_proj, 1),
        ):
            rows = torch.cat([value[0] for value in seen[index, kind]])
            assert found.rows == len(rows)
            expected = []
            for part in range(rows.shape[1] // size):
                without = rows.clone()
                without[:, part * size : (part + 1) * size] = 0.0
                change = F.linear(rows, module.weight, module.bias) - F.linear(without, module.weight, module.bias)
                expected.append(change.square().sum(1).mean())
            torch.testing.assert_close(getattr(found, kind)[index], torch.stack(expected), rtol=1e-3, atol=1e-6)


def test_the_strongest_parts_stay_by_a_slow_choice():
    torch.manual_seed(0)
    have, want = (
        Widths(heads=12, key_value_heads=3, channels=24),
        Widths(heads=4, key_value_heads=2, channels=8),
    )
    heads, channels = torch.rand(12), torch.rand(24)
    parts = choose_layer_parts(heads, channels, have=have, want=want)
    groups = {group: sorted(range(4 * group, 4 * group + 4), key=lambda head: -heads[head])[:2] for group in range(3)}
    best = sorted(sorted(groups, key=lambda group: -sum(heads[head] for head in groups[group]))[:2])
    assert parts.key_value_heads.tolist() == best
    assert parts.heads.tolist() == [head for group in best for head in sorted(groups[group])]
    assert parts.channels.tolist() == sorted(channels.argsort(descending=True)[:8].tolist())


@given(st.integers(1, 8), st.integers(1, 8), st.integers(8, 400), st.floats(0.01, 1.0))
def test_sizes_fit_a_library_model_and_are_as_near_as_such_sizes_can_be(served, group, channels, keep):
    have = Widths(heads=served * group, key_value_heads=served, channels=channels)
    want = narrow_widths(have, keep)
    assert want.heads % want.key_value_heads == 0
    assert 1 <= want.key_value_heads <= served
    assert 1 <= want.group <= group
    assert 1 <= want.channels <= channels
    possible = {a * b for a in range(1, served + 1) for b in range(1, group + 1)}
    assert abs(want.heads - keep * have.heads) == min(abs(size - keep * have.heads) for size in possible)
    assert narrow_widths(have, 1.0) == have


@pytest.mark.parametrize(
    ("heads", "served", "keep", "expected"),
    [(32, 32, 0.5, (16, 16)), (16, 2, 0.5, (8, 2)), (9, 3, 0.5, (4, 2)), (8, 8, 0.01, (1, 1))],
)
def test_heads_leave_with_their_keys_or_inside_each_group(heads, served, keep, expected):
    want = narrow_widths(Widths(heads=heads, key_value_heads=served, channels=64), keep)
    assert (want.heads, want.key_value_heads) == expected


def test_heads_that_the_width_fixes_all_stay_and_it_is_said(tmp_path, caplog):
    opened, batches = open_tiny("qwen2_vl", tmp_path)
    pruning = plan_pruning(opened, batches, kept=Kept(width=0.5), how=PruningConfig())
    have, want = pruning.have, pruning.sizes[0]
    assert (want.heads, want.key_value_heads, want.channels) == (
        have.heads,
        have.key_value_heads,
        have.channels // 2,
    )
    assert "all 4 stay: only MLP channels are pruned" in caplog.text


def test_every_row_counts_once_packed_conversations_too(tmp_path):
    opened, _ = open_tiny("llava", tmp_path)
    encoder = teacher_encoder(tmp_path / "llava", opened, "vicuna_v1")
    packed = [DATA[0], SAMPLES[1]]
    assert collate([encoder(DATA[0])], 0).attention_mask.ndim == 4
    batches = model_batches(opened, encoder, packed, "cpu")
    importance = measure_importance(opened.model, opened.model.model.language_model, batches, heads=4)
    assert importance.rows == sum(len(encoder(sample)) for sample in packed)


def test_the_record_says_what_was_kept_and_the_folder_is_whole_or_absent(tmp_path, monkeypatch):
    save_tiny("llava", tmp_path / "llava")
    options = {"kept": Kept(width=0.5), "samples": SAMPLES, "described": {"data": "d"}}
    import vlm_distill_cache.stage2_student.prune.cut as module

    def fail(*_arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_signed", fail)
        with pytest.raises(OSError, match="disk full"):
            prune_directory(tmp_path / "llava", tmp_path / "student", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava"]
    prune_directory(tmp_path / "llava", tmp_path / "student", **options)
    told = json.loads((tmp_path / "student" / "pruning.json").read_text())
    assert (told["keep"], told["data"]) == (0.5, "d")
    assert [len(heads) for heads in told["heads"]] == [told["want"]["heads"]] * 3
    # what the library's processor and pipelines need beside the weights, as of a trained student
    processor = AutoProcessor.from_pretrained(tmp_path / "student", local_files_only=True)
    assert processor.chat_template is not None
    assert processor.patch_size is not None
    assert {"processor_config.json", "chat_template.jinja"} <= told["files"].keys()
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        prune_directory(tmp_path / "llava", tmp_path / "student", **options)


def test_what_cannot_be_pruned_is_refused_by_name(tmp_path):
    opened, batches = open_tiny("llava", tmp_path)
    language_model = submodule(opened.model, opened.family.language_model)
    with pytest.raises(DataError, match="no sample"):
        measure_importance(opened.model, language_model, [], heads=4)
    with pytest.raises(ConfigError, match="keep is 0"):
        narrow_widths(Widths(heads=4, key_value_heads=4, channels=8), 0.0)
    del language_model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match=r"layer 1: no linear mlp.up_proj.*cannot be pruned"):
        measure_importance(opened.model, language_model, batches, heads=4)
    language_model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="no list of decoder"):
        prunable_layers(language_model)


def test_cutting_leaves_the_teacher_as_it_was(tmp_path):
    opened, batches = open_tiny("llava", tmp_path)
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    pruning = plan_pruning(opened, batches, kept=Kept(width=0.5), how=PruningConfig())
    weights, config = cut(opened.model, opened.family, pruning)
    assert all(torch.equal(value, before[name]) for name, value in opened.model.state_dict().items())
    assert text_config(config).num_attention_heads == 2
    assert text_config(opened.model.config).num_attention_heads == 4
    assert weights.keys() == before.keys()
    assert fits(opened.model, opened.family.language_model, config, head_width(opened))
