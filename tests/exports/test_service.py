"""ExportTunedModel on a running server: who may, what comes, what is said when nothing does."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from servers import Server, job
from tunesmith import protos
from tunesmith.app import Parts
from tunesmith.caller import Caller
from tunesmith.config import Settings
from tunesmith.errors import Cancelled, PermissionDenied, ResourceExhausted
from tunesmith.services.exports import Exports

SAFETENSORS = "counts-safetensors"
BOB = "bob@example.com"


@pytest.fixture(scope="module")
def counts(server: Server) -> str:
    """A tuned model that is ACTIVE; bob may read it."""
    server.finished(server.tune(job("Counts"), tunedModelId="counts"))
    server.run("accounts", "create", BOB)
    share(server, "READER")
    return "tunedModels/counts"


def share(server: Server, role: str) -> None:
    permission = {"granteeType": "USER", "emailAddress": BOB, "role": role}
    server.call("POST", "tunedModels/counts/permissions", permission)


def recorded(server: Server) -> set[tuple[str, str]]:
    """The outcomes and formats of the exports that are on record."""
    records = [json.loads(line) for line in server.run("audit", "--json").splitlines()]
    exports = [record for record in records if record["action"] == "ExportTunedModel"]
    assert {record["resource"] for record in exports} == {"tunedModels/counts"}
    return {(record["outcome"], record["detail"]) for record in exports}


def test_a_download(server: Server, counts: str) -> None:
    response = server.http.get(f"/v1beta/{counts}:export", params={"format": "safetensors"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/zip"
    assert 'filename="counts-safetensors.zip"' in response.headers["content-disposition"]
    assert int(response.headers["content-length"]) == len(response.content)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert f"{SAFETENSORS}/model.safetensors" in archive.namelist()
    assert ("OK", "SAFETENSORS") in recorded(server)


def test_over_grpc(server: Server, counts: str) -> None:
    token = server.run("token", "admin@localhost").strip()
    with grpc.insecure_channel(server.grpc) as channel:
        export = channel.unary_stream(
            "/tunesmith.v1beta.TuningService/ExportTunedModel",
            request_serializer=protos.ExportTunedModelRequest.SerializeToString,
            response_deserializer=protos.HttpBody.FromString,
        )
        asked = protos.ExportTunedModelRequest(name=counts, format="PEFT")
        first, *others = export(asked, metadata=[("authorization", f"Bearer {token}")])
    about = protos.Download()
    assert first.extensions[0].Unpack(about)
    assert about.filename == "counts-peft.zip"
    assert about.size == sum(len(body.data) for body in (first, *others))


def test_who_may(server: Server, counts: str) -> None:
    bob = {"authorization": f"Bearer {server.run('token', BOB).strip()}"}
    path = f"{counts}:export?format=PEFT"
    refused = server.http.get(f"/v1beta/{path}", headers=bob)
    assert refused.status_code == 403
    assert "it takes the role WRITER, and yours is READER" in refused.text
    assert ("PERMISSION_DENIED", "PEFT") in recorded(server)
    permission = server.call("GET", f"{counts}/permissions")["permissions"]
    name = next(one["name"] for one in permission if one.get("emailAddress") == BOB)
    server.call("PATCH", f"{name}?updateMask=role", {"role": "WRITER"})
    assert server.http.get(f"/v1beta/{path}", headers=bob).status_code == 200


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("format=onnx", "format: must be one of PEFT, SAFETENSORS, GGUF, OLLAMA, not 'onnx'"),
        ("format=gguf&quantization=q9", "quantization: must be one of F32, F16, BF16, Q8_0, not 'q9'"),
        ("format=peft&quantization=f16", "quantization: is for GGUF and OLLAMA; PEFT has the weights as they are"),
        ("format=gguf", "This model cannot be exported as GGUF: its layer_types in config.json"),
    ],
)
def test_what_cannot_be_had_is_named(server: Server, counts: str, query: str, said: str) -> None:
    response = server.http.get(f"/v1beta/{counts}:export?{query}")
    assert response.status_code == 400
    assert said in json.dumps(response.json(), ensure_ascii=False).replace('\\"', '"')


def test_a_model_that_is_not_active(server: Server) -> None:
    operation = server.tune(job("slow", epochs=50), tunedModelId="slow")
    response = server.http.get("/v1beta/tunedModels/slow:export?format=peft")
    assert "is in state CREATING: wait until its operation" in response.text
    server.http.post(f"/v1beta/{operation['name']}:cancel")
    server.finished(operation)


def test_the_command(server: Server, counts: str, tmp_path: Path) -> None:
    url = ["--url", server.url]
    shown = server.run("export", "counts", "--format", "peft", *url, cwd=tmp_path)
    assert "counts-peft.zip is written." in shown
    assert zipfile.is_zipfile(tmp_path / "counts-peft.zip")
    server.run("export", counts, "--format", "safetensors", "--out", str(tmp_path / "all.zip"), *url)
    assert zipfile.is_zipfile(tmp_path / "all.zip")
    assert "cannot be exported as GGUF" in server.run("export", counts, *url, code=1, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"counts-peft.zip", "all.zip"}


@pytest.fixture
def exports(counts: str, server: Server) -> Iterator[Exports]:
    """The service's own part, on the server's data, for what depends on when something happens."""
    where = {"data_dir": server.data_dir, "cache_dir": server.environment["TUNESMITH_CACHE_DIR"]}
    parts = Parts.open(Settings.load(**where, catalog=server.environment["TUNESMITH_CATALOG"]))
    found = parts.artifacts, parts.catalog, parts.settings.cache_dir
    yield Exports(parts.database, *found, parts.audit, most=1)
    parts.audit.close()
    parts.database.close()


def test_a_client_that_leaves_ends_the_work(exports: Exports, counts: str) -> None:
    caller = Caller("admin@localhost")
    bodies = exports.export_tuned_model(protos.ExportTunedModelRequest(name=counts, format="peft"), caller)
    caller.gone.set()
    with pytest.raises(Cancelled):
        next(bodies)


def test_an_account_has_so_many_under_way(exports: Exports, counts: str) -> None:
    asked, caller = protos.ExportTunedModelRequest(name=counts, format="peft"), Caller("admin@localhost")
    first = exports.export_tuned_model(asked, caller)
    next(first)
    with pytest.raises(ResourceExhausted, match="exports_per_account"):
        next(exports.export_tuned_model(asked, caller))
    with pytest.raises(PermissionDenied):
        next(exports.export_tuned_model(asked, Caller("eve@example.com")))
    first.close()
    assert next(exports.export_tuned_model(asked, caller)).data
