"""Train the default model: nuclei (instances) and stain (classify) on one encoder.

python pipelines/train_default.py --data ../shared/data --out runs/default

``--data`` holds ``nuclei/dsb2018_stained_nuclei.zip`` and ``slides/*.svs`` as the recipe names them. Ends by printing
the figures on held-out images, from the model folder as saved. Run again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from wsi_mmm.errors import WsiError
from wsi_mmm.training.recipe import read_recipe, train_default


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with nuclei/ and slides/")
    parser.add_argument("--out", required=True, help="folder for the model; an interrupted training in it goes on")
    parser.add_argument("--recipe", default=str(Path(__file__).with_suffix(".toml")), help="recipe file (TOML)")
    parser.add_argument("--steps", type=int, help="fewer or more steps than the recipe says")
    args = parser.parse_args()
    try:
        recipe = read_recipe(args.recipe)
        if args.steps:
            recipe = recipe.model_copy(update={"steps": args.steps})
        figures = train_default(recipe, args.data, args.out, lambda line: print(line, flush=True))
    except WsiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    print(f"F1 at IoU 0.5 on {figures['nuclei']['images']} held-out images: {figures['nuclei']['f1']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
