"""The certificates with which this process shows a Dask scheduler who it is, and knows whom it talks to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsi_mmm.errors import OptionError

CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"  # as Kubernetes names what a TLS secret holds


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files: the authority that signed every certificate of the cluster, our certificate, our key."""

    ca: str
    certificate: str
    key: str


def tls_of(folder: str | Path | None, scheduler: str | None) -> Tls | None:
    """The files of ``folder`` for a cluster at ``scheduler``; None without a folder.

    OptionError when one of them cannot be read, or when the address is not of a TLS scheduler: nothing falls back to
    a connection that is not encrypted.
    """
    if folder is None:
        return None
    if scheduler is None:
        raise OptionError("certificates (tls) are for a scheduler's address; a Dask Client brings its own security")
    if not scheduler.startswith("tls://"):
        raise OptionError(f"{scheduler} is not encrypted; with certificates the address is tls://HOST:PORT")
    paths = [Path(folder).expanduser() / name for name in (CA, CERTIFICATE, KEY)]
    for path in paths:
        try:
            path.open("rb").close()
        except OSError as error:
            wanted = f"the folder of certificates holds {CA}, {CERTIFICATE} and {KEY}"
            raise OptionError(f"{path} cannot be read ({error.strerror}); {wanted}") from error
    return Tls(*map(str, paths))
