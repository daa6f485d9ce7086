"""Times as rows and messages hold them."""

import time

from tunesmith import protos


def to_timestamp(nanoseconds: int) -> protos.Timestamp:
    """Return nanoseconds since the epoch as a protobuf Timestamp."""
    seconds, nanos = divmod(nanoseconds, 1_000_000_000)
    return protos.Timestamp(seconds=seconds, nanos=nanos)


def now() -> protos.Timestamp:
    """Return the present, in nanoseconds, as Google's startTime and computeTime are given."""
    return to_timestamp(time.time_ns())


def now_in_microseconds() -> protos.Timestamp:
    """Return the present, in microseconds, as Google's createTime and updateTime are given."""
    return to_timestamp(time.time_ns() // 1000 * 1000)
