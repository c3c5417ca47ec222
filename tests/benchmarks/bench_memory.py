"""Bytes a parameter that a student takes while it trains, by option: ``python -m tests.benchmarks.bench_memory``.

Counted from the tensors of a small student behind one real step of each way; the last column is reckoned for MobileVLM V2 1.7B
from its shapes, by what `distill estimate` uses. Writes ``results/memory.json`` and the table in docs/scale.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.stage2_student.config import LoraConfig, PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.students.build import preset_shell
from vlm_distill_cache.stage2_student.students.packed import pack_layers, round_weights
from vlm_distill_cache.stage2_student.training.memory import Held, counted, predicted
from vlm_distill_cache.stage2_student.training.parts import TrainedParts, decoder_layers
from vlm_distill_cache.stage2_student.training.steps import build_optimizer

STORED = Path(__file__).parent / "results" / "memory.json"
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- memory -->\n", "<!-- /memory -->\n"
IMAGE_TOKEN = 500
HALF = {"weights": "bfloat16", "dtype": "bfloat16"}
LORA = {"trainable": "lora"}
WAYS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (  # as the table calls them, of a run, of a phase
    ("(default)", {}, {}),
    ("`optimizer=adamw8bit`", {"optimizer": "adamw8bit"}, {}),
    ("`weights=bfloat16 dtype=bfloat16`", HALF, {}),
    ("the same, `optimizer=adamw8bit`", HALF | {"optimizer": "adamw8bit"}, {}),
    ("`trainable=lora`", {}, LORA),
    ("`trainable=lora weights=bfloat16 dtype=bfloat16`", HALF, LORA),
    ("the same, `quantisation=4bit`", HALF | {"quantisation": "4bit"}, LORA),
)


def config_of(run: dict[str, Any], phase: dict[str, Any], rank: int) -> TrainConfig:
    """A way of training whose phases all train the same."""
    one = PhaseConfig(steps=1, **phase)
    phases = dict.fromkeys(("dpt", "dft", "sft"), one)
    return TrainConfig(cache="c", output="o", lora=LoraConfig(rank=rank), **phases, **run)


def student(*, width: int = 256, layers: int = 4) -> Any:
    """A MobileVLM of 4 visual tokens, about 4 million parameters by default, most of them its decoder's."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6
    )
    text = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    config = MobileVLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return MobileVLMForConditionalGeneration(config)


def measured(config: TrainConfig, model: Any) -> Held:
    """What a student and its optimizer hold behind one step of a phase."""
    if config.quantisation != "none":
        pack_layers(decoder_layers(model), dtype=getattr(torch, config.dtype), device=torch.device("cpu"))
    if config.weights == "bfloat16":
        round_weights(model)
    phase = config.dft
    by_rate = TrainedParts(model, **vars(config.lora)).begin(
        trainable=phase.trainable, freeze=phase.freeze, apart=phase.rates
    )
    optimizer = build_optimizer(by_rate, phase.rates, weight_decay=0.0, kind=config.optimizer)
    ids = torch.randint(1, IMAGE_TOKEN, (1, 12))
    ids[:, 1:5] = IMAGE_TOKEN
    with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
        logits = model(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24)).logits
    logits.float().square().mean().backward()
    gradients = counted(model, optimizer).gradients  # those of rounded weights are freed by the step
    optimizer.step()
    return replace(counted(model, optimizer), gradients=gradients)


def row_of(name: str, held: Held, large: Held) -> dict[str, Any]:
    """One line of the results; bytes of weights are of any parameter, the others of one that is trained."""
    return {
        "name": name,
        "weights": held.weights / held.parameters,
        "gradients": held.gradients / held.trained,
        "averages": held.averages / held.trained,
        "held": [held.weights, held.gradients, held.averages],
        "large_gb": large.total / 1e9,
    }


def table(results: dict[str, Any]) -> str:
    """The results as the page shows them."""
    lines = [
        "| options | weights | gradients | averages | a trained parameter | MobileVLM V2 1.7B |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        # Adapters are in float32, whatever the weights beside them are in.
        own = 4.0 if "lora" in row["name"] or "4bit" in row["name"] else row["weights"]
        total = own + row["gradients"] + row["averages"]
        lines.append(
            f"| {row['name']} | {row['weights']:.2f} | {row['gradients']:.2f} | {row['averages']:.2f} | {total:.1f} | "
            f"{row['large_gb']:.1f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, store, write the page."""
    shell = preset_shell("mobilevlm-1.7b", Path("nothing"), projector=None)
    rows = []
    for name, run, phase in WAYS:
        config = config_of(run, phase, 128)
        rows.append(row_of(name, measured(config_of(run, phase, 32), student()), predicted(shell, config, config.dft)))
    results = {"student": "MobileVLM, width 256, 4 layers", "rank": 32, "torch": torch.__version__, "rows": rows}
    STORED.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(results) + END + after, encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
