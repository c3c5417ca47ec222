"""The README.md of a model that was changed here and not trained: what feeds fewer visual tokens, and how it is loaded."""

import json
from pathlib import Path

from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.hub import CARD, HubName, hub_name
from vlm_distill_cache.common.printing import markdown
from vlm_distill_cache.stage2_student.scores.again import shown_model
from vlm_distill_cache.stage2_student.scores.card import PLACE, loading
from vlm_distill_cache.stage2_student.scores.token_words import token_words

NEEDS_CODE = (
    "elsewhere it needs trust_remote_code=True: the library's own class, without the code beside the weights, feeds and looks "
    "at all visual tokens, and does not say so"
)


def write_plain_card(folder: Path, made_from: str) -> None:
    """Write the card of a model whose tokens were chosen by `distill select-tokens`; ``made_from`` names the one before."""
    name = shown_model(made_from)
    base = f"base_model: {json.dumps(named.repository)}\n" if (named := hub_name(name)) is not None else ""
    lines = "\n".join(f"- {markdown(line, limit=1000)}." for line in token_words(folder).values())
    card = f"""---
{base}library_name: transformers
pipeline_tag: image-text-to-text
tags:
- vision-language
- vlm-distill-cache
---
# {markdown(name)}, with fewer visual tokens

The weights are those of {markdown(name)}, and so is its licence; nothing was trained. `distill select-tokens` wrote it:

{lines}

{NEEDS_CODE[0].upper()}{NEEDS_CODE[1:].replace("trust_remote_code=True", "`trust_remote_code=True`")}.

```python
{loading(folder, HubName(PLACE), None)}
```
"""
    write_bytes_atomic(folder / CARD, card.encode())
