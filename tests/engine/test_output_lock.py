"""Who works on which slide of an output folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from wsi_mmm.engine.output_lock import claimed


def test_a_slide_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    """The second run is told which slides are taken; when the first ends, they are free."""
    with claimed(str(tmp_path), ["a", "b"]) as first:
        assert first == set()
        with claimed(str(tmp_path), ["b", "c"]) as second:
            assert second == {"b"}
        with claimed(str(tmp_path), ["a", "c"]) as third:
            assert third == {"a"}
    with claimed(str(tmp_path), ["a", "b"]) as again:
        assert again == set()


def test_a_run_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    """Locks are the system's: after kill -9 the next run takes over."""
    code = "import sys, time\nfrom wsi_mmm.engine.output_lock import claimed\n"
    code += "with claimed(sys.argv[1], ['a']):\n    print('held', flush=True)\n    time.sleep(100)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with claimed(str(tmp_path), ["a"]) as taken:
            assert taken == {"a"}
        other.kill()
    with claimed(str(tmp_path), ["a"]) as taken:
        assert taken == set()


def test_where_nothing_can_be_locked_nothing_is_held() -> None:
    """Object stores have no locks."""
    with claimed("s3://bucket/out", ["a"]) as taken:
        assert taken == set()
