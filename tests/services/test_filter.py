"""Which tuned models a list shows, and the pages it comes in, through the REST API of a running server."""

import base64
from typing import Any

import pytest

from people import Person
from servers import Server, job


class Scene:
    """Two people and the models between them; the first account's own models are not in the way."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ada, self.bob = Person(server, "ada@x"), Person(server, "bob@x")
        self.own = self._model("Ada's numbers", "counts  in ENGLISH", self.ada)
        self.written = self._model("Bob's numbers", "zählt in Übung", self.bob)
        self.read = self._model("Bob's words", "100% of_them", self.bob)
        self.public = self._model("numbers for all", "", self.bob)
        self.both = self._model("public, and Ada's to read", "", self.bob)
        self.hidden = self._model("Bob's secret numbers", "", self.bob)
        self._share(self.written, "WRITER", self.ada.email)
        self._share(self.read, "READER", self.ada.email)
        self._share(self.both, "READER", self.ada.email)
        self._share(self.public, "READER")
        self._share(self.both, "READER")

    def _model(self, name: str, description: str, owner: Person) -> str:
        body = job(name, epochs=1, description=description)
        made: str = owner.call("POST", "tunedModels", body)["metadata"]["tunedModel"]
        return made

    def _share(self, model: str, role: str, email: str = "") -> None:
        body = {"role": role, "granteeType": "USER", "emailAddress": email}
        self.bob.call("POST", f"{model}/permissions", body if email else {"role": role, "granteeType": "EVERYONE"})


@pytest.fixture(scope="module")
def scene(server: Server) -> Scene:
    return Scene(server)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["own", "written", "read", "both"]),
        ("owner:me", ["own"]),
        ("writers:me", ["own", "written"]),
        ("readers:me", ["own", "written", "read", "both"]),
        ("readers:everyone", ["public", "both"]),
        ("readers:me readers:everyone", ["both"]),
        ("owner:me writers:me", ["own"]),
        ("owner:me readers:everyone", []),
        ("numbers", ["own", "written"]),
        ("NUMBERS english", ["own"]),
        ("english numbers writers:me", ["own"]),
        ("numbers  readers:everyone", ["public"]),
        ("übung", ["written"]),
        ('"bob\'s numbers"', ["written"]),
        ('"numbers bob\'s"', []),
        ('"counts  in english"', ["own"]),
        ("0% of_", ["read"]),
        ("0%of_", []),
        ("_of", []),
        ('"owner:me"', []),
        ('""', ["own", "written", "read", "both"]),
        ("   ", ["own", "written", "read", "both"]),
    ],
)
def test_what_a_filter_finds(scene: Scene, text: str, found: list[str]) -> None:
    assert scene.ada.names(filter=text) == [getattr(scene, name) for name in found]


def test_nobody_lists_what_they_may_not_read(scene: Scene, server: Server) -> None:
    eve = Person(server, "eve@x")
    assert eve.names() == []
    assert eve.names(filter="readers:everyone") == [scene.public, scene.both]
    for text in ("owner:me", "numbers", "readers:me", "secret readers:everyone"):
        assert eve.names(filter=text) == []
    assert scene.hidden in scene.bob.names()


@pytest.mark.parametrize("text", ["owner:bob@x", "state:ACTIVE", "readers:all", 'say "hi'])
def test_a_filter_that_means_nothing(scene: Scene, text: str) -> None:
    error = scene.ada.call("GET", "tunedModels", code=400, params={"filter": text})["error"]
    assert error["message"].startswith("* ListTunedModelsRequest.filter: ")


def test_a_patched_name_is_found(scene: Scene) -> None:
    scene.bob.call("PATCH", scene.hidden, {"displayName": "Marmalade"})
    assert scene.bob.names(filter="marmalade") == [scene.hidden]
    assert scene.bob.names(filter="secret") == []
    scene.bob.call("PATCH", f"{scene.hidden}?updateMask=*", {"description": "no name, then"})
    assert "displayName" not in scene.bob.call("GET", scene.hidden)
    assert scene.bob.names(filter="marmalade") == []


def page(person: Person, code: int = 200, **parameters: Any) -> Any:
    return person.call("GET", "tunedModels", code=code, params=parameters)


def test_pages_are_stable_while_models_come_and_go(scene: Scene, server: Server) -> None:
    zoe = Person(server, "zoe@x")
    made = [zoe.call("POST", "tunedModels", job(f"n{n}", epochs=1))["metadata"]["tunedModel"] for n in range(5)]
    first = page(zoe, pageSize=2)
    zoe.call("DELETE", made[1])
    added = zoe.call("POST", "tunedModels", job("late", epochs=1))["metadata"]["tunedModel"]
    second = page(zoe, pageSize=2, pageToken=first["nextPageToken"])
    third = page(zoe, pageSize=2, pageToken=second["nextPageToken"])
    names = [model["name"] for answer in (first, second, third) for model in answer["tunedModels"]]
    assert names == [*made, added]
    assert "nextPageToken" not in third


def test_a_token_is_good_for_its_own_call_only(scene: Scene, server: Server) -> None:
    token = page(scene.ada, pageSize=1, filter="readers:me")["nextPageToken"]
    assert page(scene.ada, pageSize=3, pageToken=token, filter="readers:me")["tunedModels"]
    for person, parameters in [
        (scene.ada, {}),
        (scene.ada, {"filter": "writers:me"}),
        (scene.bob, {"filter": "readers:me"}),
    ]:
        error = page(person, 400, pageToken=token, **parameters)["error"]
        assert error["message"].startswith("* ListTunedModelsRequest.page_token: is not valid for this call")
    scene.bob.call("GET", f"{scene.written}/permissions", code=400, params={"pageToken": token})
    server.call("GET", "models", code=400, params={"pageToken": token})


def test_a_token_cannot_be_tampered_with(scene: Scene) -> None:
    token = page(scene.ada, pageSize=1)["nextPageToken"]
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for place in range(len(raw)):
        forged = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        page(scene.ada, 400, pageToken=base64.urlsafe_b64encode(forged).decode().rstrip("="))
    for forged in ("x", "%%%", token[:-1], token + "AAAA", "é", "A" * 22):
        page(scene.ada, 400, pageToken=forged)
    assert page(scene.ada, pageToken=token)["tunedModels"]


def test_a_token_outlives_the_server(scene: Scene, server: Server) -> None:
    token = page(scene.ada, pageSize=1)["nextPageToken"]
    server.stop()
    server.start()
    assert page(scene.ada, pageToken=token)["tunedModels"][0]["name"] == scene.written
