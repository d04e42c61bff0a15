"""What the units of real slides cost, for `bench_scale`: writes scale_units.json.

    python tests/benchmarks/scale_record.py SLIDE ... [-o tests/benchmarks/scale_units.json]

Per kind of unit: [tiles, seconds] of each one, seconds being those of its steps without waiting. One process, so that
units hardly wait for each other; still run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import wsi_mmm
from wsi_mmm import timing
from wsi_mmm.engine.monitoring.accounting import RunAccounting
from wsi_mmm.engine.units import ForwardResult, UnitResult, WorkUnit

HERE = Path(__file__).parent


def recorded(slides: list[Path]) -> dict[str, list[tuple[int, float]]]:
    """(tiles, seconds) of every unit of a run over ``slides``, by kind."""
    found: dict[str, list[tuple[int, float]]] = {}
    inner = RunAccounting.watch

    def watch(self: RunAccounting, thing: WorkUnit | UnitResult) -> None:
        inner(self, thing)
        if not isinstance(thing, WorkUnit):
            spent = timing.sum_stages(thing.facts.times)
            busy = sum(seconds for stage, seconds in spent.items() if stage != "waiting")
            tiles = thing.tiles if isinstance(thing, ForwardResult) else 0
            found.setdefault(thing.facts.kind, []).append((tiles, round(busy, 4)))

    RunAccounting.watch = watch  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as output:
            report = wsi_mmm.run(slides, output=output)
    finally:
        RunAccounting.watch = inner  # type: ignore[method-assign]
    if report.exit_code:
        raise SystemExit(f"error: {[row.error for row in report.slides]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "scale_units.json")
    given = parser.parse_args()
    facts = {
        "slides": [slide.name for slide in given.slides],
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, default model, one process",
        "units": recorded(given.slides),
    }
    given.output.write_text(json.dumps(facts, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
