"""curl: the REST API as the documentation shows it, under every version."""

import json
import subprocess
import time
from typing import Any

from calls import STAGE, Calls

BASE = "models/gemini-1.5-flash-001-tuning"
ID = f"{STAGE['slug']}-numbers"
NAME = f"tunedModels/{ID}"
DATA = {"examples": {"examples": STAGE["examples"]}}
HYPERPARAMETERS = {"epoch_count": 2, "batch_size": 4, "learning_rate": 0.001}
ASK = {"contents": [{"parts": [{"text": "7"}]}], "generationConfig": {"maxOutputTokens": 8}}
calls = Calls()


class Refused(Exception):
    """An error in Google's form: `status` is the canonical code."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.code, self.status = error["code"], error["status"]


def text(path: str, *options: str, body: object = None, key: str = STAGE["key"]) -> str:
    """Return what curl prints."""
    data = [] if body is None else ["-d", body if isinstance(body, str) else json.dumps(body)]
    header = ["-H", f"x-goog-api-key: {key}"] if key else []
    command = ["curl", "-sS", *options, *header, *data, f"{STAGE['url']}/{path}"]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()


def ask(path: str, *options: str, **given: Any) -> Any:
    """Return the JSON that curl prints.

    Raises:
        Refused: It is an error.
    """
    answer = json.loads(text(f"v1beta/{path}" if not path.startswith("v1") else path, *options, **given))
    first = answer[0] if isinstance(answer, list) else answer
    if "error" in first and "done" not in first:
        raise Refused(first["error"])
    return answer


def ended(operation: dict[str, Any]) -> dict[str, Any]:
    """Poll as the tutorial does."""
    while not operation.get("done"):
        time.sleep(0.2)
        operation = ask(operation["name"])
    return operation


def tune() -> None:
    task = {"hyperparameters": HYPERPARAMETERS, "training_data": DATA}
    body = {"display_name": "numbers", "base_model": BASE, "tuning_task": task}
    with calls.works("GET models, models/X"):
        assert "createTunedModel" in ask(BASE)["supportedGenerationMethods"]
        assert BASE in [model["name"] for model in ask("models?pageSize=1000")["models"]]
    with calls.works("POST tunedModels", "snake_case names, trailing commas"):
        lax = json.dumps(body).replace("}", ",}").replace("]", ",]")
        operation = ask(f"tunedModels?tunedModelId={ID}", body=lax)
        assert operation["metadata"]["totalSteps"] == 5
    with calls.works("GET tunedModels/X/operations/Y"):
        operation = ended(operation)
        assert operation["metadata"]["completedPercent"] == 100
        assert operation["response"]["name"] == NAME
    with calls.works("POST tunedModels/X/operations/Y:wait"):
        assert ask(f"{operation['name']}:wait", body={"timeout": "10s"})["done"]
    with calls.works("GET tunedModels/X | grep state"):
        assert '\n  "state": "ACTIVE",\n' in text(f"v1beta/{NAME}")
    with calls.works("GET tunedModels/X", "under /v1, /v1beta, /v1alpha and /v1beta3"):
        assert all(ask(f"{version}/{NAME}")["name"] == NAME for version in ("v1", "v1beta", "v1alpha", "v1beta3"))
    with calls.works("GET tunedModels/X/operations"):
        assert [one["name"] for one in ask(f"{NAME}/operations")["operations"]] == [operation["name"]]
    with calls.works("POST tunedModels", "tunedModelSource"):
        child = {"tunedModelSource": {"tunedModel": NAME}, "tuningTask": {"trainingData": DATA}}
        made = ended(ask(f"tunedModels?tunedModelId={ID}-child", body=child))["response"]
        assert made["tunedModelSource"] == {"tunedModel": NAME, "baseModel": BASE}
    with calls.works("POST tunedModels/X/operations/Y:cancel"):
        task = {"hyperparameters": {"epochCount": 1000, "batchSize": 1}, "trainingData": DATA}
        long = ask("tunedModels", body={"baseModel": BASE, "tuningTask": task})
        while "snapshots" not in ask(long["name"])["metadata"]:
            time.sleep(0.1)
        assert ask(f"{long['name']}:cancel", "-X", "POST") == {}
        assert ended(long)["error"]["code"] == 1
    with calls.works("POST tunedModels/X:cancel", "as google-genai sends it"):
        other = ask("tunedModels", body={"baseModel": BASE, "tuningTask": task})
        ask(f"{other['metadata']['tunedModel']}:cancel", body={})
        assert ended(other)["error"]["code"] == 1
    with calls.works("DELETE tunedModels/X/operations/Y"):
        assert ask(long["name"], "-X", "DELETE") == {}


def generate() -> None:
    with calls.works("POST tunedModels/X:generateContent"):
        answer = ask(f"{NAME}:generateContent", body=ASK)["candidates"][0]["content"]["parts"][0]["text"]
    with calls.works("POST models/tunedModels/X:generateContent", "as litellm sends it"):
        assert ask(f"models/{NAME}:generateContent", body=ASK)["candidates"]
    with calls.works("POST models/X:generateContent"):
        assert ask(f"{BASE}:generateContent", body=ASK)["candidates"]
    with calls.works("POST tunedModels/X:streamGenerateContent", "a JSON array"):
        chunks = ask(f"{NAME}:streamGenerateContent", body=ASK)
        assert joined(chunks) == answer
    with calls.works("POST tunedModels/X:streamGenerateContent?alt=sse"):
        events = text(f"v1beta/{NAME}:streamGenerateContent?alt=sse", "-N", body=ASK).split("\r\n\r\n")
        assert joined([json.loads(event.removeprefix("data: ")) for event in events if event]) == answer
    with calls.works("POST tunedModels/X:countTokens"):
        assert ask(f"{NAME}:countTokens", body={"contents": {"parts": {"text": "seven"}}})["totalTokens"] > 2
    with calls.works("POST tunedModels/X:generateText", "legacy"):
        legacy = {"prompt": {"text": "7"}, "maxOutputTokens": 8}
        assert "output" in ask(f"v1beta3/{NAME}:generateText", body=legacy)["candidates"][0]
    with calls.works("POST models/X:countTextTokens", "legacy"):
        assert ask(f"v1beta3/{BASE}:countTextTokens", body={"prompt": {"text": "seven"}})["tokenCount"] > 2
    with calls.works("POST tunedModels/X:countTextTokens", "legacy"):
        assert ask(f"v1beta3/{NAME}:countTextTokens", body={"prompt": {"text": "seven"}})["tokenCount"] > 2
    content = {"content": {"parts": [{"text": "seven"}]}}
    with calls.works("POST models/X:embedContent"):
        assert len(ask(f"{BASE}:embedContent", body=content)["embedding"]["values"]) > 1
    with calls.works("POST models/X:batchEmbedContents"):
        both = {"requests": [{"model": BASE, **content}] * 2}
        assert len(ask(f"{BASE}:batchEmbedContents", body=both)["embeddings"]) == 2


def joined(chunks: list[dict[str, Any]]) -> str:
    """Return the text of a stream."""
    return "".join(part["text"] for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"])


def manage() -> None:
    with calls.works("GET tunedModels", "25 models on three pages"):
        names, token, pages = [], "", 0
        while pages == 0 or token:
            page = ask(f"tunedModels?page_size=10&page_token={token}", key=STAGE["shelf_key"])
            names += [model["name"] for model in page["tunedModels"]]
            token, pages = page.get("nextPageToken", ""), pages + 1
        assert (pages, len(set(names))) == (3, STAGE["shelf_size"])
    with calls.works("GET tunedModels?filter=…", "free text and owner:me"):
        found = ask("tunedModels?filter=owner:me%20numbers")["tunedModels"]
        assert [model["name"] for model in found] == [NAME], found
    with calls.works("PATCH tunedModels/X", "with and without updateMask"):
        both = {"description": "a", "displayName": "b"}
        masked = ask(f"{NAME}?updateMask=description", "-X", "PATCH", body=both)
        assert (masked["description"], masked["displayName"]) == ("a", "numbers")
        assert ask(NAME, "-X", "PATCH", body={"displayName": "b"})["displayName"] == "b"
    with calls.works("GET tunedModels/X?fields=name,state"):
        assert ask(f"{NAME}?fields=name,state") == {"name": NAME, "state": "ACTIVE"}
    with calls.works("GET tunedModels/X?$alt=json;enum-encoding=int"):
        assert ask(f"{NAME}?%24alt=json%3Benum-encoding%3Dint")["state"] == 2


def share() -> None:
    with calls.works("POST tunedModels/X/permissions"):
        wanted = {"granteeType": "USER", "emailAddress": STAGE["friend"], "role": "READER"}
        permission = ask(f"{NAME}/permissions", body=wanted)
        assert permission == {"name": permission["name"], **wanted}
    with calls.works("GET tunedModels/X/permissions"):
        assert len(ask(f"{NAME}/permissions")["permissions"]) == 2
    with calls.works("PATCH tunedModels/X/permissions/Y?updateMask=role"):
        path = f"{permission['name']}?updateMask=role"
        assert ask(path, "-X", "PATCH", body={"role": "WRITER"})["role"] == "WRITER"
    with calls.works("POST tunedModels/X:transferOwnership", "and back"):
        assert ask(f"{NAME}:transferOwnership", body={"emailAddress": STAGE["friend"]}) == {}
        ask(f"{NAME}:transferOwnership", body={"emailAddress": STAGE["email"]}, key=STAGE["friend_key"])
    with calls.works("DELETE tunedModels/X/permissions/Y"):
        assert ask(permission["name"], "-X", "DELETE") == {}


def fail() -> None:
    task = {"trainingData": DATA}
    with calls.raises("POST tunedModels", Refused, f"Tuned model {NAME} already exists.", status="ALREADY_EXISTS"):
        ask(f"tunedModels?tunedModelId={ID}", body={"baseModel": BASE, "tuningTask": task})
    with calls.raises("POST tunedModels", Refused, "CREATE TUNED MODEL", status="NOT_FOUND"):
        ask("tunedModels", body={"baseModel": "models/none-such", "tuningTask": task})
    unknown = """Unknown name "learning_rates" at 'tuned_model.tuning_task': Cannot find field."""
    with calls.raises("POST tunedModels", Refused, unknown, status="INVALID_ARGUMENT"):
        ask("tunedModels", body={"baseModel": BASE, "tuningTask": {**task, "learning_rates": 1}})
    denied = {"status": "PERMISSION_DENIED"}
    with calls.raises("POST models/X:generateContent", Refused, "unregistered callers", **denied):
        ask(f"{BASE}:generateContent", body=ASK, key="")
    with calls.raises("GET tunedModels/X", Refused, "API key not valid", status="INVALID_ARGUMENT"):
        ask(NAME, key="none")
    stranger = {"key": STAGE["stranger_key"]}
    with calls.raises("GET tunedModels/X", Refused, "You do not have permission", **denied):
        ask(NAME, **stranger)
    with calls.raises("POST …:streamGenerateContent", Refused, "You do not have permission", **denied):
        ask(f"{NAME}:streamGenerateContent", body=ASK, **stranger)
    with calls.raises("POST corpora", Refused, "not implemented", status="UNIMPLEMENTED"):
        ask("corpora", body={})
    for what, option, path in (
        ("Authorization: Bearer", ["-H", f"Authorization: Bearer {STAGE['token']}"], NAME),
        ("?key=", [], f"{NAME}?key={STAGE['key']}"),
        ("?access_token=", [], f"{NAME}?access_token={STAGE['token']}"),
    ):
        with calls.works(f"GET tunedModels/X with {what}"):
            assert ask(path, *option, key="")["name"] == NAME
    with calls.works("DELETE tunedModels/X"):
        assert ask(NAME, "-X", "DELETE") == {}
    with calls.raises("GET tunedModels/X", Refused, f"Tuned model {NAME} does not exist.", status="NOT_FOUND"):
        ask(NAME)


tune()
generate()
manage()
share()
fail()
