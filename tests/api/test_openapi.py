"""The OpenAPI document is valid, true of a live server, and readable as a page."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.testclient import TestClient

from api.stand_ins import Backend
from tunesmith import protos
from tunesmith.api.json_reader import MessageReader
from tunesmith.api.openapi import openapi_document
from tunesmith.api.surface import methods


@pytest.fixture
def document() -> dict[str, Any]:
    """The document of a server that implements everything there is a service for."""
    rpcs = [rpc for service in protos.SERVICES.values() for rpc in service.methods]
    return openapi_document(methods({rpc.full_name: f"Does {rpc.name}." for rpc in rpcs}), "0", "http://x/")


def operations(document: dict[str, Any]) -> Iterator[Any]:
    for path in document["paths"].values():
        yield from path.values()


def test_is_valid(document: dict[str, Any], client: TestClient):
    OpenAPIV31SpecValidator(document).validate()
    OpenAPIV31SpecValidator(client.get("/openapi.json").json()).validate()


def test_operation_ids_are_unique(document: dict[str, Any]):
    ids = [operation["operationId"] for operation in operations(document)]
    assert len(ids) == len(set(ids))
    own = {"tunedModels.permissions.create", "tunedModels.operations.wait", "tunedModels.countTextTokens"}
    assert own <= set(ids)


def test_names_the_server_and_its_versions(client: TestClient):
    (server,) = client.get("/openapi.json", headers={"host": "h:1"}).json()["servers"]
    assert server["url"] == "http://h:1/{version}"
    assert server["variables"]["version"] == {
        "default": "v1beta",
        "enum": ["v1", "v1beta", "v1alpha", "v1beta3"],
    }


def test_examples_are_good_requests(document: dict[str, Any]):
    checked = 0
    for operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in content:
            message = getattr(protos, content["schema"]["$ref"].rpartition("/")[2])()
            reader = MessageReader(message)
            reader.read_body(content["example"], "*")
            reader.finish()
            checked += 1
    assert checked > 10


def test_training_data_is_write_only(document: dict[str, Any]):
    task = document["components"]["schemas"]["TuningTask"]["properties"]
    assert task["trainingData"]["writeOnly"] is True
    assert task["snapshots"]["readOnly"] is True


class Page(HTMLParser):
    """What a page links to and holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if tag == "a" else []
        self.sources += [given[name] or "" for name in ("src", "srcset", "data") if name in given]
        if tag == "link":
            self.sources.append(given.get("href") or "")


def test_the_page_fetches_nothing_and_links_only_to_itself(client: TestClient):
    response = client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = Page(response.text)
    assert page.sources == []
    assert not re.search(r"url\(|@import", response.text)
    assert len(page.ids) == len(set(page.ids))
    outside = [link for link in page.links if not link.startswith("#")]
    assert outside == ["/openapi.json", "/$discovery/rest?version=v1beta"]
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    for link in outside:
        assert client.get(link).status_code == 200


def test_the_page_shows_commands_that_can_be_pasted(client: TestClient):
    text = client.get("/docs", headers={"host": "h:1"}).text
    assert "export base_url=http://h:1\n" in text
    assert "curl -X POST &quot;$base_url/v1beta/tunedModels/${tunedModel}:generateContent&quot; \\\n" in text
    assert "curl -OJ &quot;$base_url/v1beta/tunedModels/${tunedModel}:export&quot; \\\n" in text
    assert "Answers with a file." in text


def test_a_host_cannot_write_into_the_page(client: TestClient):
    assert "<script>alert" not in client.get("/docs", headers={"host": "a<script>alert(1)</script>"}).text


def test_documents_need_no_credentials(backend: Backend):
    with TestClient(backend.app()) as anonymous:
        for path in ("/docs", "/openapi.json", "/$discovery/rest"):
            assert anonymous.get(path).status_code == 200
