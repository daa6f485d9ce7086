"""The public keys of an OpenID Connect issuer: found by discovery, kept, fetched again when they change."""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpx2
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

from tunesmith.config import fetchable
from tunesmith.errors import Unavailable

FRESH = 600.0  # seconds after which keys are fetched again
STALE = 6 * 3600.0  # seconds for which keys are good while the issuer cannot be reached
RETRY = 10.0  # the least seconds between two fetches, however many tokens have unknown keys
TIMEOUT = 5.0  # seconds for each step of a request
DEADLINE = 5.0  # seconds for a whole document
LARGEST = 256 << 10  # bytes of a document
MOST_KEYS = 100
SMALLEST_RSA = 2048  # bits

log = logging.getLogger(__name__)


class IssuerKeys:
    """The keys of one issuer, safe to share between threads; nothing is fetched before a key is asked for.

    Args:
        url: The issuer, as it calls itself.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: list[RSAKey | ECKey] = []
        self._fetched = self._tried = -math.inf
        self._fetching = threading.Lock()

    def find(self, algorithm: str, key_id: str | None) -> RSAKey | ECKey | None:
        """Return the key with which a token says that it is signed; it may take a request to the issuer.

        Args:
            algorithm: The token's `alg`.
            key_id: The token's `kid`; without one the key is the only one for the algorithm, or none.

        Raises:
            Unavailable: The issuer cannot be reached, and was not for long.
        """
        asked = time.monotonic()
        if asked - self._fetched >= FRESH:
            self._refresh(asked, wait=not self._good_keys())
        found = _pick(self._good_keys(), algorithm, key_id)
        if found is None:  # the issuer may have a new one
            self._refresh(asked, wait=True)
            found = _pick(self._good_keys(), algorithm, key_id)
        if found is None and not self._good_keys():
            raise Unavailable(f"{self._url} cannot be reached to verify a token that it signed. Please retry.")
        return found

    def _good_keys(self) -> list[RSAKey | ECKey]:
        return self._keys if time.monotonic() - self._fetched < STALE else []

    def _refresh(self, asked: float, *, wait: bool) -> None:
        """Fetch the keys, unless it was just done or tried; those who need not wait let another thread do it."""
        if not self._fetching.acquire(blocking=wait):
            return
        try:
            if self._fetched < asked and time.monotonic() - self._tried >= RETRY:
                self._fetch()
        finally:
            self._fetching.release()

    def _fetch(self) -> None:
        try:
            self._keys, self._fetched = fetch_keys(self._url), time.monotonic()
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RecursionError) as error:
            log.warning("cannot fetch the keys of %s: %s", self._url, error or type(error).__name__)
        self._tried = time.monotonic()


def fetch_keys(issuer: str) -> list[RSAKey | ECKey]:
    """Return the keys that an issuer publishes for signatures.

    Raises:
        httpx2.HTTPError: It cannot be reached.
        ValueError: What it answers is not what an issuer does.
    """
    with httpx2.Client(timeout=TIMEOUT, follow_redirects=False) as client:
        found = _get(client, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != issuer:
            raise ValueError(f"it calls itself {found.get('issuer')!r}; its url must be the same to the letter")
        address = found.get("jwks_uri")
        if not isinstance(address, str) or not fetchable(address):
            raise ValueError(f"its jwks_uri is {address!r}, which is not an https address")
        published = _get(client, address).get("keys")
    keys = [*_usable(published if isinstance(published, list) else [])]
    if not keys:
        raise ValueError(f"{address} has no RSA or EC key for signatures")
    return keys


def _get(client: httpx2.Client, address: str) -> dict[str, Any]:
    """Return a JSON object from the issuer; it has a limited size, and a limited time to arrive."""
    deadline, body = time.monotonic() + DEADLINE, bytearray()
    with client.stream("GET", address, headers={"accept-encoding": "identity"}) as response:
        if response.status_code != 200:
            raise ValueError(f"{address} answered {response.status_code}")
        for part in response.iter_raw():  # as it came: what is packed is not unpacked
            body += part
            if len(body) > LARGEST or time.monotonic() > deadline:
                raise ValueError(f"{address} answers with too much, or too slowly")
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError(f"{address} is not a JSON object")
    return document


def _usable(published: list[Any]) -> Iterable[RSAKey | ECKey]:
    """The keys of a JWK Set that can verify a token; an `oct` key, a shared secret, is none of them."""
    for entry in published[:MOST_KEYS]:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
            continue
        public = {name: value for name, value in entry.items() if name in _PUBLIC}
        try:
            if entry.get("kty") == "RSA" and _bits(entry) >= SMALLEST_RSA:
                yield RSAKey.import_key(public)
            elif entry.get("kty") == "EC":
                yield ECKey.import_key(public)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            log.warning("an issuer's key %r is of no use: %s", entry.get("kid"), error)


_PUBLIC = {"kty", "kid", "alg", "use", "n", "e", "crv", "x", "y"}


def _bits(entry: dict[str, Any]) -> int:
    return len(str(entry.get("n"))) * 6  # of base64url, without its padding


def _pick(keys: Iterable[RSAKey | ECKey], algorithm: str, key_id: str | None) -> RSAKey | ECKey | None:
    kind = "EC" if algorithm.startswith("ES") else "RSA"
    fit = [key for key in keys if key.key_type == kind and key.get("alg", algorithm) == algorithm]
    if key_id is not None:
        fit = [key for key in fit if key.get("kid") == key_id]
    return fit[0] if len(fit) == 1 else None
