"""An adapter that is exported alone gives, on the model that training started from, what the trained student gives."""

import json
import shutil

import lora_runs
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export_layouts import clip_llama, logits, save_final

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final
from vlm_distill_cache.stage2_student.scores.card import PLACE
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.students.library import LibraryStudent, open_library_student
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import export_student, open_student


def save_base(folder, kind):
    """A student's directory of the library's LLaVA or of our own class, which no training of ours wrote."""
    if kind == "llava":
        return lora_runs.save_teacher(folder, seed=3)
    save_final(folder, lambda: clip_llama(projector_type="ldpnetv2"))
    (folder / PROVENANCE).unlink()
    return folder


def halve(folder):
    """Store a model's weights as float16."""
    path = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "float16"}))


@pytest.mark.filterwarnings("ignore")  # what peft says of the library
@pytest.mark.parametrize("kind", ["llava", "own"])
@pytest.mark.slow(quick=("own",))
def test_base_and_adapter_are_the_student(kind, tiny_cache, tmp_path, monkeypatch):
    """Of two phases of adapters after one of the projector: peft knows the sum as one adapter."""
    peft = pytest.importorskip("peft")
    base = save_base(tmp_path / "base", kind)
    run = tmp_path / "run"
    final = train(lora_runs.make_config(tiny_cache[0], run, student=str(base))).final
    exported = tmp_path / "adapter"
    export_student(final, exported, layout="adapter")
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert (settings["r"], settings["lora_alpha"]) == (8, 16.0)
    student = open_student(final, device="cpu")
    model = load_student(base) if kind == "own" else open_library_student(base).model.model

    def of(core):
        return logits(core if kind == "own" else LibraryStudent(core, student.model.family), student.encoder)[0]

    expected, before = of(student.model if kind == "own" else student.model.model), of(model)
    found = of(peft.PeftModel.from_pretrained(model, exported).eval().base_model.model)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    assert (before - expected).abs().max() > 0.1
    assert read_final(exported)["export"]["layout"] == "adapter"
    with pytest.raises(ModelError, match="layout adapter, which other programs read"):
        open_student(exported)
    # The lines of its card, by the base's own place.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    PIL.Image.new("RGB", (40, 30), "red").save("picture.jpg")
    kept = shutil.copytree(base, tmp_path / "kept")
    halve(base)  # as published models are stored: without a precision it would be computed in that
    lines = (exported / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    lines = lines.replace("PATH_TO/base", str(base)).replace(PLACE, str(exported)).replace("print(", "said = (")
    exec(lines, told := {})
    asked = build_prompt(student.encoder, ImageFile(tmp_path / "picture.jpg"), "What is in this picture?")
    assert told["inputs"]["input_ids"][0].tolist() == asked.input_ids.tolist()
    assert told["model"].dtype == torch.float32
    assert isinstance(told["said"], str)

    shutil.copytree(kept, base, dirs_exist_ok=True)
    other = tmp_path / "other"
    (run / "checkpoints").rename(other)
    with pytest.raises(
        ModelError, match=r"its adapters are merged.*checkpoints of its training, which are not beside it"
    ):
        export_student(final, tmp_path / "no", layout="adapter")
    other.rename(run / "checkpoints")
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 8
    weights.write_bytes(content)
    with pytest.raises(
        ModelError, match=rf"is more than {base} with adapters.*1 other weights differ.*folder has changed"
    ):
        export_student(final, tmp_path / "no", layout="adapter")


@pytest.mark.slow
def test_a_student_that_is_more_than_adapters_is_refused(tiny_cache, finished, tmp_path):
    base = save_base(tmp_path / "base", "llava")
    last = {"steps": 1, "batch_size": 4, "trainable": "all"}
    config = lora_runs.make_config(tiny_cache[0], tmp_path / "run", student=str(base), phases=["dft", "sft"], sft=last)
    with pytest.raises(ModelError, match=r"no phase of its training had adapters|trained them as such"):
        export_student(train(config).final, tmp_path / "no", layout="adapter")
    with pytest.raises(ModelError, match=r"mobilevlm.* started from random weights"):
        export_student(finished.output / "distilled" / "final", tmp_path / "no", layout="adapter")
    assert not (tmp_path / "no").exists()
