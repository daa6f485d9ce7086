"""google-api-python-client, which builds its methods from the discovery document."""

import time
from typing import Any

from calls import STAGE, Calls
from googleapiclient.discovery import build
from googleapiclient.errors import HttpError

BASE = "models/gemini-1.5-flash-001-tuning"
ID = f"{STAGE['slug']}-numbers"
NAME = f"tunedModels/{ID}"
ASK = {"contents": [{"parts": [{"text": "7"}]}], "generationConfig": {"maxOutputTokens": 8}}
TASK = {"trainingData": {"examples": {"examples": STAGE["examples"]}}, "hyperparameters": {"epochCount": 2}}
calls = Calls()


def sign_in(key: str, version: str = "v1beta") -> Any:
    """Return a service that calls as somebody."""
    url = STAGE["url"] + "/$discovery/rest?version={apiVersion}"
    return build("generativelanguage", version, discoveryServiceUrl=url, developerKey=key, cache_discovery=False)


with calls.works("build", "under v1, v1beta, v1alpha and v1beta3"):
    services = {version: sign_in(STAGE["key"], version) for version in ("v1", "v1beta", "v1alpha", "v1beta3")}
    service = services["v1beta"]
with calls.works("models().list, .get"):
    assert BASE in [model["name"] for model in service.models().list(pageSize=1000).execute()["models"]]
    assert service.models().get(name=BASE).execute()["inputTokenLimit"] > 0
with calls.works("tunedModels().create"):
    body = {"displayName": "numbers", "baseModel": BASE, "tuningTask": TASK}
    operation = service.tunedModels().create(tunedModelId=ID, body=body).execute()
with calls.works("tunedModels().operations().get"):
    while not operation.get("done"):
        time.sleep(0.2)
        operation = service.tunedModels().operations().get(name=operation["name"]).execute()
    assert operation["response"]["name"] == NAME
with calls.works("tunedModels().operations().list"):
    assert service.tunedModels().operations().list(name=NAME).execute()["operations"] == [operation]
with calls.works("tunedModels().operations().cancel"):
    task = {**TASK, "hyperparameters": {"epochCount": 1000, "batchSize": 1}}
    long = service.tunedModels().create(body={"baseModel": BASE, "tuningTask": task}).execute()
    service.tunedModels().operations().cancel(name=long["name"], body={}).execute()
    while not long.get("done"):
        time.sleep(0.2)
        long = service.tunedModels().operations().get(name=long["name"]).execute()
    assert long["error"]["code"] == 1
with calls.works("tunedModels().get", "under v1, v1beta, v1alpha and v1beta3"):
    assert all(one.tunedModels().get(name=NAME).execute()["name"] == NAME for one in services.values())
with calls.works("tunedModels().list, .list_next", "25 models on three pages"):
    shelf = sign_in(STAGE["shelf_key"]).tunedModels()
    names, request = set(), shelf.list(pageSize=10)
    while request is not None:
        page = request.execute()
        names |= {model["name"] for model in page["tunedModels"]}
        request = shelf.list_next(request, page)
    assert len(names) == STAGE["shelf_size"]
with calls.works("tunedModels().patch"):
    request = service.tunedModels().patch(name=NAME, updateMask="description", body={"description": "counts"})
    assert request.execute()["description"] == "counts"
with calls.works("tunedModels().generateContent"):
    answer = service.tunedModels().generateContent(model=NAME, body=ASK).execute()
    assert answer["candidates"]
with calls.works("tunedModels().streamGenerateContent", "a JSON array"):
    assert service.tunedModels().streamGenerateContent(model=NAME, body=ASK).execute()[-1]["usageMetadata"]
with calls.works("models().generateContent, .countTokens"):
    assert service.models().generateContent(model=BASE, body=ASK).execute()["candidates"]
    assert service.models().countTokens(model=BASE, body={"contents": ASK["contents"]}).execute()["totalTokens"]
with calls.works("models().embedContent"):
    request = service.models().embedContent(model=BASE, body={"content": {"parts": [{"text": "seven"}]}})
    assert len(request.execute()["embedding"]["values"]) > 1
with calls.works("tunedModels().permissions().create, .list, .get"):
    shared = service.tunedModels().permissions()
    wanted = {"granteeType": "USER", "emailAddress": STAGE["friend"], "role": "READER"}
    permission = shared.create(parent=NAME, body=wanted).execute()
    assert len(shared.list(parent=NAME).execute()["permissions"]) == 2
    assert shared.get(name=permission["name"]).execute() == permission
with calls.works("tunedModels().permissions().patch"):
    request = shared.patch(name=permission["name"], updateMask="role", body={"role": "WRITER"})
    assert request.execute()["role"] == "WRITER"
with calls.works("tunedModels().transferOwnership", "and back"):
    service.tunedModels().transferOwnership(name=NAME, body={"emailAddress": STAGE["friend"]}).execute()
    friend = sign_in(STAGE["friend_key"])
    friend.tunedModels().transferOwnership(name=NAME, body={"emailAddress": STAGE["email"]}).execute()
with calls.works("tunedModels().permissions().delete"):
    assert shared.delete(name=permission["name"]).execute() == {}
with calls.raises("tunedModels().create", HttpError, "already exists", status_code=409):
    service.tunedModels().create(tunedModelId=ID, body={"baseModel": BASE, "tuningTask": TASK}).execute()
with calls.raises("tunedModels().create", HttpError, "top_p", status_code=400):
    service.tunedModels().create(body={"baseModel": BASE, "tuningTask": TASK, "topP": 9}).execute()
with calls.raises("tunedModels().get", HttpError, "You do not have permission", status_code=403):
    sign_in(STAGE["stranger_key"]).tunedModels().get(name=NAME).execute()
with calls.works("tunedModels().delete"):
    assert service.tunedModels().delete(name=NAME).execute() == {}
with calls.raises("tunedModels().get", HttpError, "does not exist", status_code=404):
    service.tunedModels().get(name=NAME).execute()
