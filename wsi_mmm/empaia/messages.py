"""Errors in words for a pathologist: what happened and what helps, nothing of how the app is built."""

from __future__ import annotations

from wsi_mmm.errors import (
    Cancelled,
    ClusterError,
    ConfigError,
    JobError,
    MissingPackage,
    ModelError,
    MppUnknown,
    NotASlide,
    NotFound,
    OptionError,
    OutputError,
    PlatformError,
    SlideDamaged,
    SlideNotFound,
    StorageError,
)

STOPPED = "The analysis was stopped before it was finished."
INCOMPLETE = "The slide could not be read completely, so there are no results; please try again, or check the slide."
_TELL = "please tell whoever runs it."

_WORDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (Cancelled, STOPPED),
    (MppUnknown, "The slide does not say its resolution (the size of a pixel), so it cannot be analysed."),
    ((SlideNotFound, NotFound), "The slide cannot be found any more."),
    ((NotASlide, SlideDamaged), "The slide is damaged, or of a kind that cannot be read."),
    (OutputError, f"The app has no room to write to, or its results cannot be sent; {_TELL}"),
    (StorageError, "The slide could not be fetched from the platform; please try again later."),
    (ClusterError, "The computers that do the work cannot be reached; please try again later."),
    ((ModelError, MissingPackage, OptionError, ConfigError), f"The app is not set up correctly; {_TELL}"),
)


def message_of(error: BaseException) -> str:
    """One or two sentences of at most 255 characters."""
    if isinstance(error, JobError):
        return str(error)
    if isinstance(error, PlatformError):
        return _platform_message(error.status)
    return next((words for kind, words in _WORDS if isinstance(error, kind)), f"The app failed unexpectedly; {_TELL}")


def _platform_message(status: int) -> str:
    if status in (401, 403):
        return "The platform did not let the app in (any more); please start the job again."
    if status == 0 or status == 429 or status >= 500:
        return "The platform could not be reached, or was too busy; please try again later."
    return f"The platform did not take what the app sent; {_TELL}"
