"""Every error that wsi_mmm raises on purpose.

::

    WsiError                     base: one readable line that names the fix
    ├── InputError               what the user gave cannot be used
    │   ├── SlideNotFound        nothing at that URI
    │   ├── NotASlide            the bytes are no slide that any reader knows
    │   ├── SlideDamaged         a slide, but truncated or inconsistent
    │   ├── MppUnknown           the slide does not say its resolution
    │   ├── ManifestError        a row or column of a manifest is wrong
    │   ├── AnnotationError      GeoJSON or XML that cannot be read as shapes
    │   ├── OptionError          an option, an argument or a combination of them is wrong
    │   ├── ConfigError          a settings or training file, or an environment variable, is wrong
    │   ├── RecipeError          an option or a combination of options is wrong (mpp, tile size, unknown task)
    │   └── JobError             a job of the EMPAIA platform cannot be done as asked; worded for a pathologist
    ├── StorageError             fetching or writing bytes failed
    │   ├── SlideChanged         the object changed while it was read
    │   └── OutputError          the output cannot be written (permission, disk full)
    ├── ModelError               a model file is missing, broken or does not fit
    ├── MissingPackage           an optional package is needed and not installed
    ├── ClusterError             the scheduler, its workers or another rank cannot do the work
    ├── PlatformError            the EMPAIA platform refused something, or does not answer
    ├── NotFinite                a loss or a gradient became NaN or infinite in training
    └── Cancelled                the user stopped the run; it can be resumed

Foreign exceptions are translated once, where the foreign library is called, with ``from``.
The text of an error never holds a secret: URIs are shown without credentials or query strings.
"""

from __future__ import annotations


class WsiError(Exception):
    """Base of the tree. ``str(error)`` is one line a user can act on."""


class InputError(WsiError):
    """What the user gave cannot be used."""


class SlideNotFound(InputError):
    """Nothing can be read at that URI."""


class NotASlide(InputError):
    """The bytes are no slide that any reader knows."""


class SlideDamaged(InputError):
    """A slide, but truncated or inconsistent with itself."""


class MppUnknown(InputError):
    """The slide does not say how many micrometres a pixel is."""


class ManifestError(InputError):
    """A row or a column of a manifest is wrong."""


class AnnotationError(InputError):
    """An annotation file cannot be read as shapes."""


class OptionError(InputError):
    """An option, an argument or a combination of them is wrong."""


class ConfigError(InputError):
    """A settings or training file, or an environment variable, is wrong."""


class RecipeError(InputError):
    """An option, or a combination of options, is wrong."""


class JobError(InputError):
    """A job of the EMPAIA platform cannot be done as it is asked for. The text is for a pathologist: no internals."""


class StorageError(WsiError):
    """Fetching or writing bytes failed. ``passing``: the same may succeed in a minute (the network, a busy server)."""

    passing = False


class SlideChanged(StorageError):
    """The object changed while it was being read."""


class OutputError(StorageError):
    """The output cannot be written."""


class OutputTaken(OutputError):
    """Another run is working on the same output."""


class ModelError(WsiError):
    """A model file is missing, broken, or does not fit its card."""


class MissingPackage(WsiError):
    """An optional package is needed for this and is not installed."""


class ClusterError(WsiError):
    """The scheduler, its workers or another rank cannot do the work."""


class PlatformError(WsiError):
    """The EMPAIA platform refused something, or does not answer. ``status``: of HTTP; 0: there was no answer."""

    status = 0


class NotFinite(WsiError):
    """A loss or a gradient became NaN or infinite in training."""


class Cancelled(WsiError):
    """The user stopped the run; what is done stays, and a re-run resumes."""
