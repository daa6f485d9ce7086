"""Streams of google.api.HttpBody are files."""

import httpx2
import pytest
from starlette.testclient import TestClient

from api.stand_ins import Backend
from api.test_live_server import HEADERS, serving

EXPORT = "/v1beta/tunedModels/x:export?format=zip"


@pytest.mark.parametrize("query", ["", "&alt=media", "&alt=json"])
def test_a_download_is_the_files_bytes(client: TestClient, query: str) -> None:
    response = client.get(EXPORT + query)
    assert response.content == b"PK\x00\xfftwo!\n"
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == (
        "attachment; filename=\"a _n_me_.zip\"; filename*=UTF-8''a%20%22n%C3%A4me%22.zip"
    )
    assert "content-length" not in response.headers


def test_parameters_reach_the_service(client: TestClient, backend: Backend) -> None:
    client.get(EXPORT)
    assert (backend.tuning.requests[0].name, backend.tuning.requests[0].format) == ("tunedModels/x", "zip")


def test_a_known_length_is_told() -> None:
    with (
        serving(Backend()) as (host, port),
        httpx2.Client(base_url=f"http://{host}:{port}", headers=HEADERS) as http,
    ):
        sized = http.get("/v1beta/tunedModels/sized:export?format=zip")
        assert sized.headers["content-length"] == str(len(sized.content)) == "9"
        only = http.head("/v1beta/tunedModels/sized:export?format=zip")
        assert (only.headers["content-length"], only.content) == ("9", b"")


def test_an_error_before_the_first_byte_is_an_answer(client: TestClient) -> None:
    response = client.get("/v1beta/tunedModels/creating:export?format=zip")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The model is CREATING."


def test_half_a_file_is_never_taken_for_a_whole_one() -> None:
    with (
        serving(Backend()) as (host, port),
        httpx2.Client(base_url=f"http://{host}:{port}", headers=HEADERS) as http,
    ):
        with pytest.raises(httpx2.RemoteProtocolError):
            http.get("/v1beta/tunedModels/broken:export?format=zip")
        assert http.get(EXPORT).status_code == 200
        assert 'TuningService.ExportTunedModel"' in http.get("/metrics").text


def test_messages_are_no_files(client: TestClient) -> None:
    response = client.get("/v1beta/tunedModels/x:watch?alt=media")
    assert response.status_code == 400
    assert "alt=media is for downloads" in response.text
