"""What signing in, and using what it gives, leaves in the audit record."""

import json
from typing import Any

from oauth_client import PASSWORD, Program
from people import Person
from servers import Server


def recorded(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.run("audit", "--json", "--limit", "0").splitlines()]


def told(records: list[dict[str, Any]], account: str) -> list[tuple[str, str, str]]:
    return [(one["action"], one["resource"], one["outcome"]) for one in records if one["account"] == account]


def test_a_sign_in_and_what_it_gave(server: Server) -> None:
    program = Program(server, "ada@example.com")
    with program.browser() as browser:
        browser.sign_in(browser.open(program.address()), program.email, "wrong horse")
        browser.sign_in(browser.open(program.address()), "correct horse", PASSWORD)
        code = browser.allow(program.address(), program.email, PASSWORD).told["code"]
    given = program.redeem(code)
    program.refreshed(given["refresh_token"])
    program.post("/revoke", token=given["refresh_token"])
    program.http.close()
    records = recorded(server)
    account, client = "accounts/ada@example.com", f"clients/{program.id}"
    assert told(records, program.email) == [
        ("SignIn", "", "PERMISSION_DENIED"),
        ("SignIn", account, "OK"),
        ("AllowClient", client, "OK"),
        ("IssueToken", account, "OK"),
        ("IssueToken", account, "OK"),
        ("RevokeToken", account, "OK"),
    ]
    assert told(records, "") == [("SignIn", "", "PERMISSION_DENIED")]  # whoever typed the password there
    mine = [one for one in records if one["account"] == program.email]
    assert {one["address"] for one in mine} == {"127.0.0.1"}
    assert [one["credential"] for one in mine] == ["password"] * 2 + ["browser session"] + ["OAuth client"] * 3
    assert "correct horse" not in json.dumps(records)


def test_a_key_and_a_token_in_use(server: Server) -> None:
    bob = Person(server, "bob@example.com")
    for _ in range(3):
        bob.call("GET", "tunedModels")
    (key,) = [line.split()[0] for line in server.run("api-key", "list", bob.email).splitlines()]
    assert told(recorded(server), bob.email) == [("UseApiKey", f"apiKeys/{key}", "OK")]
    bob.call("DELETE", "tunedModels/nowhere", code=403)
    server.call("DELETE", "tunedModels/nowhere", code=403)
    *_, keys, tokens = recorded(server)
    assert keys["credential"] == f"API key {key}"
    assert tokens["credential"] == "access token"


def test_a_command_names_the_key_that_it_made(server: Server) -> None:
    server.run("accounts", "create", "eve@example.com")
    server.run("api-key", "create", "eve@example.com")
    server.run("token", "eve@example.com")
    token, key = recorded(server)[-1], recorded(server)[-2]
    listed = server.run("api-key", "list", "eve@example.com").split()[0]
    assert (key["action"], key["resource"]) == ("CreateApiKey", f"apiKeys/{listed}")
    assert (token["action"], token["account"]) == ("IssueToken", "administrator")
