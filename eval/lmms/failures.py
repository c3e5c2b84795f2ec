"""A failure ends the run: lmms-eval prints exceptions, goes on, and may score a crash as an empty answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lmms_eval.api.instance import Instance


class RunFailed(BaseException):
    """The evaluation cannot go on, or would be worth nothing.

    No `Exception`, since the command line of lmms-eval prints those and exits with code 0.
    """


@contextmanager
def named(requests: Sequence[Instance]) -> Iterator[None]:
    """Makes of what goes wrong with some requests a `RunFailed` that names their documents."""
    try:
        yield
    except Exception as error:
        where = ", ".join(f"{request.task_name} document {request.doc_id}" for request in requests)
        raise RunFailed(f"{where}: {type(error).__name__}: {error}") from error
