"""Ranks: several processes give what one gives, and none waits for ever for one that has ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import rank_run
from wsi_mmm.errors import ClusterError
from wsi_mmm.training import ranks, state
from wsi_mmm.training.strategies import STRATEGIES

SCRIPT = Path(rank_run.__file__)


def port() -> int:
    """A free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, mode: str, *, wait: float = 60.0) -> list[subprocess.Popen[str]]:
    """Two ranks as processes."""
    number = port()
    environment = os.environ | {"RANK_WAIT": str(wait), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), mode, "127.0.0.1", str(number), str(rank), "2"],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and what was said."""
    try:
        return [(p.wait(200), p.stderr.read() if p.stderr else "") for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
            if p.stderr:
                p.stderr.close()


def compare(one: Path, two: Path) -> float:
    """The largest difference of any number in the last checkpoints of two trainings, which have the same tensors."""
    name = f"step-{rank_run.STEPS:08d}.safetensors"
    (a, facts), (b, others) = (state.read(str(folder / name)) for folder in (one, two))
    assert a.keys() == b.keys() and facts["step"] == others["step"] == rank_run.STEPS
    assert any(key.startswith("optimiser.heads.t2") for key in a)
    assert facts["lost"] == others["lost"] == 2
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if not k.startswith("random."))


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "accumulate"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made of a training by each rule, one after another, in folders of their names."""
    folder = tmp_path_factory.mktemp("two")
    assert [code for code, _ in finish(start(folder, "+".join(["plain", *STRATEGIES])))] == [0, 0]
    return folder


@pytest.mark.parametrize("strategy", ["accumulate", *OTHERS])
def test_two_ranks_give_the_result_of_one_process(two_ranks: Path, tmp_path: Path, strategy: str) -> None:
    """Weights, batch-norm statistics, average and optimiser after 20 steps agree to 1e-6 (float64), though tasks come
    unequally often, a rank has nothing in some steps, one batch failed, and one step had nothing at all."""
    assert rank_run.main(str(tmp_path), f"plain+{strategy}") == 0
    assert compare(tmp_path / strategy, two_ranks / strategy) < 1e-6


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    """The other rank ends by itself, long before its time-out of 60 s, with one line that says what to do."""
    processes = start(tmp_path, "kill")
    began = processes[1].wait(200)
    seconds = time.monotonic()
    processes[0].wait(200)
    assert began == -signal.SIGKILL
    assert time.monotonic() - seconds < 20
    code, said = finish(processes)[0]
    assert code == 3
    assert "ClusterError: rank 0 of 2: another rank has ended" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(tmp_path: Path) -> None:
    """A stopped process keeps its sockets: the other waits its time-out, no longer, and says so."""
    processes = start(tmp_path, "hang", wait=10)
    try:
        processes[0].wait(200)
    finally:
        processes[1].kill()
    code, said = finish(processes)[0]
    assert code == 3 and "silent for 10 s" in said


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_with_its_name(tmp_path: Path) -> None:
    """Both ranks say which task and items it was, though only one of them had them."""
    found = finish(start(tmp_path, "nan"))
    for code, said in found:
        assert code == 3
        assert "NotFinite: step 5: the loss of task 't2' is" in said and "'feed/509/0'" in said


