"""Run by a Python that has the model library and not this project: loads saved students, asks them, tells what it got.

``elsewhere.py FOLDER``: FOLDER/cases.json names students, what they are asked and a picture, which is RGB, too;
FOLDER/told.json is written.
"""

import json
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")


def tell(folder: Path, cases: dict[str, Any], questions: list[dict[str, Any]], *, own: bool) -> dict[str, Any]:
    """Prompt ids, logits behind them, and answers: by hand and through the pipeline."""
    import PIL.Image
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

    options = {"trust_remote_code": True} if own else {}
    AutoConfig.from_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()
    processor = AutoProcessor.from_pretrained(folder, **options)
    chats, told = (
        [],
        {"ids": [], "logits": [], "answers": [], "piped": [], "batched": [], "plain": [], "sum": [], "loss": []},
    )
    for question in questions:
        # A path, or what was opened: with torchvision the library would open paths by it.
        shown = {"path": cases["picture"]} if own else {"image": PIL.Image.open(cases["rgb"])}
        part = [{"type": "image", **shown}] if question["shows"] else []
        chats.append([{"role": "user", "content": [*part, {"type": "text", "text": question["text"]}]}])
    ask = pipeline("image-text-to-text", model=str(folder), **options)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**given).logits[0, -1]
            made = model.generate(**given, **how)[0, given["input_ids"].shape[1] :]
        if own:  # to fine-tune it there: pictures are no words to learn
            told["loss"].append(float(model(**given, labels=given["input_ids"]).loss))
        told["ids"].append(given["input_ids"][0].tolist())
        told["logits"].append(logits.tolist())
        told["sum"].append(float(given["pixel_values"].double().sum()) if "pixel_values" in given else 0.0)
        told["answers"].append(processor.decode(made, skip_special_tokens=True).strip())
        told["piped"].append(ask(text=chat, return_full_text=False, generate_kwargs=how)[0]["generated_text"].strip())
    told["batched"] = [
        one[0]["generated_text"].strip()
        for one in ask(text=chats[:2], return_full_text=False, generate_kwargs=how, batch_size=2)
    ]
    if own:
        told["batched"] += [
            one[0]["generated_text"].strip()
            for one in ask(text=chats, return_full_text=False, generate_kwargs=how, batch_size=2)
        ]
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
        shown = [cases["picture"] for question in questions if question["shows"]]
        batch = processor(images=shown, text=texts, return_tensors="pt")
        made = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
        told["batched"] += [one.strip() for one in processor.batch_decode(made, skip_special_tokens=True)]
        told["plain"] = [
            one["generated_text"].strip()
            for text, question in zip(texts, questions, strict=True)
            if question["shows"]
            for one in ask(images=cases["rgb"], text=text, return_full_text=False, generate_kwargs=how)
        ]
    return told


if __name__ == "__main__":
    home = Path(sys.argv[1])
    assert find_spec("vlm_distill_cache") is None, "this Python has the project"
    cases = json.loads((home / "cases.json").read_text())
    told = {name: tell(home / name, cases, cases["questions"], own=own) for name, own in cases["students"].items()}
    (home / "told.json").write_text(json.dumps(told))
