"""What the documents of a cache may say: one schema each, whoever wrote them.

Every reader of a document checks it against its schema here, so that a value of another kind, or one that no teacher, data
set or machine can have, is refused where it is read and not where it is used. Keys that are not named are other people's:
they stay, and nothing here reads them. Sizes are compared with what is really there elsewhere: tensors in
``stage2_student.students.build``, counts in sidecars and manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_distill_cache.common.cache.schema import FIELD
from vlm_distill_cache.common.files.rules import (
    ANYTHING,
    FLAG,
    OBJECT,
    Rule,
    also,
    either,
    entries,
    items,
    maybe,
    number,
    one_of,
    record,
    text,
    whole,
)

MAX_SHARDS = 100_000  # whose numbers have five digits
MAX_SHARD_SAMPLES = 1_000_000
MAX_SAMPLES = MAX_SHARDS * MAX_SHARD_SAMPLES
MAX_FILE_BYTES = 1 << 40
MAX_TOKEN = (1 << 32) - 1  # labels are u4
MAX_PLAN_BYTES = 16 << 20
MAX_SETTINGS_BYTES = 1 << 20  # of projector.json, vision_tower.json, preprocessor_config.json
MAX_LAYERS = 512  # of a language model or a tower; the deepest published ones have 126
MAX_WIDTH = 1 << 18
MAX_SIDE = 1 << 14  # pixels of a tower's pictures
TEMPERATURES = (0.01, 1000)  # least and most at which distributions are compared; float32 overflows not far below
MAX_GRID = 256  # visual tokens of a tile's side

_WORDS = text(1 << 16)  # names, licences and sources, of merged caches joined
_NAME = text(1000)
_COMMIT = text(1000, pattern=r"(?!.*\.\.)[\w./+ -]*", of="a commit, branch or tag")
_COUNT = whole(0, MAX_FILE_BYTES)
_FLOATS = either(number(-1e6, 1e6), items(number(-1e6, 1e6), most=16))

_TEMPLATE_TEXT = text(1 << 16)
TEMPLATE = record(
    {},
    {
        "name": _NAME,
        **dict.fromkeys(("system", "before_question", "after_image", "before_answer", "blank"), _TEMPLATE_TEXT),
        "answer_end": maybe(_TEMPLATE_TEXT),
        "drops_question": FLAG,
        "bos_after_image": FLAG,
        "chat_template": text(1 << 18),
    },
    free=True,  # `PromptTemplate` says which belong together
)

_SCORE = record({"value": number(-1e9, 1e9), "low": number(-1e9, 1e9), "high": number(-1e9, 1e9), "items": _COUNT})
EVALUATION = record(
    {"scores": entries(_SCORE, most=1000)},
    {
        "items": entries(entries(items(number(-1e9, 1e9), most=1 << 20), most=1000), most=1000),
        "unreadable": record({}, {"items": _COUNT, "of": _COUNT, "reasons": items(_WORDS, most=1000)}, free=True),
    },
    free=True,
)


def _are_windows(groups: list[list[int]]) -> bool:
    """Whether layer groups are windows of one size, each one further, over distinct layers: as stage one makes them."""
    size = len(groups[0]) if groups else 0
    chosen = [group[0] for group in groups] + [layer for group in groups[-1:] for layer in group[1:]]
    return len({*chosen}) == len(chosen) and groups == [chosen[at : at + size] for at in range(len(groups))]


def _are_of_the_depth(teacher: dict[str, Any]) -> bool:
    depth, groups, choice = teacher.get("layers", MAX_LAYERS), teacher.get("groups", []), teacher.get("layer_choice")
    chosen = choice if isinstance(choice, list) else []
    return all(layer < depth for group in (*groups, chosen) for layer in group)


_LAYER = whole(0, MAX_LAYERS - 1)
_GROUPS = also(
    items(items(_LAYER, least=1, most=MAX_LAYERS), most=MAX_LAYERS),
    "windows of one size over distinct layers, each one further",
    _are_windows,
)
_DESCRIBED = {
    **dict.fromkeys(("name", "license", "cache_license", "source"), maybe(_WORDS)),
    "revision": maybe(_COMMIT),
}
_TEACHER = also(
    record(
        {},
        {
            **_DESCRIBED,
            **dict.fromkeys(("family", "dtype", "device_map", "quantisation"), _NAME),
            "layers": whole(1, MAX_LAYERS),
            "hidden_size": whole(1, MAX_WIDTH),
            "vocabulary": whole(1, MAX_TOKEN + 1),
            "image_token_id": whole(0, MAX_TOKEN),
            "groups": _GROUPS,
            "layer_choice": either(one_of("early", "middle", "late", "all"), items(_LAYER, least=1, most=MAX_LAYERS)),
            "evaluation": EVALUATION,
            "served": FLAG,
            "no_projector": _WORDS,
        },
        free=True,
    ),
    "no layer in `groups` or `layer_choice` that is not below `layers`",
    _are_of_the_depth,
)

_ONE_SOURCE = {
    **_DESCRIBED,
    # Null in caches merged of plans without them.
    **dict.fromkeys(("split", "repository", "config", "file"), maybe(_NAME)),
    **dict.fromkeys(("limit", "samples"), maybe(whole(0, MAX_SAMPLES))),
    "fingerprint": maybe(_NAME),
}
_MIXTURE = {"mixture": items(record({}, _ONE_SOURCE, free=True), most=100_000)}
_PART = record({}, {**_ONE_SOURCE, **_MIXTURE}, free=True)
_DATA = record({}, {**_ONE_SOURCE, **_MIXTURE, "parts": items(_PART, least=1, most=100_000)}, free=True)

_GRID = items(whole(1, MAX_GRID), least=2, most=2)
_PIXELS = maybe(number(0, 1 << 40))
_SIZE = maybe(entries(_PIXELS, most=8))
_SIZES = ("size", "crop_size", "max_image_size", "pad_size")
_PROCESSOR_SETTINGS = {
    **dict.fromkeys(_SIZES, either(_SIZE, whole(1, 1 << 40), items(whole(1, 1 << 40), most=2))),
    **dict.fromkeys(("image_mean", "image_std"), maybe(_FLOATS)),
    "rescale_factor": maybe(number(0, 1e6)),
    "resample": maybe(whole(0, 5)),
    "image_seq_length": maybe(whole(0, 1 << 13)),  # PaliGemma's: so often a word is written for a picture
    **dict.fromkeys(
        ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"), maybe(FLAG)
    ),
    **dict.fromkeys(("image_processor_type", "feature_extractor_type"), maybe(_NAME)),
    **dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size"), maybe(either(whole(1, MAX_SIDE), OBJECT))),
    **dict.fromkeys(("min_patches", "max_patches"), maybe(whole(0, 1 << 16))),
    "image_grid_pinpoints": maybe(items(items(number(1, 1 << 20), least=2, most=2), most=1000)),
}
IMAGE_PROCESSOR = record({}, _PROCESSOR_SETTINGS, free=True)
PROCESSOR = record({}, {"image_processor": IMAGE_PROCESSOR}, free=True)
GEOMETRY = record(
    {},
    {
        **dict.fromkeys(("kind", "class", "layout", "image_token", "before", "after"), _NAME),
        "marker": maybe(_NAME),
        "grid": _GRID,
        "patch_size": maybe(whole(1, MAX_SIDE)),
        "most_tiles": maybe(whole(1, MAX_SIDE)),
        "drops_first": FLAG,
        "crops": FLAG,
        "processor": maybe(record({}, {**_PROCESSOR_SETTINGS, **dict.fromkeys(_SIZES, _SIZE)}, free=True)),
    },
    free=True,
)

_EXTRA = record(
    {},
    {
        "max_length": whole(0, 1 << 24),
        "long_samples": one_of("refuse", "truncate"),
        "threads": whole(0, 1 << 16),
        "tensor_parallel": whole(2, 256),
        "output_projection": one_of("float32"),
        "frames": record({"fps": number(1e-3, 1e3), "most": whole(1, 1 << 16)}, free=True),
        "order": OBJECT,
        "derived": record(
            {},
            {"kind": _NAME, "sources": items(_NAME, most=100_000), "of_samples": _COUNT, "selection": OBJECT},
            free=True,
        ),
    },
    free=True,
)

# Settings that are read without their codec; `codecs.registry` checks all of those that it knows.
_CODEC = record(
    {},
    {
        "preset": _NAME,
        "groups": whole(0, MAX_LAYERS),
        "grid": either(whole(0, MAX_GRID), items(whole(0, MAX_GRID), least=2, most=2)),
        "several": FLAG,
        "frame_grid": maybe(items(whole(1, MAX_GRID), least=2, most=2)),
        "temperatures": items(number(*TEMPERATURES), most=100),
    },
    free=True,
)

_PLAN = record(
    {
        "format_version": whole(1, 1 << 16),
        "store": _NAME,
        "sample_count": whole(1, MAX_SAMPLES),
        "shard_size": whole(1, MAX_SHARD_SAMPLES),
        "batch_size": whole(1, 1 << 20),
        "signals": entries(_CODEC, most=100),
        "fields": entries(items(FIELD, most=100), most=100),
        "fingerprints": entries(text(200), most=100),
        "template": TEMPLATE,
        "teacher": _TEACHER,
        "data": _DATA,
        "geometry": GEOMETRY,
        "extra": _EXTRA,
    }
)


def _plan_parts(plan: dict[str, Any]) -> Iterator[tuple[str, Any, Rule]]:
    """The parts of a plan, and those of its signals' settings that its teacher decides."""
    yield from _PLAN.parts(plan)
    teacher = plan["teacher"]
    depth, width, groups = (teacher.get(name) for name in ("layers", "hidden_size", "groups"))
    for signal, settings in plan["signals"].items():
        if settings.get("codec") in ("hidden", "visual_hidden", "projector_output"):
            if depth is not None and "layers" in settings:
                yield f".signals.{signal}.layers", settings["layers"], items(whole(0, depth), least=1, most=depth + 1)
            if width is not None and "width" in settings:
                yield f".signals.{signal}.width", settings["width"], whole(width, width)
        count = settings.get("groups")
        if groups is not None and type(count) is int:
            yield ".teacher.groups", groups, items(ANYTHING, least=count, most=count)


