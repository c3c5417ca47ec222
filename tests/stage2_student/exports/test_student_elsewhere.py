"""A saved student, and a Python that has the model library and not this project: the same prompts, logits and answers."""

import ast
import json
import os
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from tiny_families import TEXT, VISION, byte_tokenizer, make_lively, save_tiny

from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.llava import LlavaOfAnyDepth
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.common.models.processing import VisionLanguageProcessor
from vlm_distill_cache.common.models.published import default_image_processor, is_published
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import generate_answers, left_padded_inputs
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.exports.folder import code_of, save_student_folder
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.students.library import LibraryStudent

QUESTIONS = [
    {"shows": True, "text": " What is it? \n"},
    {"shows": True, "text": "Is the thing on the left larger than that on the right?"},
    {"shows": False, "text": "Who are you?"},
]
PROJECTOR = {"act": "gelu", "in": 32, "hidden": 48, "out": 40}
LIBRARIES = {"torch", "transformers", "numpy", "PIL"}


def family_student(name: str, source: Path):
    """A family's tiny checkpoint as a student with the family's own template."""
    opened = open_family_model(save_tiny(name, source))
    encoder = SampleEncoder(
        tokenizer=opened.tokenizer,
        image_encoder=opened.image_encoder,
        template=get_template(opened.family.template, opened.tokenizer),
        image_token_id=opened.family.image_token_id(opened.model.config),
        max_length=1000,
    )
    own = is_published(source)
    return (opened.model if own else LibraryStudent(opened.model, opened.family)), encoder, opened.processor


def built_student(config_class, model_class, source: Path, *, layout: str, **settings):
    """One of our own models as a run builds it; its image token lies behind all rows of its embedding."""
    tokenizer = byte_tokenizer(bos=config_class is MobileVLMConfig)
    text_class, vision_class = (config_class.sub_configs[name] for name in ("text_config", "vision_config"))
    torch.manual_seed(3)
    config = config_class(
        text_config=text_class(**TEXT, vocab_size=len(tokenizer) + 4),
        vision_config=vision_class(**{**VISION, "patch_size": 4, "num_hidden_layers": 3}),
        image_token_id=len(tokenizer) + 4,
        **settings,
    )
    model = model_class(config)
    make_lively(model)
    processor = default_image_processor(config)
    images = ImageEncoder(
        processor=processor, layout=layout, grid=model.image_grid, drops_first=bool(model.dropped_tokens)
    )
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=images,
        template=get_template("short"),
        image_token_id=config.image_token_id,
        max_length=1000,
    )
    return model.eval(), encoder, processor


def feeding_fewer(name: str, source: Path):
    """As `family_student`, of one of our own classes, with half its visual tokens."""
    model, encoder, processor = family_student(name, source)
    change_model(model, family_of(model.config.model_type).parts, visual_tokens={"keep": 0.5, "by": "attention"})
    return model, encoder, processor


mobilevlm = partial(built_student, MobileVLMConfig, MobileVLMForConditionalGeneration)
compodistill = partial(built_student, CompoDistillConfig, CompoDistillForConditionalGeneration)
STUDENTS = {
    "mobilevlm_v1_fewer": partial(feeding_fewer, "mobilevlm_v1"),
    "mobilevlm_v2": partial(family_student, "mobilevlm_v2"),
    "compodistill": partial(family_student, "compodistill"),
    "mobilevlm_mlp": partial(mobilevlm, layout="crop", projector_type="mlp"),
    "compodistill_taf": partial(
        compodistill, layout="square", projector_type="taf", teacher_projector=PROJECTOR, pool_teacher_tokens=True,
        vision_feature_select_strategy="full",
    ),
    "llava_original": partial(family_student, "llava_original"),
    "llava": partial(family_student, "llava"),
    "llava_next": partial(family_student, "llava_next"),
    "gemma3": partial(family_student, "gemma3"),
}  # fmt: skip
OURS = [name for name in STUDENTS if name.startswith(("mobilevlm", "compodistill", "llava_original"))]


def python_without_us(folder: Path) -> Path:
    """A Python with the libraries of this one, but none of the files that put this project on its path."""
    venv.create(folder, with_pip=False, symlinks=True)
    home = next(folder.glob("lib/python*/site-packages"))
    (home / "libraries.pth").write_text("\n".join(path for path in sys.path if Path(path).name == "site-packages"))
    return folder / "bin/python"


@torch.no_grad()
def expected_of(model, encoder, picture: Path):
    """What our own code makes of the questions."""
    made = getattr(model, "generation_inputs", left_padded_inputs)
    prompts, logits = [], []
    for question in QUESTIONS:
        image = ImageFile(picture) if question["shows"] else None
        prompts.append(build_prompt(encoder, image, question["text"]))
        logits.append(model(**made(prompts[-1:], 0, torch.device("cpu"))).logits[0, -1])
    answers = [generate_answers(model, encoder, [prompt], max_new_tokens=5, inputs=made).texts[0] for prompt in prompts]
    return (
        prompts,
        logits,
        answers,
        [loss_of(model, encoder, made(prompts[at : at + 1], 0, torch.device("cpu"))) for at in range(3)],
    )


