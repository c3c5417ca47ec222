"""Both stages from Python: run the teacher once, then train a student from the cache without it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import vlm_distill_cache as vdc


def main() -> None:
    with TemporaryDirectory() as folder:
        # Stage one. Built-in data and teacher; teacher="DIR" takes a checkpoint of yours.
        cache = str(Path(folder) / "cache")
        built = vdc.build(vdc.BuildConfig(data="shapes", limit=64, cache=cache, fidelity_samples=8))
        assert built.manifest is not None
        print(
            f"{built.samples} samples in {built.manifest.totals['bytes']:,} bytes; fidelity: {built.manifest.fidelity}"
        )

        # Stage two. Losses with a weight above 0 read their signal from the cache; the teacher is not loaded.
        losses = vdc.LossWeights(lm=1.0, logits=1.0, answer_attention=1.0)
        config = vdc.TrainConfig(
            student="mobilevlm-tiny",
            cache=cache,
            output=str(Path(folder) / "student"),
            phases=("dft",),
            dft=vdc.PhaseConfig(steps=12, batch_size=8, lr=2e-3, losses=losses),
            device="cpu",
        )
        result = vdc.train(config)
        for step in result.log[::4]:
            print(
                "  ".join(f"{name} {step[name]:.3f}" for name in ("step", "total", "lm", "logits", "answer_attention"))
            )
        print(f"Saved {sorted(path.name for path in result.final.iterdir())}")


if __name__ == "__main__":
    main()
