"""A tiny, real teacher cache for the tests of stage two: random LLaVA, drawn scenes, a second of work.

Written through `common` alone (stages do not import each other), sample by sample and without batching: a
slow, obvious version of stage one, whose live signals the tests can compare with.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_distill_cache.common.attention.boxes import overlap_matrix, pool_keys, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.layers import teacher_groups
from vlm_distill_cache.common.attention.tiles import grid_tile, tiles_to_array
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.live import RowAttention, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.files.atomic import write_json_atomic
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate, supervised_rows, text_rows, visual_keys
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.processors import module_fingerprint, tokenizer_fingerprint
from vlm_distill_cache.data.text.templates import get_template

DATA = "shapes:images=20,seed=5"
SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map")


@dataclass(frozen=True)
class TinyTeacher:
    """A live teacher whose exact signals a cache of it must give back."""

    model: LlavaForConditionalGeneration
    encoder: SampleEncoder
    capture: AttentionCapture
    groups: tuple[tuple[int, ...], ...]

    def signals(self, sample):
        """Dense logits [A, V], answer attention [A, G, N] and visual map [G, N, N] of one sample."""
        batch = collate([self.encoder(sample)], 0)
        keys, rows = visual_keys(batch), supervised_rows(batch)
        requests = {}
        if keys.shape[1]:
            requests = {
                "answer": AttentionRequest(rows, keys, self.groups),
                "visual": AttentionRequest(keys, keys, self.groups),
            }
        with torch.no_grad(), self.capture.record(requests) as maps:
            logits = self.model(**batch.model_inputs()).logits
        found = {name: maps[name][0] for name in requests}
        answer = found["answer"].transpose(0, 1) if found else torch.zeros(rows.shape[1], len(self.groups), 0)
        visual = found.get("visual", torch.zeros(len(self.groups), 0, 0))
        return logits[batch.labels != IGNORE_INDEX], answer, visual, batch

    def text_rows(self, sample):
        """Attention of all text rows behind the image on it, [X, G, N]; no rows without an image."""
        batch = collate([self.encoder(sample)], 0)
        keys, rows = visual_keys(batch), text_rows(batch)
        if not keys.shape[1]:
            return torch.zeros(0, len(self.groups), 0)
        request = {"text": AttentionRequest(rows, keys, self.groups)}
        with torch.no_grad(), self.capture.record(request) as maps:
            self.model(**batch.model_inputs())
        return maps["text"][0].transpose(0, 1)


def make_teacher(*, groups: int = 1, seed: int = 0, layers: str = "middle") -> TinyTeacher:
    """A random LLaVA-1.5 of 36 visual tokens."""
    tokenizer, processor = load_tokenizer(), load_image_processor()
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=72,
            patch_size=12,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
        ),
        image_token_index=image_token_id,
    )
    model = LlavaForConditionalGeneration(config).eval()
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder.from_processor(processor, (6, 6)),
        template=get_template("short"),
        image_token_id=image_token_id,
        max_length=512,
    )
    capture = AttentionCapture(model.model.language_model)
    return TinyTeacher(model, encoder, capture, teacher_groups(4, groups, layers))


def build_tiny_cache(
    path: Path,
    *,
    data: str = DATA,
    signals=SIGNALS,
    exact: bool = True,
    grid: int = 6,
    groups: int = 1,
    layers: str = "middle",
    shard_size: int = 6,
    store: str = "webdataset",
    failed=(),
    sealed: bool = True,
    dataset=None,
) -> TinyTeacher:
    """Write a cache; returns the teacher that made it."""
    teacher = make_teacher(groups=groups, layers=layers)
    dataset = open_dataset(data) if dataset is None else dataset
    codecs = {
        "logits": LogitCodec.from_preset("exact" if exact else "default"),
        "answer_attention": RowAttentionCodec(grid=(grid, grid), groups=groups, exact=exact),
        "text_attention": TextAttentionCodec(grid=(grid, grid), groups=groups, exact=exact),
        "visual_columns": VisualColumnsCodec(groups=groups, exact=exact),
        "visual_map": VisualMapCodec(groups=groups, preset="f4" if exact else "exact8"),
    }
    codecs = {name: codecs[name] for name in signals}
    template, geometry = teacher.encoder.template.to_dict(), teacher.encoder.image_encoder.to_dict()
    plan = Plan(
        store=store,
        sample_count=len(dataset),
        shard_size=shard_size,
        batch_size=1,
        signals={name: codec.to_dict() for name, codec in codecs.items()},
        fields={name: codec.fields() for name, codec in codecs.items()},
        fingerprints={
            "tokenizer": tokenizer_fingerprint(teacher.encoder.tokenizer),
            "vision_tower": module_fingerprint(teacher.model.model.vision_tower),
            "template": fingerprint(template),
            "data": dataset.fingerprint(),
        },
        template=template,
        teacher={
            "name": "tiny",
            "layers": 4,
            "hidden_size": 32,
            "image_token_id": teacher.encoder.image_token_id,
            "groups": [list(group) for group in teacher.groups],
            "layer_choice": layers,
        },
        data={"name": dataset.name, "split": "train", "limit": 0},
        geometry=geometry,
    )
    write_plan(path, plan)
    overlap = overlap_matrix(
        tile_boxes(teacher.encoder.image_encoder(_blank()).tiles), tile_boxes((grid_tile(grid, grid),))
    )
    for index in range(plan.shard_count):
        writer = open_writer(store, path, index, plan.all_fields)
        skipped = []
        for position in plan.shard_range(index):
            sample = dataset[position]
            if sample.sample_id in failed:
                skipped.append((sample.sample_id, "truncated image"))
                continue
            logits, answer, visual, batch = teacher.signals(sample)
            labels = batch.labels[batch.labels != IGNORE_INDEX]
            record = {
                "image_hash": np.frombuffer(batch.image_hashes[0], dtype="u1").reshape(1, 16).copy(),
                "labels": labels.numpy().astype("<u4"),
                "tiles": tiles_to_array(batch.tiles[0]),
            }
            if "logits" in codecs:
                record |= codecs["logits"].encode(select_entries(codecs["logits"], logits, labels))
            if "answer_attention" in codecs:
                cells = (
                    pool_keys(answer, overlap) if answer.shape[2] else answer.new_zeros(*answer.shape[:2], grid * grid)
                )
                record |= codecs["answer_attention"].encode(RowAttention.from_cells(cells))
            if "text_attention" in codecs:
                rows = teacher.text_rows(sample)
                cells = pool_keys(rows, overlap) if rows.shape[2] else rows.new_zeros(*rows.shape[:2], grid * grid)
                record |= codecs["text_attention"].encode(RowAttention.from_cells(cells))
            if "visual_columns" in codecs:
                columns = visual.mean(1) if visual.shape[1] else visual.new_zeros(len(teacher.groups), 0)
                record |= codecs["visual_columns"].encode(columns)
            if "visual_map" in codecs:
                record |= codecs["visual_map"].encode(visual)
            writer.append(sample.sample_id, record)
        finish_shard(writer, skipped)
    _export_parts(teacher, path)
    if sealed:
        seal(path)
    return teacher


def _blank():
    import PIL.Image

    return PIL.Image.new("RGB", (72, 72))


def _export_parts(teacher: TinyTeacher, path: Path) -> None:
    model = teacher.model.model
    save_file(
        {k: v.contiguous() for k, v in model.multi_modal_projector.state_dict().items()},
        path / "projector.safetensors",
    )
    write_json_atomic(
        path / "projector.json",
        {
            "act": "gelu",
            "bias": True,
            "in": 24,
            "hidden": 32,
            "out": 32,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    )
    save_file(
        {k: v.contiguous() for k, v in model.vision_tower.state_dict().items() if "position_ids" not in k},
        path / "vision_tower.safetensors",
    )
    config = model.vision_tower.config.to_dict()
    write_json_atomic(
        path / "vision_tower.json",
        {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "transformers_version")},
    )
    teacher.encoder.tokenizer.save_pretrained(path / "processor")
    teacher.encoder.image_encoder.processor.save_pretrained(path / "processor")