PLAN = Rule(_PLAN.expected, _PLAN.fits, _plan_parts)

FILE_ENTRY = record(
    {
        "bytes": _COUNT,
        "xxh3_128": text(32, pattern="[0-9a-f]{32}", of="32 hex digits"),
        "sha256": text(64, pattern="[0-9a-f]{64}", of="64 hex digits"),
    }
)
_FILES = entries(FILE_ENTRY, most=1_000_000)

SIDECAR = record(
    {
        "format_version": whole(1, 1 << 16),
        "index": whole(0, MAX_SHARDS - 1),
        "samples": whole(0, MAX_SHARD_SAMPLES),
        "sample_ids": items(text(1 << 16, least=1), most=MAX_SHARD_SAMPLES),
        "rows": _COUNT,
        "field_bytes": entries(_COUNT, most=10_000),
        "files": _FILES,
        "failed": items(record({"sample_id": text(1 << 16), "reason": text(1 << 20)}), most=MAX_SHARD_SAMPLES),
    },
    {
        "pictures": whole(0, MAX_SHARD_SAMPLES),
        "unknown": record({"rows": _COUNT, "token": maybe(whole(0, MAX_TOKEN))}),
        "divided_batches": whole(1, MAX_SHARD_SAMPLES),
    },
)

_OPTIONAL_COUNTS = dict.fromkeys(("pictures", "unknown_rows"), _COUNT)
_COUNTS = dict.fromkeys(("samples", "rows", "failed", "bytes"), _COUNT)
_SUMMARY = record({**_COUNTS, "index": whole(0, MAX_SHARDS - 1), "sidecar": FILE_ENTRY}, _OPTIONAL_COUNTS)

