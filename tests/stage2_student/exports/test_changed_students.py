"""Students whose configuration says that they are changed: saved, opened here, and opened by the library alone."""

import json

import numpy as np
import pytest
import torch
from image_array import ImageArray
from test_student_elsewhere import STUDENTS
from transformers import AutoModelForImageTextToText

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.changed import CHANGES, Changed, change_model
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.data.text.generation import left_padded_inputs
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder


@pytest.mark.parametrize("name", ["mobilevlm_v2", "compodistill", "llava", "llava_original", "gemma3"])
@pytest.mark.slow(quick=("llava", "compodistill"))
def test_a_changed_student_is_saved_and_opens_anywhere(name, tmp_path):
    model, encoder, processor = STUDENTS[name](tmp_path / "source")
    inner = model if isinstance(model, VisionLanguageModel) else model.model
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    inputs = getattr(model, "generation_inputs", left_padded_inputs)(
        [build_prompt(encoder, ImageArray(picture, "p"), "What?")], 0, torch.device("cpu")
    )
    unchanged = model(**inputs).logits
    change_model(inner, family_of(inner.config.model_type).parts, visual_tokens={"keep": 0.5, "by": "attention"})
    folder = tmp_path / "student"
    folder.mkdir()
    save_student_folder(folder, model=model, encoder=encoder, image_processor=processor, source=None)
    expected = model(**inputs).logits
    assert not torch.equal(expected, unchanged)
    here = open_family_model(folder).model
    assert isinstance(here, Changed | VisionLanguageModel)
    elsewhere = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    # Our own classes are registered where this project is; `test_student_elsewhere` opens them where it is not.
    homes = [one.__module__.partition(".")[0] for one in type(elsewhere).__mro__]
    assert isinstance(elsewhere, VisionLanguageModel) or "transformers_modules" in homes
    for opened in (here, elsewhere.eval()):
        assert torch.equal(opened(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("stored", "message"),
    [([], "expected an object"), ({"parts": {}, "seventh": 1}, "names seventh, which this version")],
)
def test_a_configuration_of_another_version_is_refused(stored, message, tmp_path):
    model, encoder, processor = STUDENTS["llava"](tmp_path / "source")
    folder = tmp_path / "student"
    folder.mkdir()
    save_student_folder(folder, model=model, encoder=encoder, image_processor=processor, source=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, CHANGES: stored}))
    with pytest.raises(ModelError, match=message):
        open_family_model(folder)
