"""Fixtures that the whole suite shares. Rooms keep their own beside their tests."""

from __future__ import annotations

import gc
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    # Before numpy and torch are imported: parallelism is several Python threads, each with one compute thread.
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a network for weights
_THRESHOLDS = gc.get_threshold()
gc.set_threshold(100_000)  # while the tests are imported: what torch and timm make stays

from pathlib import Path  # noqa: E402  (the variables above must be set first)
from typing import TYPE_CHECKING, NamedTuple  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if TYPE_CHECKING:
    from wsi_mmm.slides.fake import SyntheticNuclei

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "suite",
    deadline=None,  # machines differ; pytest-timeout stops what hangs
    derandomize=True,  # the same cases on every run; `HYPOTHESIS_PROFILE=search` looks for new ones
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("search", parent=settings.get_profile("suite"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_finish() -> None:
    """What was imported is not looked through for garbage again, in any test; what tests make is, as ever."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


class RealData(NamedTuple):
    """The folder of real slides; see CONTRIBUTING.md for what it may hold."""

    root: Path

    def slide(self, name: str) -> Path:
        """Path of ``slides/<name>``, or skip the test when that file is not there."""
        return self._need(self.root / "slides" / name)

    def file(self, relative: str) -> Path:
        """Path of any file below the folder, or skip the test when it is not there."""
        return self._need(self.root / relative)

    def slides(self) -> list[Path]:
        """Every real slide that is there, sorted by name."""
        return sorted((self.root / "slides").glob("*.svs"))

    @staticmethod
    def _need(path: Path) -> Path:
        if not path.exists():
            pytest.skip(f"{path.name} is not in the real data")
        return path


@pytest.fixture(scope="session")
def real_data() -> RealData:
    """Real slides in ``WSI_MMM_TEST_DATA`` (default: ``../shared/data`` beside the checkout); skips without them."""
    root = Path(os.environ.get("WSI_MMM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (root / "slides").is_dir():
        pytest.skip("no real slides: set WSI_MMM_TEST_DATA to a folder that has them")
    return RealData(root)


@pytest.fixture(autouse=True)
def _plain_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the developer's credentials or settings, except those that talk to a real server."""
    if request.node.get_closest_marker("services"):
        return
    for name in list(os.environ):
        if name.startswith(("AWS_", "WSI_MMM_")) and name != "WSI_MMM_TEST_DATA":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else S3 clients look for a metadata server for seconds


@pytest.fixture(scope="session")
def tiny_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic H&E-like pyramidal TIFF, 1536 x 1152 px at 0.5 mpp with 120 nuclei; do not write to it."""
    from wsi_mmm.slides.fake import synthetic_slide

    path = tmp_path_factory.mktemp("tiny") / "tiny.tiff"
    synthetic_slide(path, seed=7, width=1536, height=1152, mpp=0.5, nuclei=120)
    return path


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in its own empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_truth(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> SyntheticNuclei:
    """The nuclei of ``tiny_slide``: the same arguments give the same slide."""
    from wsi_mmm.slides.fake import synthetic_slide

    return synthetic_slide(
        tmp_path_factory.mktemp("again") / "again.tiff", seed=7, width=1536, height=1152, mpp=0.5, nuclei=120
    )
