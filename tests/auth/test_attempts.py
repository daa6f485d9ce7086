"""Wrong passwords are counted, however many come, from wherever, at once or over time."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from databases import each_database
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.attempts import OF_ACCOUNT, OF_ADDRESS, WINDOW, Attempts, network
from tunesmith.auth.sign_in import SignIn
from tunesmith.errors import PermissionDenied, ResourceExhausted
from tunesmith.store.database import Database

ADA, PASSWORD = "ada@example.com", "correct horse"


class CountedAccounts(Accounts):
    """Accounts that count the passwords that are looked at, and look at them without argon2's slowness."""

    looked_at = 0

    def with_password(self, email: str, password: str) -> str | None:
        self.looked_at += 1
        return email if password == PASSWORD else None


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    for database in each_database(request.param, tmp_path):
        Accounts(database).create(ADA)
        yield database


@pytest.fixture
def accounts(database: Database) -> CountedAccounts:
    return CountedAccounts(database)


@pytest.fixture
def door(database: Database, accounts: CountedAccounts) -> SignIn:
    return SignIn(database, accounts, Attempts(database))


def test_ten_thousand_wrong_passwords(door: SignIn, accounts: CountedAccounts) -> None:
    refused = 0
    for n in range(10_000):
        with pytest.raises((PermissionDenied, ResourceExhausted)) as refusal:
            door.sign_in(ADA, f"wrong {n}", f"10.0.{n >> 8 & 255}.{n & 255}")
        refused += refusal.type is ResourceExhausted
    assert accounts.looked_at == OF_ACCOUNT
    assert refused == 10_000 - OF_ACCOUNT


def test_many_accounts_from_one_address(door: SignIn, accounts: CountedAccounts) -> None:
    for n in range(200):
        with pytest.raises((PermissionDenied, ResourceExhausted)):
            door.sign_in(f"{n}@example.com", "password1", f"2001:db8::{n:x}")
    assert accounts.looked_at == OF_ADDRESS


def test_at_once(door: SignIn, accounts: CountedAccounts) -> None:
    def guess(n: int) -> None:
        with pytest.raises((PermissionDenied, ResourceExhausted)):
            door.sign_in(ADA, f"wrong {n}", f"10.0.0.{n}")

    threads = [threading.Thread(target=guess, args=(n,)) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accounts.looked_at == OF_ACCOUNT


def test_servers_of_one_database_count_together(database: Database, accounts: CountedAccounts) -> None:
    for n in range(30):
        with pytest.raises((PermissionDenied, ResourceExhausted)):
            SignIn(database, accounts, Attempts(database)).sign_in(ADA, f"wrong {n}", "10.0.0.1")
    assert accounts.looked_at == OF_ACCOUNT


def test_a_right_password_starts_the_count_anew(door: SignIn, accounts: CountedAccounts) -> None:
    for _ in range(3):
        for n in range(OF_ACCOUNT - 1):
            with pytest.raises(PermissionDenied):
                door.sign_in(ADA, f"wrong {n}", "10.0.0.1")
        assert door.account(door.sign_in(ADA, PASSWORD, "10.0.0.1")) == ADA


def test_waiting_helps(door: SignIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(OF_ACCOUNT):
        with pytest.raises(PermissionDenied):
            door.sign_in(ADA, f"wrong {n}", "10.0.0.1")
    now = time.time()
    with pytest.raises(ResourceExhausted, match="Wait 15 minutes"):
        door.sign_in(ADA, PASSWORD, "10.0.0.1")
    monkeypatch.setattr(time, "time", lambda: now + WINDOW + 1)
    assert door.account(door.sign_in(ADA, PASSWORD, "10.0.0.1")) == ADA


def test_what_counts_as_one_address() -> None:
    assert network("192.0.2.7") == "192.0.2.7"
    assert network("2001:db8::1") == network("2001:db8::ffff:2")
    assert network("2001:db8::1") != network("2001:db8:0:1::1")
    assert network("testclient") == "testclient"
