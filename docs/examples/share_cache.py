"""Share caches: push one, pull a part of it, merge, convert and verify."""

from pathlib import Path
from tempfile import TemporaryDirectory

import vlm_distill_cache as vdc


def main() -> None:
    with TemporaryDirectory() as folder:
        here = Path(folder)
        for seed in (1, 2):  # one teacher, two data sets
            data = f"shapes:images=8,seed={seed}"
            vdc.build(vdc.BuildConfig(data=data, cache=str(here / f"cache{seed}"), shard_size=4, fidelity_samples=0))

        # To a folder; s3://BUCKET/PREFIX and hf://datasets/ORG/NAME work the same. Killed and called again, it goes on.
        _, moved = vdc.push(here / "cache1", here / "shared")
        print(f"pushed: {moved}")

        # A part: one shard, one signal, at most 4 tokens a row. Only what is needed is downloaded.
        part = vdc.Selection(shards=(0,), signals=("logits",), top_k=4)
        manifest = vdc.pull_partial(here / "shared", here / "part", part)
        print(f"pulled a part: {manifest.totals['samples']} samples, {manifest.totals['bytes']:,} bytes")

        merged = vdc.merge([here / "cache1", here / "cache2"], here / "both")
        print(f"merged: {merged.samples} samples")

        vdc.convert(here / "both", here / "both-tar", "webdataset")
        one, other = (vdc.open_cache(here / name) for name in ("both", "both-tar"))
        same = all((array == other[name][key]).all() for name, record in one.items() for key, array in record.items())
        print(f"converted: equal records: {same}")

        print(f"damage: {vdc.verify(here / 'both-tar', deep=True)}")
        (here / "both-tar" / "shards" / "00000.tar").write_bytes(b"oops")
        for damage in vdc.verify(here / "both-tar"):
            print(f"damage: {damage}")


if __name__ == "__main__":
    main()
