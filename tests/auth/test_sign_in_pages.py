"""The pages as browsers and attackers meet them: forms, cookies, where one is sent, what is told to whom."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from browser import Browser, Page
from oauth_client import LOOPBACK, PASSWORD, Program, database_of
from servers import Server
from tunesmith.auth.accounts import Accounts

ADA = "ada@example.com"


@pytest.fixture
def program(server: Server) -> Iterator[Program]:
    program = Program(server, ADA)
    yield program
    program.http.close()


@pytest.fixture
def browser(program: Program) -> Iterator[Browser]:
    with program.browser() as browser:
        yield browser


def signed_in(browser: Browser) -> Page:
    return browser.sign_in(browser.open("/signin"), ADA, PASSWORD)


def test_signing_in_and_out(browser: Browser) -> None:
    page = browser.open("/signin")
    before = browser.http.cookies["tunesmith"]
    page = browser.sign_in(page, ADA, PASSWORD)
    assert page.status == 200
    assert ADA in page.text
    after = browser.http.cookies["tunesmith"]
    assert after != before  # a cookie that somebody planted stands for nobody
    assert browser.open("/signin").location == "/account"
    assert "Signed out" in browser.submit(page.form("/signout"), where="").text
    browser.http.cookies.set("tunesmith", after, domain="127.0.0.1")
    assert "Password" in browser.open("/account").text  # the cookie is worth nothing afterwards


def test_cookies_are_kept_from_scripts_and_other_sites(browser: Browser) -> None:
    for answer in (browser.open("/signin"), browser.submit(browser.open("/signin").form("/signin"), email="x")):
        cookie = answer.response.headers.get("set-cookie", "")
        if answer.status == 200:
            assert "; HttpOnly" in cookie
            assert "; SameSite=lax" in cookie
            assert "; Path=/" in cookie
            assert "Secure" not in cookie  # the loopback interface without TLS: browsers would not send it back


def test_what_every_page_forbids(browser: Browser, program: Program) -> None:
    signed_in(browser)
    for address in (
        "/signin?where=/device",
        "/account",
        "/device",
        program.address(),
        program.address(client_id=""),
    ):
        headers = browser.open(address).response.headers
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"
        if "content-security-policy" in headers:
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-frame-options"] == "DENY"


def test_one_message_for_whoever_is_not_let_in(browser: Browser, server: Server) -> None:
    database = database_of(server)
    people = Accounts(database)
    people.create("no-password@example.com")
    people.create("disabled@example.com", PASSWORD)
    people.disable("disabled@example.com")
    database.close()
    page = browser.open("/signin")
    tries = [
        (ADA, "wrong"),
        ("nobody@example.com", "wrong"),
        ("no-password@example.com", ""),
        ("disabled@example.com", PASSWORD),
        ("", ""),
    ]
    answers = [browser.submit(page.form("/signin"), email=email, password=word) for email, word in tries]
    assert {answer.status for answer in answers} == {403}
    assert {answer.text for answer in answers} == {answers[0].text}
    assert "do not belong together" in answers[0].text


@pytest.mark.parametrize(
    "changed",
    [
        {"token": ""},
        {"token": "0" * 64},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
@pytest.mark.parametrize("form", ["sign-in", "consent", "sign-out", "device", "account"])
def test_forms_that_are_not_ours(browser: Browser, program: Program, form: str, changed: dict[str, str]) -> None:
    if form == "sign-in":
        filled = browser.open("/signin").form("/signin")
        filled.fields |= {"email": ADA, "password": PASSWORD}
    elif form == "consent":
        signed_in(browser)
        filled = browser.open(program.address()).form("/o/oauth2/auth")
        filled.fields |= {"decision": "allow"}
    else:
        filled = signed_in(browser).form("/signout")
        filled.action = {"sign-out": "/signout", "device": "/device", "account": "/account"}[form]
    headers = {name: value for name, value in changed.items() if name != "token"}
    tokens = {"token": changed["token"]} if "token" in changed else {}
    page = browser.post(filled.action, {**filled.fields, **tokens}, **headers)
    assert page.status == 403
    assert page.location == ""
    assert "too old" in page.text
    assert "set-cookie" not in page.response.headers


def test_a_token_of_another_browser(browser: Browser, program: Program) -> None:
    """Signing somebody in as oneself, or consent by a page that an attacker loaded."""
    with program.browser() as attackers:
        theirs = attackers.open("/signin").form("/signin").fields["token"]
        page = browser.open("/signin")
        form = {"email": ADA, "password": PASSWORD, "token": theirs}
        assert browser.post("/signin", form).status == 403
        signed_in(attackers)
        consent = attackers.open(program.address()).form("/o/oauth2/auth")
        signed_in(browser)
        assert browser.submit(consent, decision="allow").status == 403
    with program.browser() as without_cookie:
        assert without_cookie.submit(page.form("/signin"), email=ADA, password=PASSWORD).status == 403


def test_consent_needs_a_decision_in_a_post(browser: Browser, program: Program) -> None:
    signed_in(browser)
    page = browser.open(f"{program.address()}&decision=allow")
    assert page.status == 200  # only asked
    assert "error" in browser.submit(page.form("/o/oauth2/auth")).told


@pytest.mark.parametrize(
    "where",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example/",
        "/device//../../evil",
        "/device\r\nset-cookie: a=b",
        "/device?\r\nset-cookie: a=b",
        "javascript:alert(1)",
        "/o/oauth2/auth@evil.example",
        "/signout",
        "/v1beta/tunedModels",
        "",
    ],
)
def test_signing_in_leads_to_our_own_pages_only(browser: Browser, where: str) -> None:
    answer = browser.submit(browser.open("/signin").form("/signin"), email=ADA, password=PASSWORD, where=where)
    assert (answer.status, answer.location) == (303, "/account")
    assert "a=b" not in str(answer.response.headers)
    assert browser.open(f"/signin?where={quote(where)}").location == "/account"
    out = browser.submit(browser.open("/account").form("/signout"), where=where)
    assert out.location in ("", "/account")


def test_states_and_hints_stay_what_they_are(browser: Browser, program: Program) -> None:
    """What the program sends comes back encoded, and shows as text."""
    nasty = "x\r\nset-cookie: a=b\r\n\r\n<script>alert(1)</script>&code=stolen"
    page = browser.open(program.address(state=nasty, login_hint='"><script>alert(2)</script>'))
    assert "<script>" not in page.response.text
    page = browser.sign_in(page, ADA, PASSWORD)
    assert "A <b>program</b> wants" in page.text  # its name is escaped, or it would not be in the text
    assert "<script>" not in page.response.text
    answer = browser.submit(page.form("/o/oauth2/auth"), decision="allow")
    assert answer.told["state"] == nasty
    assert answer.location.startswith(f"{LOOPBACK}?code=4%2F")
    assert "a=b" not in answer.response.headers.get("set-cookie", "")


def test_taking_access_back(browser: Browser, program: Program, server: Server) -> None:
    given = program.signed_in()
    page = signed_in(browser)
    assert "A <b>program</b>" in page.text
    mine = [form for form in page.forms if form.action == "/account"]
    for form in mine:
        browser.submit(form)
    assert not program.opens(given["access_token"])
    assert "None." in browser.open("/account").text
    mallory = Program(server, "mallory@example.com")
    given = program.signed_in()
    ours = [form for form in browser.open("/account").forms if form.action == "/account"]
    with mallory.browser() as other:
        page = other.sign_in(other.open("/signin"), "mallory@example.com", PASSWORD)
        other.post("/account", {"token": page.form("/signout").fields["token"], "app": ours[0].fields["app"]})
    mallory.http.close()
    assert program.opens(given["access_token"])


def test_too_many_wrong_passwords(server: Server, program: Program) -> None:
    eve = Program(server, "eve@example.com")
    with eve.browser() as browser:
        form = browser.open("/signin").form("/signin")
        answers = [browser.submit(form, email="Eve@Example.com ", password=f"no {n}") for n in range(15)]
        assert [answer.status for answer in answers] == [403] * 10 + [429] * 5
        assert "Wait 15 minutes" in answers[-1].text
        # Not even the right one now; nobody learns whether there is such an account.
        assert browser.submit(form, email=eve.email, password=PASSWORD).status == 429
        unknown = [browser.submit(form, email="unknown@example.com", password="no") for _ in range(11)]
        assert [answer.status for answer in unknown] == [403] * 10 + [429]
        assert unknown[-1].text == answers[-1].text
        assert browser.sign_in(browser.open("/signin"), ADA, PASSWORD).status == 200  # others are let in
    eve.http.close()


def test_plain_http_from_other_machines(program: Program) -> None:
    answer = program.http.get("/signin", headers={"host": "tunesmith.example.com"})
    assert answer.status_code == 403
    assert "https only" in answer.text
    form = {"grant_type": "refresh_token", "refresh_token": "x"}
    answer = program.http.post("/token", data=form, headers={"host": "tunesmith.example.com"})
    assert answer.json()["error"] == "insecure_transport"
    behind_a_proxy = {"host": "tunesmith.example.com", "x-forwarded-proto": "https"}
    answer = program.http.get("/signin", headers=behind_a_proxy)
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-tunesmith=")
    assert "; Secure" in cookie
