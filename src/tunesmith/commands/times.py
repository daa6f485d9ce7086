"""Times and spans of time as people type them."""

import re
import time
from datetime import datetime

DAY = 86_400  # seconds


def seconds_in(ttl: str, option: str = "--ttl") -> float:
    """Return a span of time, such as 90s, 30m, 1h or 7d, in seconds.

    Raises:
        ValueError: It is none; the message names the option.
    """
    match = re.fullmatch(r"(\d+)([smhd])", ttl)
    if not match:
        raise ValueError(f"{option} {ttl}: give a number and s, m, h or d, such as 1h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": DAY}[match[2]]


def moment(text: str, option: str) -> float:
    """Return a date, a time or how long ago it was, as seconds since 1970; a time without a zone is local.

    Raises:
        ValueError: It is none of these; the message names the option.
    """
    if re.fullmatch(r"\d+[smhd]", text):
        return time.time() - seconds_in(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(f"{option} {text}: give a date such as 2026-01-31, or how long ago as 24h") from None
