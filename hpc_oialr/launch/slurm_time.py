"""Time limits as Slurm writes them."""

from __future__ import annotations

import re

FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
_FORM = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def seconds_of(text: str) -> int | None:
    """Seconds of a time limit; None if it has none of Slurm's forms.

    Examples
    --------
    >>> [seconds_of(text) for text in ("90", "1:30", "04:00:00", "2-12", "1-0:30", "1-0:30:15")]
    [5400, 90, 14400, 216000, 88200, 88215]
    >>> seconds_of("4 hours")
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        return None
    parts = [int(part) for part in match.groups()[1:] if part is not None]
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return 86_400 * int(match["days"] or 0) + sum(
        part * unit for part, unit in zip(parts, units, strict=False)
    )


def limit_of(seconds: int) -> str:
    """A time limit as ``days-hours:minutes:seconds``, without the days where there are none.

    Examples
    --------
    >>> limit_of(14400), limit_of(216000)
    ('04:00:00', '2-12:00:00')
    """
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{days}-{clock}" if days else clock
