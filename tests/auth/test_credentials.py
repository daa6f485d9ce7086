"""Accounts, tokens and keys: what they open, and what is stored of them."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.tokens import AccessTokens
from tunesmith.auth.verifiers import OwnTokens, Verifier
from tunesmith.caller import Credentials
from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from tunesmith.store.database import Database

ADA = "ada@example.com"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    Accounts(database).create(ADA, "secret password")
    yield database
    database.close()


@pytest.fixture
def verifier(database: Database) -> Verifier:
    return Verifier(ApiKeys(database), OwnTokens(AccessTokens(database)))


def test_a_token_names_its_account_and_scopes(database: Database, verifier: Verifier) -> None:
    token = AccessTokens(database).create("Ada@Example.com", ["a", "b"], seconds=60)
    caller = verifier.verify(Credentials(bearer=token, project="p"))
    assert (caller.account, caller.scopes, caller.project) == (ADA, {"a", "b"}, "p")


def test_an_expired_token_is_none(database: Database, verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    token = AccessTokens(database).create(ADA, [], seconds=60)
    assert verifier.verify(Credentials(bearer=token)).account == ADA
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(Unauthenticated, match="invalid authentication credentials"):
        verifier.verify(Credentials(bearer=token))


def test_a_key_until_it_is_revoked(database: Database, verifier: Verifier) -> None:
    keys = ApiKeys(database)
    key_id, key = keys.create(ADA)
    assert verifier.verify(Credentials(api_key=key)).account == ADA
    assert [(found.id, found.revoked) for found in keys.list(ADA)] == [(key_id, False)]
    keys.revoke(key_id)
    with pytest.raises(InvalidArgument, match="API key not valid") as refusal:
        verifier.verify(Credentials(api_key=key))
    assert [detail.DESCRIPTOR.name for detail in refusal.value.details] == ["ErrorInfo", "LocalizedMessage"]


def test_a_disabled_account_opens_nothing(database: Database, verifier: Verifier) -> None:
    token, (_, key) = AccessTokens(database).create(ADA, [], 60), ApiKeys(database).create(ADA)
    Accounts(database).disable(ADA)
    with pytest.raises(Unauthenticated):
        verifier.verify(Credentials(bearer=token))
    with pytest.raises(InvalidArgument):
        verifier.verify(Credentials(api_key=key))


def test_a_bearer_token_wins_over_a_dummy_key(database: Database, verifier: Verifier) -> None:
    token = AccessTokens(database).create(ADA, [], 60)
    assert verifier.verify(Credentials(bearer=token, api_key="dummy")).account == ADA
    _, key = ApiKeys(database).create(ADA)
    with pytest.raises(Unauthenticated):  # and a bad one is not saved by a good key
        verifier.verify(Credentials(bearer="bad", api_key=key))


def test_nothing_at_all(verifier: Verifier) -> None:
    with pytest.raises(PermissionDenied, match="unregistered callers"):
        verifier.verify(Credentials())


def test_no_secret_is_stored(database: Database, tmp_path: Path) -> None:
    secrets = [AccessTokens(database).create(ADA, [], 60), ApiKeys(database).create(ADA)[1], "secret password"]
    database.close()
    with sqlite3.connect(tmp_path / "test.db") as connection:
        dump = "\n".join(connection.iterdump())
    assert ADA in dump
    assert not [secret for secret in secrets if secret in dump]


def test_accounts(database: Database) -> None:
    accounts = Accounts(database)
    accounts.create("bob@example.com")
    assert [account.email for account in accounts.list()] == [ADA, "bob@example.com"]
    with pytest.raises(AlreadyExists, match=r"bob@example\.com already"):
        accounts.create("BOB@example.com")
    with pytest.raises(InvalidArgument, match="not an e-mail address"):
        accounts.create("bob")
    with pytest.raises(NotFound):
        accounts.disable("eve@example.com")
    with pytest.raises(NotFound, match=r"tunesmith accounts create eve@example\.com"):
        AccessTokens(database).create("eve@example.com", [], 60)
