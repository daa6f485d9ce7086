"""The tutorial on real weights: its curl and its Python, as written, against a running server."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import requests

from servers import Server, command
from tunesmith.demo import TUNED_MODEL

pytestmark = pytest.mark.weights

HERE = Path(__file__).parent


RATED = ("SEXUALLY_EXPLICIT", "HATE_SPEECH", "HARASSMENT", "DANGEROUS_CONTENT")
"""In the order of the hosted service."""


def test_the_curl_blocks(real_server: Server, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "access_token": real_server.run("token", "admin@localhost").strip(),
        "project_id": "my-project-id",
        "base_url": real_server.url,
    }

    def run(script: str) -> str:
        shell = ["bash", str(HERE / script)]
        done = subprocess.run(shell, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    run("create.sh")
    first_page = json.loads((tmp_path / "tunemodel.json").read_text())
    assert first_page["metadata"]["totalSteps"] == 38
    environment["modelname"] = first_page["metadata"]["tunedModel"]
    assert run("state.sh").strip() == '"state": "CREATING",'
    done = real_server.finished(first_page)
    assert done["metadata"]["snapshots"][-1]["step"] == 38
    assert run("state.sh").strip() == '"state": "ACTIVE",'
    candidate = json.loads(run("generate.sh"))["candidates"][0]
    ratings = [rating["category"] for rating in candidate.pop("safetyRatings")]
    assert ratings == [f"HARM_CATEGORY_{name}" for name in RATED]
    assert candidate == {
        "content": {"parts": [{"text": "LXIV"}], "role": "model"},
        "finishReason": "STOP",
        "index": 0,
    }


def test_the_python_blocks(real_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    access_token = real_server.run("token", "admin@localhost").strip()
    base_url = real_server.url
    project = "[Enter your project-id here]"
    headers = {
        "Authorization": "Bearer " + access_token,
        "Content-Type": "application/json",
        "x-goog-user-project": project,
    }
    result = requests.get(url=f"{base_url}/v1beta/tunedModels", headers=headers, timeout=60)
    result.json()
    operation = requests.post(url=f"{base_url}/v1beta/tunedModels", headers=headers, json=TUNED_MODEL, timeout=60)
    assert operation.json()["metadata"]["totalSteps"] == 19
    name = operation.json()["metadata"]["tunedModel"]
    tuned_model = requests.get(url=f"{base_url}/v1beta/{name}", headers=headers, timeout=60)
    assert tuned_model.json()["state"] == "CREATING"

    # The tutorial's loop; it sleeps five seconds where this one sleeps a fifth of one.
    op_json = operation.json()
    response = op_json.get("response")
    error = op_json.get("error")
    while response is None and error is None:
        time.sleep(0.2)
        operation = requests.get(url=f"{base_url}/v1/{op_json['name']}", headers=headers, timeout=60)
        op_json = operation.json()
        response = op_json.get("response")
        error = op_json.get("error")
        percent = op_json["metadata"].get("completedPercent")
        if percent is not None:
            print(f"{percent:.2f}% - {op_json['metadata']['snapshots'][-1]}")
            print()
    if error is not None:
        raise Exception(error)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("100.00% - {'step': 19, 'epoch': 5, 'meanLoss': ")

    for text, expected in (("LXIII", "LXIV"), ("六", "七")):
        m = requests.post(
            url=f"{base_url}/v1beta/{name}:generateContent",
            headers=headers,
            json={"contents": [{"parts": [{"text": text}]}]},
            timeout=60,
        )
        answer = m.json()
        assert answer["candidates"][0]["content"]["parts"][0]["text"] == expected
        assert answer["candidates"][0]["finishReason"] == "STOP"
        usage = answer["usageMetadata"]
        assert usage["promptTokenCount"] + usage["candidatesTokenCount"] == usage["totalTokenCount"]
        assert answer["modelVersion"].startswith("gemma-3-270m@")


def test_the_stream_adds_up_to_the_answer(real_server: Server) -> None:
    body = {
        "contents": [{"parts": [{"text": "The first man on the moon"}]}],
        "generationConfig": {"maxOutputTokens": 12},
    }
    whole = real_server.call("POST", "models/gemma-3-270m:generateContent", body)
    array = real_server.call("POST", "models/gemma-3-270m:streamGenerateContent", body)
    events = real_server.http.post("/v1beta/models/gemma-3-270m:streamGenerateContent?alt=sse", json=body).text
    parsed = [json.loads(event.removeprefix("data: ")) for event in events.split("\r\n\r\n") if event]
    for stream in (array, parsed):
        texts = [part["text"] for chunk in stream for part in chunk["candidates"][0]["content"]["parts"]]
        assert len(texts) > 5
        assert "".join(texts) == whole["candidates"][0]["content"]["parts"][0]["text"]
        assert stream[-1]["candidates"][0]["finishReason"] == "MAX_TOKENS"
        assert stream[-1]["usageMetadata"] == whole["usageMetadata"]
    assert whole["usageMetadata"]["candidatesTokenCount"] == 12


def test_make_demo(real_weights: None, tmp_path: Path) -> None:
    """What `make demo` runs."""
    done = subprocess.run(
        [*command("demo"), "--data-dir", str(tmp_path / "data")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nLXIII -> LXIV\n六 -> 七\n" in done.stdout
    assert "step 19/19" in done.stdout
