"""A classifier of tiles from a few annotated regions: embed, fit a head to the vectors, run it over the slides.

python pipelines/fewshot.py slides/ --labels annotations/ --out runs/fewshot

annotations/ holds <slide>.geojson, as QuPath exports it: a tile learns the class of the region its centre lies in.
"""

from __future__ import annotations

import argparse
import sys

import wsi_mmm


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="slides, folders, patterns, a manifest")
    parser.add_argument("--labels", required=True, help="folder of <slide>.geojson")
    parser.add_argument("--out", required=True, help="folder of everything")
    parser.add_argument("--encoder", default="default", help="packaged model, model folder or timm name")
    parser.add_argument("--weights", help="weights of a timm encoder: a .safetensors file, or random")
    args = parser.parse_args()
    features, head = f"{args.out}/features", f"{args.out}/head"
    try:
        wsi_mmm.embed(args.slides, args.encoder, output=features, weights=args.weights)
        for one in wsi_mmm.fit_head(features, args.labels, output=head, weights=args.weights):
            print(f"{one.kind}: balanced accuracy {one.figures['balanced_accuracy']:.3f}, {one.figures['judged_on']}")
        report = wsi_mmm.run(args.slides, f"{head}/model", output=f"{args.out}/results")
    except wsi_mmm.WsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"results {report.output}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
