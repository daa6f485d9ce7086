"""The page at /docs: the API for people, in one file that fetches nothing."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Any

from tunesmith.api.openapi import ABOUT, DEFAULT_VERSION, FILE

_Operation = dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """One method of the document."""

    http_method: str
    path: str
    operation: _Operation


def docs_page(document: Mapping[str, Any], root_url: str) -> str:
    """Return the page.

    Args:
        document: The OpenAPI document.
        root_url: Where this server is, as the caller sees it; ends with a slash.
    """
    entries = [
        _Entry(http_method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for http_method, operation in operations.items()
    ]
    tags = [tag["name"] for tag in document["tags"]]
    entries.sort(key=lambda entry: tags.index(entry.operation["tags"][0]))
    groups = [(tag, list(group)) for tag, group in groupby(entries, lambda entry: entry.operation["tags"][0])]
    versions = document["servers"][0]["variables"]["version"]["enum"]
    return _page().substitute(
        about=escape(ABOUT),
        version=escape(document["info"]["version"]),
        versions=", ".join(f"<code>/{name}</code>" for name in versions),
        address=escape(root_url.removesuffix("/")),
        menu="".join(_menu(groups)),
        methods="".join(_methods(groups, document)),
        schemas="".join(_schemas(document["components"]["schemas"])),
    )


def _page() -> Template:
    return Template(files(__package__).joinpath("docs_page.html").read_text("utf-8"))


def _menu(groups: list[tuple[str, list[_Entry]]]) -> Iterator[str]:
    for tag, entries in groups:
        yield f"<h2>{escape(tag)}</h2><ul>"
        for entry in entries:
            name = entry.operation["operationId"]
            yield f'<li><a href="#{name}">{name.rpartition(".")[2]}</a></li>'
        yield "</ul>"


def _methods(groups: list[tuple[str, list[_Entry]]], document: Mapping[str, Any]) -> Iterator[str]:
    for tag, entries in groups:
        yield f"<h2>{escape(tag)}</h2>"
        for entry in entries:
            yield from _method(entry, document)


def _method(entry: _Entry, document: Mapping[str, Any]) -> Iterator[str]:
    operation, kind = entry.operation, entry.http_method
    path = escape(entry.path).replace("/", "/<wbr>").replace(":", "<wbr>:")
    yield (
        f'<article id="{operation["operationId"]}"><h3><span class="verb {kind.lower()}">{kind}</span> '
        f"<code>{path}</code></h3><p>{_prose(operation['summary'])}</p>"
        f"<pre><button>copy</button><code>{escape(_curl(entry))}</code></pre>"
    )
    rows = [
        (parameter["name"], _type(parameter["schema"]), _note(parameter))
        for parameter in operation["parameters"]
        if parameter.get("in") == "query"
    ]
    yield _table(rows)
    sent = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answered = operation["responses"]["200"]["content"]
    answer = answered.get("application/json", answered.get(FILE, {})).get("schema", {})
    yield '<p class="io">'
    if sent and document["components"]["schemas"][sent["$ref"].rpartition("/")[2]]["properties"]:
        yield f"Takes {_type(sent)}. "
    yield f"Answers with {'a file' if FILE in answered else _type(answer)}.</p></article>"


def _curl(entry: _Entry) -> str:
    """Return a command that can be pasted: ids are shell variables, as in the README."""
    path = entry.path
    for parameter in entry.operation["parameters"]:
        if parameter.get("in") == "path":
            path = path.replace(f"{{{parameter['name']}}}", f"${{{parameter['name']}}}")
    method = "" if entry.http_method == "GET" else f"-X {entry.http_method} "
    if FILE in entry.operation["responses"]["200"]["content"]:
        method = "-OJ "  # under the name that the server gives it
    lines = [f'curl {method}"$base_url/{DEFAULT_VERSION}{path}"', '    -H "Authorization: Bearer $access_token"']
    content = entry.operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if "example" in content:
        text = json.dumps(content["example"], indent=2).replace("\n", "\n    ")
        lines += ["    -H 'Content-Type: application/json'", f"    -d '{text}'"]
    return " \\\n".join(lines)


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        rows = [(field, _type(about), _note(about)) for field, about in schema["properties"].items()]
        yield f'<details id="schema-{name}"><summary><code>{name}</code></summary>'
        yield (_table(rows) or "<p>Has no fields.</p>") + "</details>"


def _table(rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th><code>{escape(name)}</code></th><td>{kind}<td>{note}</tr>" for name, kind, note in rows
    )
    return f"<table>{cells}</table>"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#schema-{name}">{name}</a>'
    kinds = schema.get("oneOf") or schema.get("anyOf")
    if kinds:
        return " or ".join(_type(kind) for kind in kinds)
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("additionalProperties"):
        return f"map to {_type(schema['additionalProperties'])}"
    if schema.get("type") == "object" and "error" in schema.get("properties", {}):
        return "error"
    return escape(schema.get("format") or schema.get("type") or "any JSON")


def _note(schema: Mapping[str, Any]) -> str:
    inner = schema.get("schema", schema)
    values = (inner.get("items") or inner).get("enum", [])
    listed = ", ".join(f"<code>{escape(value)}</code>" for value in values if not value.endswith("UNSPECIFIED"))
    return " ".join(text for text in (_prose(schema.get("description", "")), listed) if text)


def _prose(text: str) -> str:
    """Return text as HTML; what stands between backticks is code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))
