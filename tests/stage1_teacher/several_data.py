"""A data file of samples with text alone, one picture, several, a clip, and both."""

import json
from pathlib import Path

from PIL import Image

SHOWN = {
    "text": {},
    "one": {"image": "a.png"},
    "again": {"image": "a.png"},
    "two": {"image": ["a.png", "b.png"]},
    "clip": {"video": "frames"},
    "both": {"image": "b.png", "video": "frames"},
    "gone": {"image": "none.png"},  # cannot be read
}


def write_data(folder: Path, *names: str) -> str:
    """A LLaVA file of these samples."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(("a.png", "b.png", "frames/0.png", "frames/1.png", "frames/2.png")):
        Image.new("RGB", (40, 30), (50 * number, 90, 10)).save(folder / place)
    entries = []
    for name in names:
        media = SHOWN[name]
        pictures = media.get("image", [])
        count = 1 if isinstance(pictures, str) else len(pictures)
        question = "<image>\n" * count + "<video>\n" * ("video" in media) + "what color is it ?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        entries.append({"id": name, **media, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return str(path)
