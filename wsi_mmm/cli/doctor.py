"""The command doctor: checks of this machine. Every line is ok, warn or fail, with the fix."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from wsi_mmm import config
from wsi_mmm.cli.console import say, say_json
from wsi_mmm.errors import WsiError

LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "zarr", "dask", "distributed", "obstore", "s3fs", "openslide-python",
    "openslide-bin", "tiffslide", "tifffile", "imagecodecs", "simplejpeg", "shapely", "scikit-image", "pyarrow", "h5py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the doctor; ``fix`` is empty when all is well."""

    status: Literal["ok", "warn", "fail"]
    what: str
    detail: str
    fix: str = ""


def doctor(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder that results would go to.")] = ".",
    scheduler: Annotated[
        str | None, typer.Option(help="Also ask this Dask scheduler and its workers.", metavar="ADDRESS")
    ] = None,
    tls: Annotated[
        str | None, typer.Option(help="Folder of ca.crt, tls.crt, tls.key for it.", metavar="FOLDER")
    ] = None,
) -> int:
    """Check versions, device, storage and disk, and try the model.

    \b
    Examples:
      wsi-mmm doctor
      wsi-mmm doctor -o /data/results --scheduler tcp://scheduler:8786
    """
    failed = 0
    for result in examine(output, scheduler, tls):
        failed += result.status == "fail"
        say_json(result)
        say(f"{result.status:<4}  {result.what:<10}  {result.detail}" + (f"  ->  {result.fix}" if result.fix else ""))
    return 1 if failed else 0


def examine(output: str, scheduler: str | None, tls: str | None = None) -> Iterator[CheckResult]:
    """Yield the result of every check, in the order a person would look; none raises."""
    checks: list[tuple[str, Callable[[], CheckResult]]] = [
        ("python", python),
        ("libraries", libraries),
        ("device", device),
        ("encoder", encoder),
        ("runtimes", runtimes),
        ("openslide", openslide),
        ("storage", storage),
        ("output", lambda: writable(output)),
        ("model", smoke),
    ]
    if scheduler:
        checks.append(("scheduler", lambda: cluster(scheduler, tls)))
    for what, check in checks:
        try:
            yield check()
        except WsiError as error:
            yield CheckResult("fail", what, str(error))  # the message names the fix
        except Exception as error:  # noqa: BLE001  (finding out what is broken is the very job)
            fix = 'pip install -c constraints.txt -e ".[dev]"'
            yield CheckResult("fail", what, f"{type(error).__name__}: {error}", fix)


def python() -> CheckResult:
    """Version and platform."""
    detail = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return CheckResult("ok", "python", detail)


def libraries() -> CheckResult:
    """Versions of what does the work; fail when one is missing."""
    versions = {name: _package_version(name) for name in LIBRARIES}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return CheckResult("fail", "libraries", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return CheckResult("ok", "libraries", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _package_version(name: str) -> str | None:
    from importlib import metadata  # not needed for --help

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device() -> CheckResult:
    """The device that ``--device auto`` would take."""
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        return CheckResult("ok", "device", f"cuda ({torch.cuda.device_count()}): {', '.join(sorted(names))}")
    detail = f"cpu, torch {torch.__version__}"
    if shutil.which("nvidia-smi"):
        fix = "install a torch build for this driver's CUDA version"
        return CheckResult("warn", "device", f"{detail}; nvidia-smi is here but torch sees no GPU", fix)
    return CheckResult("ok", "device", detail)


def encoder() -> CheckResult:
    """The way a model would be run here."""
    from wsi_mmm.host_tuning import cpu_count

    how = "float32, channels_last, norms folded, freed memory kept"
    return CheckResult("ok", "encoder", f"{cpu_count()} model threads, {how}")


def runtimes() -> CheckResult:
    """The ways to run a model that are installed here, and how far their numbers may lie from eager's."""
    from wsi_mmm.model.identity import RUNTIMES, lacking

    here = {name: words for name, words in RUNTIMES.items() if not lacking(name)}
    detail = "; ".join(f"{name}: {words}" for name, words in here.items())
    if "onnx" not in here:
        return CheckResult("ok", "runtimes", f"{detail}; onnx is not installed (pip install 'wsi-mmm[onnx]')")
    from wsi_mmm.model.onnx import providers

    return CheckResult("ok", "runtimes", f"{detail} ({_package_version('onnxruntime')}; {', '.join(providers())})")


def openslide() -> CheckResult:
    """The native library behind every vendor format but TIFF."""
    if version := _package_version("openslide-bin"):
        return CheckResult("ok", "openslide", f"library {version}")
    detail = "no packaged library; the system's is used if there is one"
    return CheckResult("warn", "openslide", detail, "pip install openslide-bin")


def storage() -> CheckResult:
    """Object-store variables; what may be secret is never shown."""
    found = config.storage_environment()
    if not found:
        unset = "no object-store variables set: s3:// uses the shared credentials file or role"
        return CheckResult("ok", "storage", unset)
    detail = ", ".join(f"{name}={value}" for name, value in found.items())
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if len(missing := [name for name in keys if name not in found]) == 1:
        return CheckResult("fail", "storage", detail, f"set {missing[0]} too")
    if not any(name.endswith("REGION") or name.startswith("AWS_ENDPOINT") for name in found):
        return CheckResult("warn", "storage", detail, "set AWS_REGION, or AWS_ENDPOINT_URL for another S3 server")
    return CheckResult("ok", "storage", detail)


def writable(output: str) -> CheckResult:
    """A test file in the output folder, and the free space of a local disk."""
    from wsi_mmm.engine.monitoring.run_report import check_writable
    from wsi_mmm.storage import store

    check_writable(output)
    if not store.is_local(output):
        return CheckResult("ok", "output", f"{store.redact(output)} can be written")
    free = shutil.disk_usage(output).free / 1e9
    if free < 2:
        fix = "a slide's cache can take gigabytes; free some"
        return CheckResult("warn", "output", f"{output}: {free:.1f} GB free", fix)
    return CheckResult("ok", "output", f"{output} can be written, {free:.0f} GB free")


def smoke() -> CheckResult:
    """Read a small synthetic slide and run the default model on it once."""
    from wsi_mmm import api
    from wsi_mmm.slides.fake import synthetic_slide

    with tempfile.TemporaryDirectory(prefix="wsi-mmm-doctor-") as folder:
        slide = Path(folder) / "doctor.tiff"
        synthetic_slide(slide, seed=0, width=1024, height=768, nuclei=60)
        start = time.monotonic()
        row = api.run([str(slide)], output=str(Path(folder) / "out")).slides[0]
        seconds = time.monotonic() - start
    if row.status != "done":
        detail = f"the default model on a synthetic slide: {row.status}, {row.error}"
        return CheckResult("fail", "model", detail, "reinstall")
    return CheckResult("ok", "model", f"{row.objects} objects in a synthetic slide, {seconds:.1f} s with loading")


def cluster(address: str, folder: str | None) -> CheckResult:
    """The answer of the scheduler, on an encrypted connection if so asked, and the fitness of its workers."""
    from wsi_mmm.engine.executors import dask
    from wsi_mmm.engine.executors.tls import tls_of

    executor = dask.connect(address, timeout=5.0, tls=tls_of(folder or config.default_tls(address), address))
    try:
        if warnings := executor.capabilities.warnings:
            return CheckResult("warn", "scheduler", warnings[0], "install the same wsi-mmm on every worker")
        return CheckResult("ok", "scheduler", f"{address} answers and its workers can do the work")
    finally:
        executor.close()
