"""Published checkpoints that are damaged, incomplete or hostile: a clear error, and no code runs."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from published_factory import (
    COMPODISTILL_CONFIG,
    TOWER,
    compodistill_tensors,
    mobilevlm_tensors,
    write_compodistill,
    write_mobilevlm,
)
from safetensors.torch import save_file

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.convert import convert_published
from vlm_distill_cache.common.models.published import load_published
from vlm_distill_cache.common.models.weight_files import read_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing: model\.norm\.weight"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"1 unexpected: model\.extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(39, 32)}),
            r"1 of another shape: lm_head\.weight \[39, 32\] instead of \[40, 32\]",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".mlp." in name and "layers" in name],
            r"18 missing: model\.layers\.0\.mlp\.down_proj\.weight, .*, \.\.\.",
        ),
        # Only the two kinds of buffers are dropped, not whatever looks a little like them.
        (
            lambda t: t.update({"model.rotary_emb.inv_freq2": torch.ones(1)}),
            r"unexpected: model\.rotary_emb\.inv_freq2",
        ),
        (lambda t: t.update({"my_position_ids": torch.ones(1)}), "unexpected: my_position_ids"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_the_remedy(tmp_path, change, message):
    tensors = mobilevlm_tensors()
    change(tensors)
    with pytest.raises(ModelError, match=f"weights do not fit config.json .*{message}.*download"):
        load_published(write_mobilevlm(tmp_path, tensors))


def test_compodistill_keys_of_nobody_are_refused_under_their_own_name(tmp_path):
    tensors = compodistill_tensors() | {"connector.other.weight": torch.ones(1)}
    with pytest.raises(ModelError, match=r"unexpected: connector\.other\.weight"):
        load_published(write_compodistill(tmp_path, tensors))


def test_a_teacher_read_as_a_student_misses_its_post_connector(tmp_path):
    tensors = compodistill_tensors(bridged=False)
    with pytest.raises(ModelError, match=r"missing: model\.mm_projector\.post"):
        load_published(write_compodistill(tmp_path, tensors, post_connector_use=True, connector_hidden_size=32))


def test_a_training_checkpoint_with_adapters_says_how_to_merge_it(tmp_path):
    folder = write_compodistill(tmp_path, compodistill_tensors())
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapters of its own .*prepare_hf_model\.py"):
        load_published(folder)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("how", ["torch", "plain pickle", "inside a state dict"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, how):
    folder = write_mobilevlm(tmp_path / "m", mobilevlm_tensors())
    mark, path = tmp_path / "ran", folder / "pytorch_model.bin"
    if how == "torch":
        torch.save(Hostile(mark), path)
    elif how == "plain pickle":
        path.write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    else:
        torch.save(mobilevlm_tensors() | {"model.norm.weight": Hostile(mark)}, path)
    with pytest.raises(ModelError, match="refused, because it is damaged or holds more than tensors"):
        load_published(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected a mapping from names to tensors"),
        ({"state_dict": {"model.norm.weight": torch.ones(32)}}, "holds a dict under 'state_dict'"),
        ({3: torch.ones(1)}, "holds a Tensor under 3"),
        (torch.ones(3), "holds a Tensor, expected a mapping"),
    ],
)
def test_a_pickle_that_is_no_state_dict_says_what_it_holds(tmp_path, content, message):
    folder = write_mobilevlm(tmp_path, content)
    with pytest.raises(ModelError, match=message):
        load_published(folder)


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9])
@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_called_damaged(tmp_path, layout, kept):
    folder = write_mobilevlm(tmp_path, {})
    path = folder / "pytorch_model.bin"
    if layout == "safetensors":
        path.unlink()
        path = folder / "model.safetensors"
        save_file(mobilevlm_tensors(), path)
    else:
        torch.save(mobilevlm_tensors(), path, _use_new_zipfile_serialization=layout == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(ModelError, match=r"damaged.*download it again"):
        load_published(folder)


def test_a_zip_with_a_broken_member_is_called_damaged(tmp_path):
    folder = write_mobilevlm(tmp_path, {})
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02garbage")
        archive.writestr("archive/version", "3")
    with pytest.raises(ModelError, match=r"damaged.*download it again"):
        load_published(folder)


def test_weights_in_the_format_before_zip_archives_load_too(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path)["a"][...].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.bin"}}, "gone.bin: missing, but pytorch_model.bin.index.json names it"),
        (
            {"weight_map": {"a": "../secret.bin"}},
            "names '../secret.bin', expected the name of a file beside it",
        ),
        ({"weight_map": {"a": 3}}, "names 3, expected"),
        ({"weights": {}}, "cannot be read as an index"),
        ([], "cannot be read as an index"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(tmp_path, index, message):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        read_weights(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("one.bin", "two.bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"two\.bin: \['a'\] are in another shard too"):
        read_weights(tmp_path)


def test_a_folder_without_weights_says_what_is_expected(tmp_path):
    (write_mobilevlm(tmp_path, {}) / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no weights; expected model\.safetensors or pytorch_model\.bin"):
        load_published(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mm_projector_type": "mlp2x_gelu"},
            "mm_projector_type is 'mlp2x_gelu', expected one of ldpnet, ldpnetv2",
        ),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, expected False"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, the vision tower's width is 16"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_vision_select_layer": -9}, "got -9, the tower has 3 layers"),
        ({"hidden_size": 64}, "of another shape"),
    ],
)
def test_a_mobilevlm_configuration_that_nobody_published_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        load_published(write_mobilevlm(tmp_path, mobilevlm_tensors(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector_type": "resampler"}, "connector_type is 'resampler', expected 'mlp2x_gelu'"),
        ({"text_config": {"model_type": "llama"}}, "text_config is a 'llama', expected 'qwen2'"),
        ({"text_config": None}, "expected text_config and vision_config"),
        ({"vision_feature_layer": [-2, -5]}, "expected one layer"),
        ({"vision_config": {"model_type": "dinov2"}}, "its vision tower is a 'dinov2'"),
    ],
)
def test_a_compodistill_configuration_that_nobody_released_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        load_published(write_compodistill(tmp_path, compodistill_tensors(), **changes))


@pytest.mark.parametrize("name", ["num_attention_heads", "hidden_size"])
@pytest.mark.slow(quick=("hidden_size",))
def test_a_number_that_cannot_be_is_named_whoever_opens_the_folder(tmp_path, name):
    folders = [
        write_mobilevlm(tmp_path / "m", mobilevlm_tensors(), **{name: 0}),
        write_compodistill(
            tmp_path / "c", compodistill_tensors(), text_config={**COMPODISTILL_CONFIG["text_config"], name: 0}
        ),
    ]
    load_published(write_mobilevlm(tmp_path / "own", mobilevlm_tensors())).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["text_config"][name] = 0
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    for folder in (*folders, tmp_path / "saved"):
        for use in (load_published, lambda folder: convert_published(folder, tmp_path / "x")):
            with pytest.raises(
                ModelError, match=rf"{folder} cannot be loaded: .*{name} in config\.json is 0, expected"
            ):
                use(folder)


def test_a_configuration_cannot_name_code_to_fetch_or_run(tmp_path):
    hostile = {"_attn_implementation": "evil/kernels", "attn_implementation": "evil/kernels"}
    changes = {
        "text_config": COMPODISTILL_CONFIG["text_config"] | hostile,
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, **hostile},
    } | hostile
    model = load_published(write_compodistill(tmp_path / "c", compodistill_tensors(), **changes))
    assert "evil" not in str(model.config.to_dict()) + str(model.model.config._attn_implementation)
    other = load_published(write_mobilevlm(tmp_path / "m", mobilevlm_tensors(), **hostile))
    assert "evil" not in str(other.config.to_dict()) + str(other.model.config._attn_implementation)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path):
    folder = write_mobilevlm(tmp_path / "m", mobilevlm_tensors() | {"extra": torch.ones(1)})
    with pytest.raises(ModelError, match="unexpected: extra"):
        convert_published(folder, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
