"""Read a teacher cache: open it, go through its records, decode what the teacher said and where it looked."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import vlm_distill_cache as vdc


def main() -> None:
    with TemporaryDirectory() as folder:
        # Any finished cache will do: a folder, s3://BUCKET/PREFIX, hf://datasets/ORG/NAME or https://...
        place = str(Path(folder) / "cache")
        vdc.build(vdc.BuildConfig(data="shapes", limit=8, cache=place, fidelity_samples=0))

        cache = vdc.open_cache(place)
        print(f"{len(cache)} samples; signals: {', '.join(cache.signals)}")
        first = next(iter(cache))
        for name, array in cache[first].items():  # as stored: a dict of plain numpy arrays
            print(f"  {name:<18} {array.dtype} {list(array.shape)}")

        # One supervised row for each token of the answer: [A, K] tokens by rank, and [A, G, cells] where it looked.
        for sample_id, record in cache.items():
            logits = cache.decode("logits", record)
            gaze = cache.decode("answer_attention", record)
            right = np.asarray(logits.token_ids)[:, 0] == record["labels"]
            sure = np.exp(np.asarray(logits.log_probs)[:, 0])
            seen = np.asarray(gaze.image_mass)
            print(f"{sample_id}: {right.mean():.0%} right, p {sure.mean():.2f}, {seen.mean():.0%} looks at the image")

        try:
            cache["no such sample"]
        except KeyError as error:
            print(f"KeyError: {error}")


if __name__ == "__main__":
    main()