MANIFEST = record(
    {
        "format_version": whole(1, 1 << 16),
        "plan_hash": text(200),
        "totals": OBJECT,  # compared with the sums over the shards
        "field_bytes": entries(whole(0, MAX_FILE_BYTES * MAX_SHARDS), most=10_000),
        "shards": items(_SUMMARY, most=MAX_SHARDS),
        "files": _FILES,
    },
    {"fidelity": maybe(entries(ANYTHING, most=1000))},
)

_PLACES = 1 << 16  # of a layout; as many visual tokens as a picture may have
_REGION = number(-(1 << 18), 1 << 18)
SINKS = record(
    {
        "format_version": whole(1, 1 << 16),
        "gamma": number(0.01, 100),
        "samples": _COUNT,
        "maps": entries(
            record(
                {
                    "signal": _NAME,
                    "places": one_of("token", "tile", "cell"),
                    "pictures": whole(1, MAX_SAMPLES),
                    "tiles": items(items(_REGION, least=6, most=6), least=1, most=_PLACES),
                    "received": items(number(0, 1e6), most=_PLACES),
                    "often": items(_COUNT, most=_PLACES),
                    "scores": items(number(0, 1), most=_PLACES),
                }
            ),
            most=3,
        ),
    }
)

PROJECTOR = record(
    {"act": _NAME, **dict.fromkeys(("in", "hidden", "out"), whole(1, MAX_WIDTH))},
    {
        "bias": FLAG,
        "vision_feature_layer": either(
            whole(-MAX_LAYERS, MAX_LAYERS), items(whole(-MAX_LAYERS, MAX_LAYERS), most=MAX_LAYERS)
        ),
        "vision_feature_select_strategy": _NAME,
    },
    free=True,
)


def _fits_itself(tower: dict[str, Any]) -> bool:
    return bool(tower["patch_size"] <= tower["image_size"]) and tower["hidden_size"] % tower["num_attention_heads"] == 0


_SHARE = number(0, 1)
VISION_TOWER = also(
    record(
        {
            **dict.fromkeys(("hidden_size", "intermediate_size"), whole(1, MAX_WIDTH)),
            "num_hidden_layers": whole(1, MAX_LAYERS),
            "num_attention_heads": whole(1, MAX_WIDTH),
            **dict.fromkeys(("image_size", "patch_size"), whole(1, MAX_SIDE)),
        },
        {
            "model_type": _NAME,
            "projection_dim": whole(1, MAX_WIDTH),
            "num_channels": whole(3, 3),
            "hidden_act": _NAME,
            "layer_norm_eps": _SHARE,
            "attention_dropout": _SHARE,
            "initializer_range": number(0, 1e3),
            "initializer_factor": number(0, 1e3),
            "vision_use_head": FLAG,
        },
        free=True,
    ),
    "patches no larger than the picture, and heads that divide hidden_size",
    _fits_itself,
)
