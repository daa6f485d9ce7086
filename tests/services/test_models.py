"""Models and tuned models through the REST API of a running server, with a real worker."""

import re
from typing import Any

import pytest

from servers import EXAMPLES, Server, job, losses
from tunesmith.services.creation import generate_id


@pytest.fixture(scope="module")
def tuned(server: Server) -> dict[str, Any]:
    """A finished operation."""
    return server.finished(server.tune(job("number generator", epochs=3)))


def test_create_answers_at_once_with_name_and_metadata_only(server: Server) -> None:
    operation = server.tune(job("my display name 81", epochs=5, batch=4))
    name = operation["name"]
    assert re.fullmatch(r"tunedModels/my-display-name-81-[a-z0-9]{12}/operations/[a-z0-9]{12}", name)
    assert operation == {
        "name": name,
        "metadata": {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1beta.CreateTunedModelMetadata",
            "totalSteps": 13,
            "tunedModel": name.partition("/operations/")[0],
        },
    }
    server.finished(operation)


def test_a_finished_operation(tuned: dict[str, Any]) -> None:
    metadata = tuned["metadata"]
    assert tuned["done"] is True
    assert (metadata["totalSteps"], metadata["completedSteps"], metadata["completedPercent"]) == (8, 8, 100)
    assert len(losses(tuned)) == 8
    assert [snapshot.get("epoch", 0) for snapshot in metadata["snapshots"]] == [0, 0, 1, 1, 2, 2, 2, 3]
    model = tuned["response"]
    assert model.pop("@type") == "type.googleapis.com/google.ai.generativelanguage.v1beta.TunedModel"
    assert model["state"] == "ACTIVE"
    assert model["tuningTask"]["snapshots"] == metadata["snapshots"]
    assert model["tuningTask"]["completeTime"] == model["updateTime"]
    assert model["createTime"] < model["tuningTask"]["startTime"] < model["updateTime"]


def test_get_shows_resolved_values_and_never_the_training_data(server: Server, tuned: dict[str, Any]) -> None:
    model = server.call("GET", tuned["metadata"]["tunedModel"])
    assert model["tuningTask"]["hyperparameters"] == {"epochCount": 3, "batchSize": 4, "learningRate": 0.001}
    assert "trainingData" not in model["tuningTask"]
    assert (model["displayName"], model["baseModel"]) == ("number generator", "models/tiny-gemma3")
    assert (model["temperature"], model["topP"], model["topK"]) == (0, 0.95, 64)


@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha", "v1beta3"])
def test_every_version_prefix(server: Server, tuned: dict[str, Any], version: str) -> None:
    for path in (tuned["name"], tuned["metadata"]["tunedModel"], "models/gemini-1.0-pro-001", "tunedModels"):
        response = server.http.get(f"/{version}/{path}")
        assert response.status_code == 200, response.text
    operation = server.http.get(f"/{version}/{tuned['name']}").json()
    assert ".v1beta.CreateTunedModelMetadata" in operation["metadata"]["@type"]


def test_state_is_on_a_line_of_its_own(server: Server, tuned: dict[str, Any]) -> None:
    text = server.http.get(f"/v1beta/{tuned['metadata']['tunedModel']}").text
    assert [line.strip() for line in text.splitlines() if "state" in line] == ['"state": "ACTIVE",']
    compact = server.http.get(f"/v1beta/{tuned['metadata']['tunedModel']}?prettyPrint=false").text
    assert compact.count("\n") <= 1


def test_the_same_data_makes_the_same_model(server: Server, tuned: dict[str, Any]) -> None:
    again = server.finished(server.tune(job("again", epochs=3)))
    assert losses(again) == losses(tuned)


def test_aliases_echo_the_name_that_was_asked_for(server: Server) -> None:
    model = server.call("GET", "models/gemini-1.5-flash-001-tuning")
    assert model["name"] == "models/gemini-1.5-flash-001-tuning"
    assert "createTunedModel" in model["supportedGenerationMethods"]
    assert "models/gemma-3-270m" in model["description"]
    names = [model["name"] for model in server.call("GET", "models")["models"]]
    assert names[0] == "models/gemma-3-270m"
    assert "models/text-bison-001" in names


def test_an_absent_base_model(server: Server) -> None:
    assert "models/nobody is not found" in server.call("GET", "models/nobody", code=404)["error"]["message"]


def test_caller_chosen_id(server: Server) -> None:
    operation = server.finished(server.tune(job(), tunedModelId="my-own-1"))
    assert operation["metadata"]["tunedModel"] == "tunedModels/my-own-1"
    server.call("DELETE", "tunedModels/my-own-1")


def test_pages_are_whole_and_in_order(server: Server) -> None:
    names = [server.tune(job(f"page {n}", epochs=1))["metadata"]["tunedModel"] for n in range(5)]
    seen: list[str] = []
    token = ""
    while True:
        page = server.call("GET", "tunedModels", params={"page_size": 2, "pageToken": token})
        seen += [model["name"] for model in page["tunedModels"]]
        token = page.get("nextPageToken")
        if not token:
            break
        assert len(page["tunedModels"]) == 2
    assert [name for name in seen if name in names] == names
    assert len(seen) == len(set(seen))
    error = server.call("GET", "tunedModels?pageToken=nonsense", code=400)["error"]
    assert "ListTunedModelsRequest.page_token" in error["message"]


