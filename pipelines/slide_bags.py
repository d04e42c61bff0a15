"""A label per slide from the vectors of its tiles: embed, train, run.

python pipelines/slide_bags.py slides/ --table slides.csv --out runs/slide-bags [--set steps=100]

Each part resumes: run the same again after an interruption. The results hold the answer and the attention per tile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import wsi_mmm


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="slides, folders, patterns, a manifest")
    parser.add_argument("--table", required=True, help="CSV with the columns slide, patient, label")
    parser.add_argument("--out", required=True, help="folder of everything")
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".toml")), help="configuration (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the configuration")
    args = parser.parse_args()
    features = f"{args.out}/features"
    settings = [f"out={args.out}", f"data.bags.features={features}/{{slide}}/features.zarr"]
    try:
        embedded = wsi_mmm.embed(args.slides, "default", output=features, mpp=0.5, tile_size=256)
        if embedded.exit_code:
            print(f"error: some slides were not embedded; see {embedded.path}", file=sys.stderr)
            return 1
        done = wsi_mmm.train(args.config, settings=[*settings, f"data.bags.slides.table={args.table}", *args.set])
        report = wsi_mmm.run(args.slides, done.model, output=f"{args.out}/results")
    except wsi_mmm.WsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"held out: {done.test or done.val}")
    print(f"model {done.model}\nresults {report.output}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
