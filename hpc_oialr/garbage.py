"""When Python looks for garbage while a program starts.

The imports of a run make 400,000 objects that stay. By default Python looks through them again and again while they
are made, and once more at the end: a sixth of the CPU time of a short run.
"""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()
# New objects until the next search; more than imports make. No other program chooses just this number.
_SELDOM = 1_000_003


def search_seldom() -> None:
    """Hardly search until :func:`search_as_usual`; for programs, not for libraries."""
    gc.set_threshold(_SELDOM, *_USUAL[1:])


def search_as_usual() -> None:
    """In a program that called :func:`search_seldom`: search again, but never through what exists by now.

    Call it before the model exists: ``gc.get_referrers``, by which lists of parameters are found, does not look there
    either.
    """
    if gc.get_threshold()[0] == _SELDOM:
        gc.freeze()
        gc.set_threshold(*_USUAL)
