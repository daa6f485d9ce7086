"""google-api-python-client builds its methods from our document and calls a live server with them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from googleapiclient.discovery import build, build_from_document
from googleapiclient.errors import HttpError, UnknownApiNameOrVersion

from api.stand_ins import Backend
from servers import Server, job
from tunesmith.api.discovery import Discovery
from tunesmith.api.http_rules import VERSIONS
from tunesmith.api.surface import methods

ASK = {"contents": [{"parts": [{"text": "1"}]}]}


@pytest.fixture(scope="module")
def key(server: Server) -> str:
    return server.run("api-key", "create", "admin@localhost").split()[-1]


def service(server: Server, key: str, version: str = "v1beta", **options: Any) -> Any:
    url = server.url + "/$discovery/rest?version={apiVersion}"
    return build("generativelanguage", version, discoveryServiceUrl=url, developerKey=key, **options)


@pytest.fixture
def google(server: Server, key: str) -> Iterator[Any]:
    with service(server, key) as client:
        yield client


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds(server: Server, key: str, version: str):
    with service(server, key, version) as client:
        assert client.models().list(pageSize=1).execute()["models"]
        assert client.models().list().uri.startswith(f"{server.url}/{version}/models?")


def test_an_unknown_version_does_not(server: Server, key: str):
    with pytest.raises(UnknownApiNameOrVersion):
        service(server, key, "v9")


def test_the_whole_of_a_tuned_models_life(server: Server, google: Any):
    tuned = google.tunedModels()
    operation = tuned.create(body=job(), tunedModelId="life").execute()
    assert operation["metadata"]["tunedModel"] == "tunedModels/life"
    server.finished(operation)
    assert tuned.operations().get(name=operation["name"]).execute()["done"]
    assert tuned.operations().wait(name=operation["name"], body={"timeout": "1s"}).execute()["done"]
    assert tuned.operations().list(name="tunedModels/life").execute()["operations"][0]["done"]
    assert tuned.operations().cancel(name=operation["name"], body={}).execute() == {}
    patched = tuned.patch(name="tunedModels/life", body={"description": "d"}, updateMask="description").execute()
    assert patched["description"] == "d"
    assert tuned.get(name="tunedModels/life", fields="name,state").execute() == {
        "name": "tunedModels/life",
        "state": "ACTIVE",
    }
    assert tuned.generateContent(model="tunedModels/life", body=ASK).execute()["candidates"]
    assert tuned.countTokens(model="tunedModels/life", body=ASK).execute()["totalTokens"] > 0
    prompt = {"prompt": {"text": "1"}}
    assert tuned.countTextTokens(model="tunedModels/life", body=prompt).execute()["tokenCount"] > 0
    parts = tuned.streamGenerateContent(model="tunedModels/life", body=ASK).execute()
    assert parts[-1]["candidates"][0]["finishReason"]
    assert tuned.delete(name="tunedModels/life").execute() == {}


def test_paging(server: Server, google: Any):
    for number in range(5):
        google.tunedModels().create(body=job(f"page {number}"), tunedModelId=f"page-{number}").execute()
    names: list[str] = []
    request = google.tunedModels().list(pageSize=2)
    while request is not None:
        page = request.execute()
        names += [model["name"] for model in page["tunedModels"]]
        request = google.tunedModels().list_next(request, page)
    assert {f"tunedModels/page-{number}" for number in range(5)} <= set(names)
    assert len(names) == len(set(names))


def test_cancel_by_the_models_name(server: Server, google: Any):
    operation = google.tunedModels().create(body=job(epochs=200), tunedModelId="stopped").execute()
    assert google.tunedModels().cancel(name="tunedModels/stopped", body={}).execute() == {}
    assert server.finished(operation)["error"]["code"] == 1


def test_permissions(google: Any):
    google.tunedModels().create(body=job(), tunedModelId="shared").execute()
    permissions = google.tunedModels().permissions()
    body = {"granteeType": "EVERYONE", "role": "READER"}
    made = permissions.create(parent="tunedModels/shared", body=body).execute()
    listed = permissions.list(parent="tunedModels/shared").execute()["permissions"]
    assert made["name"] in [permission["name"] for permission in listed]
    assert permissions.get(name=made["name"]).execute() == made
    assert permissions.delete(name=made["name"]).execute() == {}


def test_errors_are_http_errors(google: Any):
    with pytest.raises(HttpError) as refused:
        google.tunedModels().create(body={"tuningTask": {"foo": 1}}).execute()
    assert refused.value.status_code == 400
    assert "Unknown name" in refused.value.reason
    assert refused.value.error_details[0]["fieldViolations"]
    with pytest.raises(HttpError) as missing:
        google.models().get(name="models/nothing").execute()
    assert missing.value.status_code == 404
    with pytest.raises(TypeError, match="does not match the pattern"):
        google.tunedModels().get(name="models/nothing")


def test_batches_are_refused_in_words(google: Any):
    batch = google.new_batch_http_request()
    batch.add(google.models().list())
    with pytest.raises(HttpError, match="Batched HTTP requests are not implemented"):
        batch.execute()


def test_the_server_is_where_the_caller_sees_it(server: Server):
    def root(**headers: str) -> Any:
        return httpx2.get(f"{server.url}/$discovery/rest?version=v1", headers=headers).json()["rootUrl"]

    assert root() == f"{server.url}/"
    assert root(host="tune.example") == "http://tune.example/"
    assert root(host="tune.example", **{"x-forwarded-proto": "https"}) == "https://tune.example/"
    assert root(host="[::1]:80") == "http://[::1]:80/"
    assert root(host='evil"<script>') == f"{server.url}/"
    older = httpx2.get(f"{server.url}/discovery/v1/apis/generativelanguage/v1alpha/rest").json()
    assert older["id"] == "generativelanguage:v1alpha"


def test_offers_what_is_implemented_and_nothing_else(backend: Backend):
    summaries = backend.dispatcher.summaries()
    document = Discovery(methods(summaries), "0").document("v1beta", "http://x/")
    assert set(document["resources"]) == {"tunedModels", "models"}
    tuned = document["resources"]["tunedModels"]
    assert set(tuned["resources"]) == {"operations"}
    assert set(tuned["methods"]) == {
        *("create", "get", "list", "patch", "delete", "cancel"),
        *("generateContent", "streamGenerateContent", "countTokens"),
        *("watch", "export"),
    }
    assert tuned["methods"]["export"]["supportsMediaDownload"] is True
    assert "beyond the hyperparameters" not in json.dumps(document)  # of a method that is not there
    text = document["schemas"]["TuningEvent"]["properties"]["eventId"]["description"]
    assert text.startswith("Its number among those of its job")  # as our .proto file has it
    assert tuned["methods"]["patch"]["path"] == "v1beta/{+name}"
    assert tuned["methods"]["create"]["parameterOrder"] == []
    client = build_from_document(json.dumps(document), developerKey="k")
    assert client.tunedModels().get(name="tunedModels/x").uri == "http://x/v1beta/tunedModels/x?key=k&alt=json"
    client.close()


def test_every_reference_leads_somewhere(backend: Backend):
    document = Discovery(methods(backend.dispatcher.summaries()), "0").document("v1beta", "http://x/")
    text = json.dumps(document)
    for part in text.split('"$ref": "')[1:]:
        assert part.partition('"')[0] in document["schemas"]
