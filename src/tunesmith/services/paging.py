"""Pages of a list, by the last item seen: stable while items are added and removed."""

import base64
import binascii
import hashlib
import json

from tunesmith.errors import InvalidArgument

LARGEST_PAGE = 1000

Key = tuple[float, str]
"""(create time, id) of an item: the order of every list."""


def page_size(asked: int, default: int, request: str) -> int:
    """Return how many items a page holds; too large a wish is clamped.

    Raises:
        InvalidArgument: The wish is negative.
    """
    if asked < 0:
        raise InvalidArgument.at([(f"{request}.page_size", f"must not be negative, not {asked}")])
    return min(asked or default, LARGEST_PAGE)


def encode(last: Key, *call: str) -> str:
    """Return the token for the page after `last`; it is good for this very call only."""
    text = json.dumps([*last, _digest(call)], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(token: str, *call: str, request: str) -> Key | None:
    """Return the key that the page starts after; None for the first page.

    Raises:
        InvalidArgument: The token is not one of ours, or comes from another call.
    """
    if not token:
        return None
    try:
        time, item, digest = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (ValueError, TypeError, binascii.Error):
        digest = None
    if digest != _digest(call):
        reason = "is not valid for this call: pass nextPageToken of the same list, with the same parameters"
        raise InvalidArgument.at([(f"{request}.page_token", reason)])
    return float(time), str(item)


def _digest(call: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(call).encode()).hexdigest()[:16]
