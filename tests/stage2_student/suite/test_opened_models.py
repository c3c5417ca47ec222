"""What a suite asks: a student of ours, a teacher, anybody's model; each reads as it does elsewhere."""

from pathlib import Path

import pytest
from tiny_families import save_tiny

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.signed import write_signed
from vlm_distill_cache.common.hub import HubFolder
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.shapes.dataset import SceneImage
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_provenance
from vlm_distill_cache.stage2_student.suite.ask import ask
from vlm_distill_cache.stage2_student.suite.opened import find_model, load_model
from vlm_distill_cache.stage2_student.suite.requests import Weigh
from vlm_distill_cache.stage2_student.trained_student import open_student

PICTURE = SceneImage(split="test", seed=1, index=0)
BUILT_IN = Path(__file__).parents[3] / "stage1_teacher" / "builtin"


# Of each way to lie in a folder one: two authors' own, the library's with a template that it names.
@pytest.mark.parametrize("name", ["llava_original", "compodistill", "builtin"])
def test_a_model_reads_as_it_does_as_a_teacher(name, tmp_path):
    folder = BUILT_IN if name == "builtin" else save_tiny(name, tmp_path / name)
    model, encoder = load_model(find_model(HubFolder(folder, name, ""), None), device="cpu")
    expected = build_encoder(Teacher(folder, device="cpu"), template="auto", max_length=4096)
    turn = Turn(question="is it red", answer="no")
    found, wanted = (one(Sample(sample_id="s", images=(PICTURE,), turns=(turn,))) for one in (encoder, expected))
    assert found.input_ids.tolist() == wanted.input_ids.tolist()
    assert found.labels.tolist() == wanted.labels.tolist()
    [[(nats, tokens)]] = ask(model, encoder, [Weigh(image=PICTURE, question=turn.question, answers=(turn.answer,))])
    assert nats < 0
    assert tokens == len(found.supervised_rows)


def test_a_student_reads_as_it_was_trained(finished):
    folder = finished.output / "distilled" / "final"
    found = find_model(HubFolder(folder, "final", ""), None)
    assert found.name == f"{finished.output.name} distilled"
    assert found.said["student"] == read_provenance(folder)["fingerprint"]
    model, encoder = load_model(found)
    student = open_student(folder)
    request = Weigh(image=PICTURE, question="", answers=("a red circle", "a blue square"))
    assert ask(model, encoder, [request]) == ask(student.model, student.encoder, [request])


def test_a_cache_says_how_another_model_reads_and_no_student_of_ours(tiny_cache, tiny_llava, tmp_path):
    plain = find_model(HubFolder(tiny_llava, "tiny", ""), None)
    read = find_model(HubFolder(tiny_llava, "tiny", ""), str(tiny_cache[0]))
    assert read.fingerprint != plain.fingerprint
    assert load_model(read)[1].template == tiny_cache[1].encoder.template != load_model(plain)[1].template
    (tmp_path / PROVENANCE).touch()
    with pytest.raises(ConfigError, match=r"--cache: .* leave the option out"):
        find_model(HubFolder(tmp_path, "mine", ""), str(tiny_cache[0]))


def test_an_export_for_other_programs_is_refused_before_anything_is_read(finished, tmp_path):
    provenance = read_provenance(finished.output / "distilled" / "final")
    export = {"layout": "gguf", "dtype": "float32", "quantise": None, "made_from": {"files": {}, "export": None}}
    write_signed(tmp_path / PROVENANCE, {**provenance, "files": {}, "export": export})
    with pytest.raises(ModelError, match="layout gguf, which other programs read"):
        find_model(HubFolder(tmp_path, "mine", ""), None)
