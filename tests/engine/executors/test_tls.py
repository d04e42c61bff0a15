"""Certificates for a Dask cluster: what is refused before anything is sent, and a cluster that speaks TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import wsi_mmm
from helpers.certificates import certificates
from helpers.processes import dask_cluster
from wsi_mmm.cli import doctor
from wsi_mmm.cli.main import app
from wsi_mmm.config import default_tls
from wsi_mmm.engine.executors import dask
from wsi_mmm.engine.executors.tls import Tls, tls_of
from wsi_mmm.errors import ClusterError, OptionError

ADDRESS = "tls://127.0.0.1:8786"


def test_a_folder_of_certificates_is_three_files(tmp_path: Path) -> None:
    """The names are those of a TLS secret of Kubernetes."""
    folder = certificates(tmp_path)
    assert tls_of(folder, ADDRESS) == Tls(*(str(folder / name) for name in ("ca.crt", "tls.crt", "tls.key")))
    assert tls_of(None, "tcp://127.0.0.1:8786") is None


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
def test_a_missing_certificate_is_named(tmp_path: Path, name: str) -> None:
    """One line says which file, and which files there should be."""
    (certificates(tmp_path) / name).unlink()
    with pytest.raises(OptionError, match=rf"{name} cannot be read .*holds ca.crt, tls.crt and tls.key"):
        tls_of(tmp_path, ADDRESS)


def test_certificates_are_never_used_for_an_open_connection(tmp_path: Path) -> None:
    """Whoever asks for TLS and names a tcp:// address, or none, gets a refusal and no plain connection."""
    certificates(tmp_path)
    with pytest.raises(OptionError, match="is not encrypted"):
        tls_of(tmp_path, "tcp://127.0.0.1:8786")
    with pytest.raises(OptionError, match="for a scheduler's address"):
        tls_of(tmp_path, None)
    with pytest.raises(OptionError, match="for a scheduler's address"):
        wsi_mmm.run(tmp_path / "no.svs", output=tmp_path / "out", tls=tmp_path)


def test_the_environment_names_the_folder() -> None:
    """WSI_MMM_TLS, empty as if it were not set."""
    assert default_tls("tls://h:1", {"WSI_MMM_TLS": "/certs"}) == "/certs"
    assert default_tls("tls://h:1", {"WSI_MMM_TLS": ""}) is default_tls("tcp://h:1", {"WSI_MMM_TLS": "/certs"}) is None


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a scheduler that speaks TLS only, and the folder of certificates that it trusts."""
    folder = tmp_path_factory.mktemp("secured")
    files = certificates(folder / "certificates")
    flags = ["--tls-ca-file", files / "ca.crt", "--tls-cert", files / "tls.crt", "--tls-key", files / "tls.key"]
    with dask_cluster(folder, flags, protocol="tls") as address:
        yield address, files


@pytest.mark.slow
def test_a_run_over_tls_gives_the_same_bytes(secured: tuple[str, Path], tiny_slide: Path, tmp_path: Path) -> None:
    """The command with --tls does on an encrypted cluster what it does in one process."""
    address, files = secured
    assert address.startswith("tls://")
    words = ["run", str(tiny_slide), "--task", "stain", "--scheduler", address, "--tls", str(files)]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "far")])
    assert result.exit_code == 0, result.output
    assert wsi_mmm.run(tiny_slide, output=tmp_path / "near", tasks="stain").exit_code == 0
    near, far = (tmp_path / where / tiny_slide.stem / "result.geojson.gz" for where in ("near", "far"))
    assert far.read_bytes() == near.read_bytes()


@pytest.mark.slow
def test_doctor_asks_an_encrypted_cluster(secured: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder given, or named by the environment."""
    address, files = secured
    assert doctor.cluster(address, str(files)).status == "ok"
    monkeypatch.setenv("WSI_MMM_TLS", str(files))
    assert doctor.cluster(address, None).status == "ok"


@pytest.mark.slow
def test_nobody_else_gets_in(secured: tuple[str, Path], tmp_path: Path) -> None:
    """Without certificates, with those of another authority, or without encryption: one line, and no work is done."""
    address, _ = secured
    stranger = tls_of(certificates(tmp_path), address)
    for where, tls in ((address, None), (address, stranger), (address.replace("tls://", "tcp://"), None)):
        with pytest.raises(ClusterError, match=r"no Dask scheduler answers at .*--tls"):
            dask.connect(where, timeout=3.0, tls=tls)
