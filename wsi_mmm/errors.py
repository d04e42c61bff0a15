"""Every error that wsi_mmm raises on purpose.

::

    WsiError                     base: one readable line that names the fix
    ├── InputError               something that the user gave cannot be used
    │   ├── SlideNotFound        a slide was to be opened and nothing is at its URI
    │   ├── NotASlide            no reader knows the format of the bytes
    │   ├── SlideDamaged         a slide, but truncated or inconsistent
    │   ├── MppUnknown           the slide does not say its resolution
    │   ├── ManifestError        a row or column of a manifest is wrong
    │   ├── AnnotationError      annotations, regions or a tissue mask cannot be used
    │   ├── OptionError          an option, an argument or a combination of them is wrong
    │   ├── ConfigError          a settings or training file, or an environment variable, is wrong
    │   └── JobError             a job of the EMPAIA platform cannot be done as asked; worded for a pathologist
    ├── StorageError             fetching or writing bytes failed
    │   ├── NotFound             no object at that URI
    │   ├── TransientError       a failure that may pass; ``cause`` says why
    │   ├── SlideChanged         the object changed while it was read
    │   └── OutputError          the output cannot be written (permission, disk full)
    │       └── OutputTaken      another run is working on the same output
    ├── ModelError               a model file is missing, broken or does not fit
    │   └── ModelNotLoaded       the model of a run cannot be used by any slide
    ├── MissingPackage           an optional package is needed and not installed
    ├── PluginError              a package that extends wsi_mmm cannot be used
    ├── ClusterError             the scheduler, its workers or another rank cannot do the work
    ├── PlatformError            the EMPAIA platform refused something, or does not answer
    ├── NotFinite                a loss or a gradient became NaN or infinite in training
    └── Cancelled                the user stopped the run; it can be resumed

Foreign exceptions are translated once, where the foreign library is called, with ``from``.
The text of an error never holds a secret: URIs are shown without credentials or query strings.
"""

from __future__ import annotations

from enum import StrEnum


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of a foreign error's text, at most so many characters; the name of its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def printable(text: str) -> str:
    """``text`` as UTF-8 can hold it: bytes of a file name that are no UTF-8 are written as ``\\xe9``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # halves of a character, as JSON may hold them
            return text.encode("utf-8", "backslashreplace").decode()
    return text


class WsiError(Exception):
    """Base of the tree. ``str(error)`` is one line a user can act on."""


class InputError(WsiError):
    """Something that the user gave cannot be used."""


class SlideNotFound(InputError):
    """A slide was to be opened, and there is nothing at its URI."""


class NotASlide(InputError):
    """No reader knows the format of the bytes."""


class SlideDamaged(InputError):
    """A slide, but truncated or inconsistent with itself."""


class MppUnknown(InputError):
    """The slide does not say how many micrometres a pixel is."""


class ManifestError(InputError):
    """A row or a column of a manifest is wrong."""


class AnnotationError(InputError):
    """Annotations, regions or a tissue mask cannot be used."""


class OptionError(InputError):
    """An option, an argument or a combination of them is wrong."""


class ConfigError(InputError):
    """A settings or training file, or an environment variable, is wrong."""


class JobError(InputError):
    """A job of the EMPAIA platform cannot be done as it is asked for. The text is for a pathologist: no internals."""


class StorageError(WsiError):
    """Fetching or writing bytes failed."""


class NotFound(StorageError):
    """There is no object at that URI."""


class TransientCause(StrEnum):
    """Why a request failed that may succeed later."""

    UNREACHABLE = "unreachable"  # no connection, or the name cannot be resolved
    TIMEOUT = "timeout"
    SHORT_ANSWER = "short answer"  # the body ended early
    BROKEN_CONNECTION = "broken connection"
    OVERLOADED = "overloaded"  # 502, 503, 504
    TOO_MANY_REQUESTS = "too many requests"  # 429
    SERVER_ERROR = "server error"  # 500 and the rest of 5xx


class TransientError(StorageError):
    """A failure that may pass (the network, a busy server). Retry rules look at ``cause``, never at the text."""

    def __init__(self, text: str, cause: TransientCause) -> None:
        super().__init__(text, cause)  # both, so that it can be pickled
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[0])


class SlideChanged(StorageError):
    """The object changed while it was being read."""


class OutputError(StorageError):
    """The output cannot be written."""


class OutputTaken(OutputError):
    """Another run is working on the same output."""


class ModelError(WsiError):
    """A model file is missing, broken, or does not fit its card."""


class ModelNotLoaded(ModelError):
    """The model of a run cannot be loaded or made ready here: no slide can be done with it."""


class MissingPackage(WsiError):
    """An optional package is needed for this and is not installed."""


class PluginError(WsiError):
    """A package that extends wsi_mmm through entry points cannot be used."""


class ClusterError(WsiError):
    """The scheduler, its workers or another rank cannot do the work."""


class PlatformError(WsiError):
    """The EMPAIA platform refused something, or does not answer. ``status``: the HTTP status; 0 without an answer."""

    status = 0


class NotFinite(WsiError):
    """A loss or a gradient became NaN or infinite in training."""


class Cancelled(WsiError):
    """The user stopped the run; what is done stays, and a re-run resumes."""
