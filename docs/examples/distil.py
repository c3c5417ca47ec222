# %% [markdown]
# # Distil a vision-language model from a cache
#
# A large teacher runs once and leaves a cache; students are trained from the cache, without the teacher. Everything here is
# built in and tiny, so that it runs on a CPU within a minute. With models and data of your own, change the options in the first
# cells: [python.md](../python.md) shows how.
#
# This notebook is written by `make docs` from `distil.py` beside it.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import vlm_distill_cache as vdc

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Stage one: run the teacher once
#
# `data` may be a file of conversations, a folder or a data set of the hub, and `teacher` a folder or a model of the hub.

# %%
summary = vdc.build(vdc.BuildConfig(data="shapes", limit=24, cache=folder / "cache"))
cache = vdc.open_cache(folder / "cache")
print(f"{len(cache)} samples in {cache.manifest.totals['bytes']:,} bytes; signals: {', '.join(cache.signals)}")
print(cache.manifest.fidelity)  # what the cache lost against its teacher

# %% [markdown]
# ## What the teacher said, and where it looked

# %%
sample_id = next(iter(cache))
record = cache[sample_id]
logits = cache.decode("logits", record)
print(sample_id, "tokens", record["labels"], "likeliest", logits.token_ids[:, 0])
print("probability of the likeliest token:", np.exp(logits.log_probs[:, 0]).round(2))

# %%
attention = cache.decode("answer_attention", record)
side = int(attention.cells.shape[-1] ** 0.5)
print((100 * attention.cells[0, 0].reshape(side, side)).round(1))  # percent of the first answer token's attention

# %% [markdown]
# ## Stage two: train a student from the cache
#
# The teacher is not loaded. The data set checks first that tokenizer, prompt, data and visual tokens fit.

# %%
weights = vdc.LossWeights(lm=1.0, logits=1.0, answer_attention=1.0)
dataset = vdc.DistillationDataset(folder / "cache", "mobilevlm-tiny", weights)
loss = vdc.DistillationLoss(dataset)
model = dataset.student


def measure() -> dict[str, float]:
    with torch.no_grad():
        losses = loss(model, dataset.collate([dataset[place] for place in range(len(dataset))]))
    return {name: value.item() for name, value in losses.named().items()}


before = measure()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
loader = DataLoader(dataset, batch_size=8, sampler=dataset.sampler(seed=0), collate_fn=dataset.collate)
for _ in range(3):
    for batch in loader:
        loss(model, batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
after = measure()
for name in before:
    print(f"{name:<20} {before[name]:8.3f} -> {after[name]:.3f}")

# %% [markdown]
# ## Keep it
#
# Model and processor go where `from_pretrained` finds them, with or without this project.

# %%
dataset.save_student(folder / "student")
print(sorted(path.name for path in (folder / "student").iterdir()))
