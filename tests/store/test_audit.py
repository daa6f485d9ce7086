"""The audit record: written with the change, and never changed itself."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from databases import each_database
from tunesmith.auth.accounts import Accounts
from tunesmith.caller import Caller
from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from tunesmith.store import audit as audit_module
from tunesmith.store.audit import Audit, administrator, note, request_from, tell, tell_refused_sign_in
from tunesmith.store.database import Database
from tunesmith.store.tables import Account

ADA = Caller("ada@x", project="p", credential="API key 12ab", address="192.0.2.1")
DAY = 86_400.0


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    yield from each_database(request.param, tmp_path)


@pytest.fixture
def audit(database: Database) -> Iterator[Audit]:
    audit = Audit(database)
    yield audit
    audit.close()


def told(audit: Audit) -> list[tuple[str, str, str, str]]:
    return [(row.account, row.action, row.resource, row.outcome) for row in audit.newest(0)]


def test_a_change_and_its_record_are_one_transaction(database: Database, audit: Audit) -> None:
    def end_before_the_commit() -> None:
        with audit.change(ADA, "CreateAccount"), database.write() as session:
            session.add(Account(email="lost@x", create_time=0.0))
            session.flush()
            raise ZeroDivisionError

    def end_after_the_commit() -> None:
        with audit.change(ADA, "CreateAccount"):
            with database.write() as session:
                note("accounts/kept@x", "a word")
                session.add(Account(email="kept@x", create_time=0.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        end_before_the_commit()
    assert told(audit) == []
    with pytest.raises(ZeroDivisionError):
        end_after_the_commit()
    (row,) = audit.newest(0)
    assert (row.account, row.resource, row.detail, row.outcome) == ("ada@x", "accounts/kept@x", "a word", "OK")
    assert (row.credential, row.address, row.project) == ("API key 12ab", "192.0.2.1", "p")
    assert abs(row.time - time.time()) < 60


def test_several_transactions_of_a_change_are_one_record(database: Database, audit: Audit) -> None:
    with audit.change(ADA, "CreateAccount", "accounts/a@x"):
        Accounts(database).create("a@x")
        Accounts(database).create("b@x")
    Accounts(database).create("c@x")  # nobody said who does this
    assert told(audit) == [("ada@x", "CreateAccount", "accounts/a@x", "OK")]


def test_a_change_that_writes_nothing_is_recorded_too(audit: Audit) -> None:
    with audit.change(ADA, "CancelOperation", "tunedModels/x/operations/y"):
        pass
    assert told(audit) == [("ada@x", "CancelOperation", "tunedModels/x/operations/y", "OK")]


@pytest.mark.parametrize("error", [NotFound("no"), AlreadyExists("no")])
def test_a_refusal_is_recorded(audit: Audit, error: NotFound | AlreadyExists) -> None:
    with pytest.raises(type(error)), audit.change(ADA, "DeleteTunedModel", "tunedModels/x"):
        raise error
    assert told(audit) == [("ada@x", "DeleteTunedModel", "tunedModels/x", error.status)]


def test_what_fails_after_it_took_effect_is_recorded_as_both(database: Database, audit: Audit) -> None:
    def fail_half_way() -> None:
        with audit.change(ADA, "CreateAccount", "accounts/a@x"):
            Accounts(database).create("a@x")
            raise NotFound("a second thing")

    with pytest.raises(NotFound):
        fail_half_way()
    assert [outcome for *_, outcome in told(audit)] == ["OK", "NOT_FOUND"]


@pytest.mark.parametrize("error", [InvalidArgument("no"), ResourceExhausted("no")])
def test_a_caller_cannot_fill_the_record_with_requests_that_try_nothing(audit: Audit, error: Exception) -> None:
    with pytest.raises(type(error)), audit.change(ADA, "CreateTunedModel"):
        raise error
    assert told(audit) == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET account = 'eve@x'",
        "UPDATE audit SET prunes_before = 0",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE account = 'ada@x'",
        "INSERT OR REPLACE INTO audit SELECT id, time, 'eve@x', credential, action, resource, outcome, detail,"
        " address, project, prunes_before FROM audit",
        "INSERT INTO audit SELECT id + 1, time, '', '', '', '', '', '', '', NULL, time + 1e9 FROM audit",
        "TRUNCATE audit",
    ],
)
def test_the_database_refuses_to_change_the_record(database: Database, audit: Audit, statement: str) -> None:
    audit.record(ADA, "SignIn")
    with pytest.raises(DBAPIError), database.write() as session:
        session.execute(text(statement))
    assert told(audit) == [("ada@x", "SignIn", "", "OK")]


def test_pruning_removes_what_is_older_and_is_itself_on_record(
    database: Database, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for age in (40, 35, 5):
        monkeypatch.setattr(audit_module.time, "time", lambda age=age: now - age * DAY)
        audit.record(ADA, "SignIn", f"{age}")
    monkeypatch.undo()
    assert audit.prune(administrator(), now - 30 * DAY) == 2
    ((_, first, age, _), (who, action, _, _)) = told(audit)
    assert (first, age, who, action) == ("SignIn", "5", "administrator", "PruneAudit")
    with pytest.raises(DBAPIError), database.write() as session:
        session.execute(text("DELETE FROM audit"))  # the permission went no further
    with pytest.raises(InvalidArgument):
        audit.prune(administrator(), now + DAY)
    assert len(told(audit)) == 2


def test_what_is_shown(audit: Audit) -> None:
    start = time.time()
    for number, name in enumerate(["x", "x/permissions/p", "xy", "x_"]):
        audit.record(Caller(f"{number}@x"), "UpdateTunedModel", f"tunedModels/{name}")
    assert [row.account for row in audit.newest(0, model="x")] == ["0@x", "1@x"]
    assert [row.account for row in audit.newest(0, model="tunedModels/x_")] == ["3@x"]
    assert [row.resource for row in audit.newest(0, account="2@X")] == ["tunedModels/xy"]
    assert [row.account for row in audit.newest(2)] == ["2@x", "3@x"]
    assert len(audit.newest(0, since=start)) == 4
    assert audit.newest(0, since=time.time() + 1) == []


def test_an_address_that_no_account_has_is_left_out(database: Database, audit: Audit) -> None:
    Accounts(database).create("ada@x")
    with request_from("192.0.2.9", "password"), database.write() as session:
        tell_refused_sign_in(session, " ADA@x", "PERMISSION_DENIED")
        tell_refused_sign_in(session, "hunter2", "PERMISSION_DENIED")
        tell_refused_sign_in(session, "ada@x", "RESOURCE_EXHAUSTED")
    rows = audit.newest(0)
    assert [(row.account, row.credential, row.address) for row in rows] == [
        ("ada@x", "password", "192.0.2.9"),
        ("", "password", "192.0.2.9"),
    ]


def test_what_sign_in_tells(database: Database, audit: Audit) -> None:
    with request_from("192.0.2.9", "password"), database.write() as session:
        tell(session, "ada@x", "SignIn", "accounts/ada@x")
    with database.write() as session:
        tell(session, "ada@x", "IssueToken", "accounts/ada@x")
    with audit.change(administrator(), "IssueToken", "accounts/bob@x"), database.write() as session:
        tell(session, "bob@x", "IssueToken", "accounts/bob@x", "by a command")  # one record, not two
    rows = audit.newest(0)
    assert [(row.account, row.action, row.address) for row in rows[:2]] == [
        ("ada@x", "SignIn", "192.0.2.9"),
        ("ada@x", "IssueToken", ""),
    ]
    assert [(row.account, row.detail) for row in rows[2:]] == [("administrator", "by a command")]


def test_nothing_in_the_record_speaks_to_a_terminal(audit: Audit) -> None:
    audit.record(ADA, "DeleteTunedModel", "tunedModels/\x1b[2J\x00" + "x" * 9999)
    ((_, _, resource, _),) = told(audit)
    assert resource.isprintable()
    assert len(resource) == audit_module.LONGEST


def test_a_key_in_use_is_recorded_once_an_hour(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        audit.used(ADA)
    audit.used(Caller("ada@x", credential="API key 34cd"))
    now = time.monotonic()
    monkeypatch.setattr(audit_module.time, "monotonic", lambda: now + 3601)
    audit.used(ADA)
    audit.close()
    assert [row[2] for row in told(audit)] == ["apiKeys/12ab", "apiKeys/34cd", "apiKeys/12ab"]
