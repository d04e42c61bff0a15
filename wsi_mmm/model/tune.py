"""The micro-batch that costs least on this machine, measured on the run's own tiles and remembered per machine.

Only what leaves every bit as it is may be chosen: a size is a candidate when its answers on a run's own tiles equal,
bit for bit, those of the standard size. What is measured is the processor time of the thread that ran a micro-batch,
so a reader on the same core disturbs it little, and no tile is computed twice but the few of the check.

The choices lie in ``tune.json`` in the user's cache folder, which is handed in (`config.user_cache`), a key per
machine, torch version, model, tile size, threads and runtime. A file that cannot be read is measured anew; a folder
that cannot be written, or none, is a run without memory. Neither is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORTH = 500
"""Tiles that a runner does with the standard size before it looks for a better one."""

SAMPLES = 12
"""Micro-batches of each size that are timed; their median counts."""

GAIN = 0.05
"""Share that another size must save to be preferred: less is noise."""

Check = Callable[[Sequence[int]], Sequence[int]]


@dataclass(slots=True)
class Tuner:
    """Which micro-batch size to use next. ``standard`` tiles; ``key`` names the case, empty: never look further.

    ``folder``: the user's cache, where choices are remembered. Callable from several threads.
    """

    standard: int
    key: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    chosen: str = "standard"
    _size: int = 0
    _seen: int = 0
    _turn: int = 0
    _trial: list[int] = field(default_factory=list)
    _times: dict[int, list[float]] = field(default_factory=dict)
    _checking: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        known = remembered(self.folder, self.key) if self.key else None
        self._size = int(known["micro_batch"]) if known else self.standard
        if known:
            self.chosen, self._checking = "measured before", True

    @property
    def size(self) -> int:
        """The size in use."""
        return self._size

    def saw(self, tiles: int, agreeing: Check) -> None:
        """A call of so many tiles begins; ``agreeing`` gives those of some sizes that leave the bits alone."""
        with self._lock:
            self._seen += tiles
            if not self.key or self._checking or self._seen <= WORTH or tiles < 2 * self.standard:
                return
            self._checking = True
        sizes = [self.standard, *agreeing([max(1, self.standard // 2), self.standard * 2])]
        with self._lock:
            self._times = {size: [] for size in sizes}
            self._trial = list(self._times)
            if len(self._trial) < 2:
                self._settle()

    def pick(self) -> int:
        """The size of the next micro-batch: while there is something to find out, those on trial in turns."""
        with self._lock:
            self._turn += 1
            return self._trial[self._turn % len(self._trial)] if self._trial else self._size

    def took(self, size: int, seconds: float) -> None:
        """A full micro-batch of ``size`` tiles took this much processor time."""
        with self._lock:
            if not self._trial or size not in self._times:
                return
            self._times[size].append(seconds / size)
            self._trial = [s for s, found in self._times.items() if len(found) < SAMPLES + 1]
            if not self._trial:
                self._settle()

    def _settle(self) -> None:
        # The first of each size builds its kernels.
        cost = {size: statistics.median(found[1:]) for size, found in self._times.items() if found[1:]}
        best = min(cost, key=lambda size: cost[size], default=self.standard)
        self._size = best if cost and cost[best] < (1 - GAIN) * cost[self.standard] else self.standard
        self.chosen, self._trial = "measured", []
        costs = {str(size): round(1e3 * seconds, 3) for size, seconds in sorted(cost.items())}
        remember(self.folder, self.key, {"micro_batch": self._size, "core_ms_per_tile": costs, **self.facts})


def case_key(**facts: Any) -> str:
    """A key of this machine and these facts."""
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), **facts}
    return hashlib.sha256(json.dumps(machine, sort_keys=True, default=str).encode()).hexdigest()[:24]


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return named[0] if named else platform.machine()


def tune_file(folder: Path) -> Path:
    """Where the choices of this user on this machine lie, below the user's cache."""
    return folder / "tune.json"


def known_choices(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Every choice on file; none without a folder, or when the file is absent, unreadable or broken."""
    if folder is None:
        return {}
    try:
        found = json.loads(tune_file(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in items if isinstance(value, dict) and _sound(value.get("micro_batch"))}


def _sound(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 1 << 16


def remembered(folder: Path | None, key: str) -> dict[str, Any] | None:
    """The choice for this case, if there is one."""
    return known_choices(folder).get(key)


def remember(folder: Path | None, key: str, choice: dict[str, Any]) -> bool:
    """Write a choice down, whole or not at all. False where that is not possible."""
    if folder is None:
        return False
    try:
        path = tune_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**known_choices(folder), key: choice}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as half:
            half.write(text)
        Path(half.name).replace(path)
    except OSError:
        return False
    return True