def loss_of(model, encoder, inputs):
    """Mean surprise at each word of a prompt behind its first token, one by one."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == encoder.image_token_id, -100)
    said = model(**inputs, labels=labels).logits[0].double().log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    words = [at for at, one in enumerate(ids) if at and one != encoder.image_token_id]
    return -sum(float(said[at - 1, ids[at]]) for at in words) / len(words)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Students in folders of their own, and what our code makes of the questions."""
    home = tmp_path_factory.mktemp("students")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)  # with transparency
    PIL.Image.fromarray(noise).save(home / "picture.png")
    expected = {}
    for name, make in STUDENTS.items():
        model, encoder, processor = make(home / "sources" / name)
        source = home / "sources" / name
        (home / name).mkdir()
        save_student_folder(
            home / name,
            model=model,
            encoder=encoder,
            image_processor=processor,
            source=source if source.is_dir() else None,
        )
        expected[name] = expected_of(model, encoder, home / "picture.png")
    return home, expected


@pytest.fixture(scope="module")
def told(saved, tmp_path_factory):
    """What another Python makes of them."""
    home, _ = saved
    students = {name: name in OURS for name in STUDENTS}
    rgb = home / "rgb.png"  # the library itself does not show what lies under transparent pixels as white
    rgba = PIL.Image.open(home / "picture.png")
    PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB").save(rgb)
    cases = {"picture": str(home / "picture.png"), "rgb": str(rgb), "questions": QUESTIONS, "students": students}
    (home / "cases.json").write_text(json.dumps(cases))
    python = python_without_us(tmp_path_factory.mktemp("venv") / "other")
    quiet = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    quiet |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("elsewhere.py")
    ran = subprocess.run([python, program, home], cwd=home, env=quiet, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((home / "told.json").read_text())


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.slow
def test_a_saved_student_says_the_same_where_this_project_is_not(name, saved, told):
    prompts, logits, answers, losses = saved[1][name]
    found = told[name]
    assert found["ids"] == [prompt.input_ids.tolist() for prompt in prompts]
    sums = [
        float(prompt.image_inputs["pixel_values"].astype(np.float64).sum()) if prompt.tiles else 0.0
        for prompt in prompts
    ]
    assert found["sum"] == pytest.approx(sums)
    for ours, theirs in zip(logits, found["logits"], strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours, rtol=1e-4, atol=1e-4)
    assert found["answers"] == found["piped"] == answers
    assert found["batched"] == [*answers[:2], *(answers * 2 if name in OURS else ())]
    if name in OURS:
        assert found["loss"] == pytest.approx(losses, rel=1e-4)
        assert found["plain"] == answers[:2]


@pytest.mark.filterwarnings("ignore")  # what the libraries say of one another
@pytest.mark.parametrize(
    ("name", "kind"), [("mobilevlm_mlp", MobileVLMForConditionalGeneration), ("llava_original", LlavaOfAnyDepth)]
)
@pytest.mark.slow
def test_a_student_is_fine_tuned_by_the_librarys_trainer_through_adapters(name, kind, saved, tmp_path):
    peft = pytest.importorskip("peft")
    batch = left_padded_inputs(saved[1][name][0][:2], 0, torch.device("cpu"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = kind.from_pretrained(saved[0] / name)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*layers.*\.(?:q|v)_proj"))
    trainer = hf.Trainer(
        model=adapted,
        args=hf.TrainingArguments(
            tmp_path, max_steps=2, use_cpu=True, report_to=[], logging_steps=1, learning_rate=0.05, disable_tqdm=True,
            save_strategy="no", remove_unused_columns=False,
        ),
        train_dataset=[{}] * 8,
        data_collator=lambda _: batch,
    )  # fmt: skip
    trainer.train()
    first, second = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < second < first


def test_code_beside_the_weights_needs_the_libraries_and_itself_alone():
    names = ("mobilevlm", "compodistill", "llava", "processing")
    code = code_of(f"vlm_distill_cache.common.models.{name}" for name in names)
    assert {*names, "projectors", "vision_tower", "vision_language"} <= code.keys()
    for source in code.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module in code
            elif isinstance(node, ast.Import | ast.ImportFrom):
                imported = [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert {one.partition(".")[0] for one in imported} <= LIBRARIES | sys.stdlib_module_names


def test_we_never_run_the_code_beside_a_students_weights(saved, tmp_path):
    home = saved[0]
    for file in (home / "mobilevlm_mlp").iterdir():
        (tmp_path / file.name).write_bytes(b"raise SystemExit" if file.suffix == ".py" else file.read_bytes())
    student = load_student(tmp_path)
    assert type(student) is MobileVLMForConditionalGeneration
    assert type(hf.AutoModelForImageTextToText.from_pretrained(tmp_path)) is MobileVLMForConditionalGeneration
    assert type(hf.AutoProcessor.from_pretrained(tmp_path)) is VisionLanguageProcessor
