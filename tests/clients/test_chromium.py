"""The pages in a real browser, over https: clicked through with the keyboard, without a line on the console."""

import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from socket import AF_INET6
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from oauth_client import TUTORIAL, Program
from secure_site import EMAIL, PASSWORD, Site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM ON THIS MACHINE: the sign-in pages were NOT tested in a browser"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light", "dark-phone"])
def context(request: pytest.FixtureRequest, chromium: Browser) -> Iterator[BrowserContext]:
    scheme, width = request.param
    context = chromium.new_context(
        ignore_https_errors=True, color_scheme=scheme, viewport={"width": width, "height": 800}
    )
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that must fit its width, and whose console must stay empty but for the refusals that are meant."""
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("load", lambda page: said.extend(["too wide"] if wider(page) else []))
    yield page
    page.close()
    assert [line for line in said if "status of 403" not in line] == []


def wider(page: Page) -> bool:
    answer: bool = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return answer


@pytest.fixture
def program(site: Site) -> Iterator[Program]:
    program = Program(site.server, EMAIL, site.trust)
    yield program
    program.http.close()


class Listener:
    """Where a program waits for its answer."""

    def __init__(self, host: str) -> None:
        told: dict[str, str] = {}
        self.told = told

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.update(parse_qsl(urlsplit(self.path).query))
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.end_headers()
                self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>t</title>back at the program")

            def log_message(self, *_: object) -> None:
                pass

        class Server(HTTPServer):
            address_family = AF_INET6 if ":" in host else HTTPServer.address_family

        self.server = Server((host, 0), Handler)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self.server.server_port}/"

    def __enter__(self) -> "Listener":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def type_into(page: Page, field: str, text: str) -> None:
    """Type where the focus is, which must be in a field; a page takes it there once it is loaded."""
    expect(page.locator(f"input[name={field}]")).to_be_focused()
    page.keyboard.type(text)


def sign_in(page: Page, password: str = PASSWORD) -> None:
    """With the keyboard only: the first field has the focus."""
    type_into(page, "email", EMAIL)
    page.keyboard.press("Tab")
    type_into(page, "password", password)
    page.keyboard.press("Enter")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_sign_in_and_consent(site: Site, page: Page, program: Program, host: str) -> None:
    with Listener(host) as listener:
        page.goto(f"{site.server.url}{program.address(redirect_uri=listener.address)}")
        sign_in(page, "wrong")
        expect(page.get_by_role("alert")).to_contain_text("do not belong together")
        type_into(page, "password", PASSWORD)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading")).to_have_text("A <b>program</b> wants to use your account")
        expect(page.get_by_role("listitem")).to_have_count(2)
        (cookie,) = page.context.cookies(site.server.url)
        assert (cookie["name"], cookie["httpOnly"], cookie["secure"]) == ("__Host-tunesmith", True, True)
        assert cookie["sameSite"] == "Lax"
        page.get_by_role("button", name="Deny").click()
        expect(page.locator("body")).to_have_text("back at the program")
        assert listener.told["error"] == "access_denied"
        listener.told.clear()
        page.goto(f"{site.server.url}{program.address(redirect_uri=listener.address)}")
        page.get_by_role("button", name="Allow").focus()
        page.keyboard.press("Enter")
        expect(page.locator("body")).to_have_text("back at the program")
        given = program.redeem(listener.told["code"], redirect_uri=listener.address)
        assert program.opens(given["access_token"])
        assert listener.told["state"] == "some state"


def test_the_line_to_paste(site: Site, page: Page, context: BrowserContext, program: Program) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.server.url)
    page.goto(f"{site.server.url}{program.address(redirect_uri='')}")
    sign_in(page)
    page.get_by_role("button", name="Allow").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button")).to_have_text("Copied")
    line = page.evaluate("navigator.clipboard.readText()")
    assert program.redeem(dict(parse_qsl(urlsplit(line).query))["code"])["access_token"]


def test_a_device_and_taking_its_access_back(site: Site, page: Page, program: Program) -> None:
    asked: dict[str, Any] = program.post("/device/code", scope=TUTORIAL)
    page.goto(asked["verification_uri_complete"])
    sign_in(page)
    expect(page.get_by_label("Code")).to_have_value(asked["user_code"])
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Allow").click()
    expect(page.get_by_role("heading")).to_have_text("Connected")
    form = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "device_code": asked["device_code"]}
    given = program.post("/token", **form)
    page.goto(f"{site.server.url}/account")
    while page.get_by_role("button", name="Take access").count():
        page.get_by_role("button", name="Take access").first.click()
    assert not program.opens(given["access_token"])
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading")).to_have_text("Signed out")
    assert page.goto(f"{site.server.url}/account")
    expect(page.get_by_role("heading")).to_have_text("Sign in")


def test_no_page_can_frame_ours(site: Site, context: BrowserContext, program: Program) -> None:
    page = context.new_page()
    with Listener("127.0.0.1") as listener:
        page.goto(listener.address)
        page.set_content(f'<iframe src="{site.server.url}{program.address()}"></iframe>')
        frame = page.frames[1]
        frame.wait_for_load_state()
        assert frame.locator("form").count() == 0
    page.close()
