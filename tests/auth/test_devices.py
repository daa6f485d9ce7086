"""Sign-ins that are approved in another browser, and `tunesmith login` in both ways."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from browser import Browser, Page
from oauth_client import PASSWORD, TUTORIAL, Program, database_of
from servers import TIMEOUT, Server, command, run
from tunesmith.store.tables import DeviceCode

ADA = "ada@example.com"
GRANT = "urn:ietf:params:oauth:grant-type:device_code"
WAIT = 120  # seconds


@pytest.fixture
def program(server: Server) -> Iterator[Program]:
    program = Program(server, ADA)
    yield program
    program.http.close()


def ask(program: Program) -> dict[str, Any]:
    return program.post("/device/code", scope=TUTORIAL)


def poll(program: Program, asked: dict[str, Any], status: int = 200) -> dict[str, Any]:
    return program.post("/token", status, grant_type=GRANT, device_code=asked["device_code"])


def rested(server: Server) -> None:
    """As if the device had kept its interval."""
    database = database_of(server)
    with database.write() as session:
        session.execute(update(DeviceCode).values(poll_time=0.0))
    database.close()


def decide(browser: Browser, code: str, decision: str = "allow") -> Page:
    page = browser.open("/device")
    if any(form.action == "/signin" for form in page.forms):
        page = browser.sign_in(page, ADA, PASSWORD)
    page = browser.submit(page.form("/device"), code=code)
    return browser.submit(page.form("/device"), decision=decision) if page.status == 200 else page


def test_a_device_is_let_in_once(server: Server, program: Program) -> None:
    asked = ask(program)
    assert asked["verification_uri"] == f"{server.url}/device"
    assert re.fullmatch("[BCDFGHJKLMNPQRSTVWXZ]{4}-[BCDFGHJKLMNPQRSTVWXZ]{4}", asked["user_code"])
    assert poll(program, asked, 400)["error"] == "authorization_pending"
    assert poll(program, asked, 400)["error"] == "slow_down"
    with program.browser() as browser:
        typed = asked["user_code"].lower().replace("-", " ")
        assert "Connected" in decide(browser, typed).text
        assert "no such code" in decide(browser, asked["user_code"]).text  # it is decided
    given = poll(program, asked)
    assert program.opens(given["access_token"])
    assert program.refreshed(given["refresh_token"])["access_token"]
    assert poll(program, asked, 400)["error"] == "invalid_request"


def test_deny_and_others(server: Server, program: Program) -> None:
    asked = ask(program)
    with program.browser() as browser:
        assert "denied" in decide(browser, asked["user_code"], "deny").text
    assert poll(program, asked, 400)["error"] == "access_denied"
    assert program.post("/device/code", 400)["error"] == "invalid_scope"
    assert program.http.post("/device/code", data={"client_id": "nobody", "scope": TUTORIAL}).status_code == 400
    other = Program(server, ADA)
    assert poll(other, ask(program), 400)["error"] == "unauthorized_client"
    other.http.close()


def test_too_late(server: Server, program: Program) -> None:
    asked = ask(program)
    database = database_of(server)
    with database.write() as session:
        session.execute(update(DeviceCode).values(expire_time=time.time() - 1))
    database.close()
    assert poll(program, asked, 400)["error"] == "expired_token"
    with program.browser() as browser:
        assert decide(browser, asked["user_code"]).status == 404


def test_guessing_codes(server: Server, program: Program) -> None:
    guesser = Program(server, "guesser@example.com")
    with guesser.browser() as browser:
        page = browser.sign_in(browser.open("/device"), guesser.email, PASSWORD)
        answers = [browser.submit(page.form("/device"), code="BBBB-BBBB").status for _ in range(12)]
        assert answers == [404] * 10 + [429] * 2
        assert browser.submit(page.form("/device"), code=ask(program)["user_code"]).status == 429
    guesser.http.close()


class Machine:
    """A machine without the server's data dir, on which somebody uses the commands."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.config = server, folder / "config"
        self.environment = {
            **server.environment,
            "XDG_CONFIG_HOME": str(self.config),
            "TUNESMITH_DATA_DIR": str(folder / "absent"),
            "PERSON_EMAIL": ADA,
            "PERSON_PASSWORD": PASSWORD,
            "BROWSER": f"{sys.executable} {Path(__file__).parents[1] / 'person.py'} %s &",
        }
        self.file = self.config / "tunesmith" / "credentials.json"

    def run(self, *arguments: str, code: int = 0) -> str:
        done = run(arguments, self.environment, timeout=TIMEOUT, cwd=self.config.parent)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def machine(server: Server, program: Program, tmp_path: Path) -> Machine:
    return Machine(server, tmp_path)


@pytest.fixture
def approve(program: Program) -> Iterator[Callable[[str], Page]]:
    with program.browser() as browser:
        yield lambda code: decide(browser, code)


def test_login_in_a_browser(server: Server, machine: Machine, program: Program) -> None:
    assert "Signed in" in machine.run("login", "--url", server.url)
    assert machine.file.stat().st_mode & 0o777 == 0o600
    assert "No tuned models yet" in machine.run("models")  # at the server it signed in to
    # An old token is replaced, before its time as well as when the server refuses it.
    text = machine.file.read_text()
    expired = re.sub(r'"expire_time": [0-9.]+', '"expire_time": 1.0', text)
    machine.file.write_text(expired)
    machine.run("models")
    kept = machine.file.read_text()
    machine.file.write_text(re.sub(r'"access_token": "[^"]+"', '"access_token": "tst.old"', kept))
    machine.run("models")
    assert "tst.old" not in machine.file.read_text()
    with program.browser() as browser:
        page = browser.sign_in(browser.open("/account"), ADA, PASSWORD)
        assert "The tunesmith command" in page.text
    assert "Signed out" in machine.run("logout")
    assert "tunesmith login" in machine.run("models", "--url", server.url, code=1)
    machine.file.write_text(expired)  # a copy that somebody kept is worth nothing
    assert "signed out" in machine.run("models", code=1)


def test_login_with_a_code(server: Server, machine: Machine, approve: Callable[[str], Page]) -> None:
    process = subprocess.Popen(
        command("login", "--device", "--url", server.url),
        env=machine.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = ""
    while not (code := re.search("[A-Z]{4}-[A-Z]{4}", printed)):
        printed += process.stdout.readline()
    assert "Connected" in approve(code[0]).text
    said, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert f"Signed in to {server.url}" in said
    machine.run("models")


def test_login_where_one_says_no(server: Server, machine: Machine) -> None:
    machine.environment["PERSON_DECISION"] = "deny"
    assert "access_denied" in machine.run("login", "--url", server.url, code=1)
    assert not machine.file.exists()
    assert "No Tunesmith answers" in machine.run("login", "--device", "--url", "http://127.0.0.1:1", code=1)