def test_patch_with_and_without_a_mask(server: Server, tuned: dict[str, Any]) -> None:
    name = tuned["metadata"]["tunedModel"]
    changed = server.call("PATCH", name, {"displayName": "renamed", "description": "about it"})
    assert (changed["displayName"], changed["description"], changed["state"]) == ("renamed", "about it", "ACTIVE")
    changed = server.call("PATCH", f"{name}?updateMask=description,temperature", {"temperature": 0.5})
    assert "description" not in changed  # in the mask and not in the body: cleared
    assert changed["temperature"] == 0.5
    assert changed["displayName"] == "renamed"
    whole = {**changed, "state": 2, "displayName": "whole"}
    assert server.call("PATCH", f"{name}?updateMask=displayName", whole)["displayName"] == "whole"
    assert changed["updateTime"] < server.call("GET", name)["updateTime"]


@pytest.mark.parametrize("mask", ["state", "name", "tuning_task.hyperparameters", "colour"])
def test_a_mask_that_names_what_cannot_change(server: Server, tuned: dict[str, Any], mask: str) -> None:
    name = tuned["metadata"]["tunedModel"]
    before = server.call("GET", name)
    error = server.call("PATCH", f"{name}?updateMask={mask}", {"displayName": "no"}, code=400)["error"]
    assert mask in error["message"]
    assert server.call("GET", name) == before


def test_operations_list_and_delete(server: Server) -> None:
    done = server.finished(server.tune(job("listed", epochs=1)))
    model = done["metadata"]["tunedModel"]
    assert server.call("GET", f"{model}/operations")["operations"] == [done]
    assert server.call("DELETE", done["name"]) == {}
    server.call("GET", done["name"], code=404)
    assert server.call("GET", f"{model}/operations") == {}
    assert server.call("GET", model)["state"] == "ACTIVE"


def test_somebody_elses_model_and_one_that_never_was_look_the_same(server: Server, tuned: dict[str, Any]) -> None:
    server.run("accounts", "create", "eve@example.com")
    eve = {"authorization": "", "x-goog-api-key": server.run("api-key", "create", "eve@example.com").strip()}
    name = tuned["metadata"]["tunedModel"]
    body = {"contents": {"parts": {"text": "1"}}}
    for model in (name, "tunedModels/never-was"):
        for method, path, sent in [
            ("GET", model, None),
            ("PATCH", model, {"displayName": "mine"}),
            ("DELETE", model, None),
            ("POST", f"{model}:generateContent", body),
            ("GET", f"{model}/operations/abc", None),
            ("GET", f"{model}/operations", None),
        ]:
            error = server.call(method, path, sent, code=403, headers=eve)["error"]
            assert error["message"] == f"You do not have permission to access tuned model {model}."
    assert server.call("GET", "tunedModels", headers=eve) == {}
    assert server.call("GET", name)["state"] == "ACTIVE"


def test_a_deleted_model_is_gone_for_its_owner(server: Server) -> None:
    name = server.finished(server.tune(job("short lived", epochs=1)))["metadata"]["tunedModel"]
    assert server.call("DELETE", name) == {}
    assert server.call("GET", name, code=404)["error"]["message"] == f"Tuned model {name} does not exist."
    assert not (server.data_dir / "artifacts" / name).exists()
    server.call("DELETE", name, code=404)


@pytest.mark.parametrize(
    ("display_name", "pattern"),
    [
        ("number generator model", "number-generator-model-[a-z0-9]{12}"),
        ("test_number_generator", "testnumbergenerator-[a-z0-9]{12}"),
        ("generate-num-2528", "generatenum2528-[a-z0-9]{12}"),
        ("Test_dataset  Examples model", "testdataset-examples-model-[a-z0-9]{12}"),
        ("", "[a-z][a-z0-9]{11}"),
        ("数字", "[a-z][a-z0-9]{11}"),
        ("-- ünï code", "n-code-[a-z0-9]{12}"),
    ],
)
def test_generated_ids(display_name: str, pattern: str) -> None:
    assert re.fullmatch(pattern, generate_id(display_name))
    assert generate_id(display_name) != generate_id(display_name)


def test_lenient_json(server: Server) -> None:
    """What the tutorial's curl body does, and more: trailing commas, mixed cases, bare objects."""
    text = """{
        display_name: 'lenient', "baseModel": "models/tiny-gemma3",
        "tuning_task": {
            "hyperparameters": {"batchSize": "4", "epoch_count": 1.0, "learningRate": "0.001",},
            "trainingData": {"examples": {"examples": {"textInput": "1", "output": "2",},},},
        },
    }"""
    response = server.http.post("/v1beta/tunedModels", content=text, headers={"content-type": "text/plain"})
    assert response.status_code == 200, response.text
    assert response.json()["metadata"]["totalSteps"] == 1
    server.finished(response.json())


def test_ten_thousand_rows_are_taken(server: Server) -> None:
    body = job("large", epochs=1, batch=16)
    body["tuning_task"]["training_data"]["examples"]["examples"] = EXAMPLES * 1000
    body["tuning_task"]["hyperparameters"] = {}
    operation = server.tune(body)
    assert operation["metadata"]["totalSteps"] == 3125
    model = server.call("GET", operation["metadata"]["tunedModel"])
    assert model["tuningTask"]["hyperparameters"] == {"epochCount": 5, "batchSize": 16, "learningRate": 0.0002}
    server.call("DELETE", model["name"])
