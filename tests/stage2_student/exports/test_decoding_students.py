"""A student that decodes with fewer visual tokens is saved, and decodes alike here and by the library alone."""

import numpy as np
import PIL.Image
import pytest
import torch
from decoding_models import answers_and_logits
from test_student_elsewhere import STUDENTS
from transformers import AutoModelForImageTextToText

from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.tokens.decoding_tokens import decoding_counts
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.data.text.generation import left_padded_inputs
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder


@pytest.mark.parametrize("name", ["compodistill", "llava"])
def test_it_decodes_alike_where_it_is_opened(name, tmp_path):
    model, encoder, processor = STUDENTS[name](tmp_path / "source")
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    inner = model if isinstance(model, VisionLanguageModel) else model.model
    prompt = build_prompt(encoder, ImageFile(tmp_path / "noise.png"), "What?")
    inputs = left_padded_inputs([prompt], 0, torch.device("cpu"))
    full = answers_and_logits(inner, inputs)[1]
    change_model(
        inner,
        family_of(model.config.model_type).parts,
        decoding_tokens={"keep": 2, "by": "shift", "shift_threshold": 1.0, "layers": [1]},
    )
    expected = answers_and_logits(inner, inputs)[1]
    assert not torch.equal(expected, full)
    folder = tmp_path / "student"
    folder.mkdir()
    save_student_folder(folder, model=model, encoder=encoder, image_processor=processor, source=None)
    here = open_family_model(folder).model
    elsewhere = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    for opened in (here, elsewhere.eval(), here):
        assert torch.equal(answers_and_logits(opened, inputs)[1], expected)
    assert torch.stack(decoding_counts(here).events).any()
