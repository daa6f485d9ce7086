"""Pages of a list, by the last item seen: stable while items are added and removed."""

import base64
import hashlib
import hmac
import json
import secrets

from sqlalchemy.exc import IntegrityError

from tunesmith.errors import InvalidArgument
from tunesmith.store.database import Database
from tunesmith.store.tables import Secret

LARGEST_PAGE = 1000
_SIGNATURE_BYTES = 16

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


class PageTokens:
    """Tokens that only servers of this database can make, each good for one call only."""

    def __init__(self, database: Database) -> None:
        self._key = _key(database)

    def encode(self, last: Key, *call: str) -> str:
        """Return the token for the page after `last`.

        Args:
            last: The last item of the page before.
            call: The list, its caller and the parameters that must stay the same from page to page.
        """
        item = json.dumps(last, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._sign(item, call) + item).decode().rstrip("=")

    def decode(self, token: str, *call: str, request: str) -> Key | None:
        """Return the key that the page starts after; None for the first page.

        Raises:
            InvalidArgument: The token is not one of ours, or comes from another call.
        """
        if not token:
            return None
        try:
            signed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except ValueError:
            signed = b""
        signature, item = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(item, call)):
            reason = "is not valid for this call: pass nextPageToken of the same list, with the same parameters"
            raise InvalidArgument.at([(f"{request}.page_token", reason)])
        time, item_id = json.loads(item)
        return float(time), str(item_id)

    def _sign(self, item: bytes, call: tuple[str, ...]) -> bytes:
        signed = json.dumps([item.decode("latin-1"), *call]).encode()
        return hmac.digest(self._key, signed, hashlib.sha256)[:_SIGNATURE_BYTES]


def _key(database: Database) -> bytes:
    """Return the key that signs tokens; servers that start together agree on the first one stored."""
    name = "page tokens"
    with database.read() as session:
        if found := session.get(Secret, name):
            return found.value
    try:
        with database.write() as session:
            session.add(Secret(name=name, value=secrets.token_bytes(32)))
    except IntegrityError:
        pass
    with database.read() as session:
        return session.get_one(Secret, name).value
