"""API keys: what limits them, and when they were used."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import TIMEOUT, Server
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.scopes import TUNING, TUNING_READONLY
from tunesmith.auth.verifiers import Verifier
from tunesmith.caller import Credentials
from tunesmith.errors import InvalidArgument
from tunesmith.store.database import Database

ADA = "ada@example.com"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    Accounts(database).create(ADA)
    yield database
    database.close()


@pytest.fixture
def keys(database: Database) -> ApiKeys:
    return ApiKeys(database)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)


def test_without_scopes_a_key_may_do_all(keys: ApiKeys) -> None:
    _, key = keys.create(ADA)
    assert Verifier(keys).verify(Credentials(api_key=key)).scopes is None


def test_scopes_limit_a_key(keys: ApiKeys) -> None:
    _, key = keys.create(ADA, scopes=["generative-language.tuning.readonly", TUNING, TUNING])
    assert Verifier(keys).verify(Credentials(api_key=key)).scopes == {TUNING, TUNING_READONLY}


@pytest.mark.parametrize("scope", ["tuning", "", "userinfo.email", "openid", "a b", "https://example.com/tuning"])
def test_a_scope_that_opens_nothing_makes_no_key(keys: ApiKeys, scope: str) -> None:
    with pytest.raises(InvalidArgument, match=r"generative-language\.tuning\.readonly"):
        keys.create(ADA, scopes=[scope])
    assert keys.list(ADA) == []


def test_an_expired_key_says_so(keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Google's words: https://github.com/google-gemini/gemini-cli/issues/4430 shows such an answer."""
    _, key = keys.create(ADA, seconds=60)
    verifier = Verifier(keys)
    assert verifier.verify(Credentials(api_key=key)).account == ADA
    later(monkeypatch, 60)
    with pytest.raises(InvalidArgument) as refusal:
        verifier.verify(Credentials(api_key=key))
    info, localized = refusal.value.details
    assert info.reason == "API_KEY_INVALID"
    assert localized.message == refusal.value.message == "API key expired. Please renew the API key."


def test_a_revoked_key_does_not_say_that_it_is_expired(keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    key_id, key = keys.create(ADA, seconds=60)
    keys.revoke(key_id)
    later(monkeypatch, 61)
    with pytest.raises(InvalidArgument, match="not valid"):
        Verifier(keys).verify(Credentials(api_key=key))


@pytest.mark.parametrize(("name", "seconds"), [("x" * 101, 60.0), ("two\nlines", 60.0), ("fine", 0.0)])
def test_what_cannot_be(keys: ApiKeys, name: str, seconds: float) -> None:
    with pytest.raises(InvalidArgument, match=r"name:|expires:"):
        keys.create(ADA, name, seconds)


def test_uses_are_written_once_a_minute(
    keys: ApiKeys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, key = keys.create(ADA)
    other_id, _ = keys.create(ADA)
    began = time.time()
    keys.start()
    for _ in range(3):
        keys.find(key)
    keys.stop()
    used = {found.id: found.last_use_time for found in keys.list(ADA)}
    assert used[other_id] is None
    assert used[key_id] is not None
    assert began <= used[key_id] <= time.time()

    second = ApiKeys(database)  # another server of the same database
    second.start()
    second.find(key)
    second.stop()
    assert keys.list(ADA)[0].last_use_time == used[key_id]

    later(monkeypatch, 61)
    keys.start()
    keys.find(key)
    keys.stop()
    again = keys.list(ADA)[0].last_use_time
    assert again is not None
    assert again >= used[key_id] + 60


def test_a_refused_key_is_not_used(keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    (key_id, revoked), (_, expired) = keys.create(ADA), keys.create(ADA, seconds=5)
    keys.revoke(key_id)
    later(monkeypatch, 6)
    keys.start()
    for key in (revoked, expired, "tsk_unknown"):
        with pytest.raises(InvalidArgument):
            Verifier(keys).verify(Credentials(api_key=key))
    keys.stop()
    assert [found.last_use_time for found in keys.list(ADA)] == [None, None]


def test_the_commands(server: Server) -> None:
    server.run("accounts", "create", ADA)
    options = ("--name", "nightly report", "--expires", "90d", "--scopes", "generative-language.tuning.readonly")
    key = server.run("api-key", "create", ADA, *options).strip()
    line = server.run("api-key", "list", ADA)
    ends = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 90 * 86_400))
    for shown in ("nightly report", "never used", f"expires {ends}", "only generative-language.tuning.readonly"):
        assert shown in line
    assert key not in line
    server.call("GET", "tunedModels", headers={"authorization": "", "x-goog-api-key": key})
    deadline = time.monotonic() + TIMEOUT
    while "last used 2" not in server.run("api-key", "list", ADA):
        assert time.monotonic() < deadline
    server.run("api-key", "revoke", line.split()[0])
    assert server.run("api-key", "list", ADA).strip().endswith("revoked")
    assert "--expires soon" in server.run("api-key", "create", ADA, "--expires", "soon", code=1)
    assert "generative-language.tuning" in server.run("api-key", "create", ADA, "--scopes", "all", code=1)