@pytest.mark.slow
def test_torchrun_starts_ranks(tmp_path: Path) -> None:
    """Under torchrun the ranks find each other by its environment, and give the result of one process."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
         "--master-port", str(port()), str(SCRIPT), str(tmp_path / "two"), "plain"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rank_run.main(str(tmp_path / "one"), "plain") == 0
    assert compare(tmp_path / "one", tmp_path / "two") < 1e-6


# ---------------------------------------------------------------- Dask
class Done:
    """A future of `Fake`."""

    def __init__(self, value: object, error: BaseException | None = None) -> None:
        self.value, self.error = value, error
        self.status = "error" if error else "finished"

    def done(self) -> bool:
        """It is."""
        return True

    def exception(self) -> BaseException | None:
        """What it raised."""
        return self.error

    def result(self) -> object:
        """What it returned."""
        return self.value


class Fake:
    """A cluster whose workers fail as told; nothing runs but the search for a port."""

    def __init__(self, errors: list[BaseException | None]) -> None:
        self.errors = errors
        self.asked: list[list[str]] = []
        self.cancelled = 0

    def nthreads(self) -> dict[str, int]:
        """As many workers as there are errors."""
        return {f"tcp://127.0.0.1:{4000 + i}": 1 for i in range(len(self.errors))}

    def submit(self, function: object, *args: object, workers: list[str], **_: object) -> Done:
        """Note where it was to run."""
        self.asked.append(workers)
        if not args:
            return Done(function())  # type: ignore[operator]
        meeting = args[1]
        assert isinstance(meeting, ranks.Meeting)
        return Done(meeting.rank, self.errors[meeting.rank])

    def cancel(self, futures: list[Done]) -> None:
        """Count."""
        self.cancelled += len(futures)


def test_one_rank_runs_on_each_worker() -> None:
    """Each worker is asked once, by its address; results come in the order of ranks."""
    fake = Fake([None, None])
    assert ranks.launch_on_dask(fake, lambda _ranks: 0) == [0, 1]
    assert fake.asked[1:] == [["tcp://127.0.0.1:4000"], ["tcp://127.0.0.1:4001"]]


def test_the_rank_that_failed_itself_is_told() -> None:
    """Not the ClusterError of the one that missed it; the rest is cancelled."""
    fake = Fake([ClusterError("another rank has ended"), ZeroDivisionError("mine")])
    with pytest.raises(ZeroDivisionError):
        ranks.launch_on_dask(fake, lambda _ranks: 0)
    assert fake.cancelled == 2


def test_a_cluster_without_workers_is_refused() -> None:
    """ClusterError says what to do."""
    with pytest.raises(ClusterError, match="no workers"):
        ranks.launch_on_dask(Fake([]), lambda _ranks: 0)


@pytest.mark.slow
def test_ranks_meet_on_a_dask_cluster() -> None:
    """On a real cluster of two worker processes the ranks add up numbers."""
    code = (
        "from distributed import Client, LocalCluster\n"
        f"import sys; sys.path[:0] = [{str(SCRIPT.parent.parent)!r}]\n"
        "from wsi_mmm.training import ranks\n"
        "def work(one):\n"
        "    return one.rank, one.world, ranks.total(one, [1.0, float(one.rank)])\n"
        "if __name__ == '__main__':\n"
        "    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as c, Client(c) as client:\n"
        "        print(ranks.launch_on_dask(client, work, device='cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "[(0, 2, [2.0, 1.0]), (1, 2, [2.0, 1.0])]" in done.stdout, done.stderr


# ---------------------------------------------------------------- alone
def test_alone_nothing_is_sent() -> None:
    """One process: sums are its own numbers, gradients stay, None included."""
    weight = torch.nn.Parameter(torch.ones(2))
    ranks.add_gradients(ranks.ALONE, [weight])
    assert weight.grad is None
    assert ranks.total(ranks.ALONE, [1, 2.5]) == [1.0, 2.5]
    assert ranks.first_message(ranks.ALONE, "x") == "x"
    with ranks.joined("cpu") as one:
        assert (one.rank, one.world, one.first) == (0, 1, True)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_a_group_that_is_left_leaves_no_thread() -> None:
    """Whatever of torch is first imported while ranks are together (an optimiser does so), their threads end with them:
    one that was still alive as Python ended aborted the process ("terminate called without an active exception")."""
    code = (
        "import contextlib, time\nfrom pathlib import Path\nfrom wsi_mmm.training import ranks\n"
        "def threads():\n"
        "    found = 0\n"
        "    for task in Path('/proc/self/task').iterdir():\n"
        "        with contextlib.suppress(OSError):  # it has just ended\n"
        "            found += 'gloo' in (task / 'comm').read_text()\n"
        "    return found\n"
        f"with ranks.joined('cpu', meeting=ranks.Meeting('127.0.0.1', {port()}, 0, 1)) as one:\n"
        "    import torch.distributed.nn.functional\n"
        "    print(ranks.total(one, [1]), threads())\n"
        "end = time.monotonic() + 20\n"
        "while threads() and time.monotonic() < end:\n"
        "    time.sleep(0.02)  # the system lists a thread for a moment after it was joined\n"
        "print(threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    together, after = done.stdout.splitlines()
    assert int(together.split()[-1]) > 0 and after == "0", done.stderr


def test_ranks_that_cannot_meet_say_so() -> None:
    """A host that nobody serves is a ClusterError in one line, after the wait."""
    meeting = ranks.Meeting("127.0.0.1", port(), 1, 2)
    with pytest.raises(ClusterError, match="cannot meet"), ranks.joined("cpu", wait=2.0, meeting=meeting):
        pass
