"""Ratings and thresholds on a live server, whole and streamed; answers are held to texts of the tests' choice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import Server
from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.config import Settings
from tunesmith.engines.base import Chunk
from tunesmith.safety.base import CATEGORIES
from tunesmith.safety.guard import Safety
from tunesmith.safety.lexicon import LexiconRater
from tunesmith.services.text import TextService
from tunesmith.store.database import Database

BASE = "models/tiny-gemma3"
ORDER = [
    f"HARM_CATEGORY_{name}" for name in ("SEXUALLY_EXPLICIT", "HATE_SPEECH", "HARASSMENT", "DANGEROUS_CONTENT")
]
HARMLESS = "The cat sat on the mat and looked at the rain, and the rain fell on the roof of the old house. "
INSULT = "Shut up, you worthless piece of shit."
STRICT = [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_LOW_AND_ABOVE"}]


def body(prompt: str, *answers: str, settings: Any = (), **config: Any) -> dict[str, Any]:
    schema = {"type": "STRING", "enum": list(answers)}
    held = {"responseMimeType": "text/x.enum", "responseSchema": schema} if answers else {"maxOutputTokens": 4}
    return {
        "contents": [{"parts": [{"text": prompt}]}],
        "safetySettings": list(settings),
        "generationConfig": {**held, **config},
    }


def ask(server: Server, asked: dict[str, Any], code: int = 200) -> Any:
    return server.call("POST", f"{BASE}:generateContent", asked, code)


def stream(server: Server, asked: dict[str, Any]) -> list[dict[str, Any]]:
    found = server.http.post(f"/v1beta/{BASE}:streamGenerateContent", json=asked)
    assert found.status_code == 200, found.text
    parts: list[dict[str, Any]] = json.loads(found.text)
    return parts


def probability(ratings: list[dict[str, Any]], category: str = "HARM_CATEGORY_HARASSMENT") -> str:
    assert [rating["category"] for rating in ratings] == ORDER
    return str(next(rating["probability"] for rating in ratings if rating["category"] == category))


def test_prompt_and_answer_are_rated_and_nothing_is_blocked_unasked(server: Server) -> None:
    answer = ask(server, body(INSULT, HARMLESS))
    (candidate,) = answer["candidates"]
    assert candidate["content"]["parts"][0]["text"] == HARMLESS
    assert candidate["finishReason"] == "STOP"
    assert {rating["probability"] for rating in candidate["safetyRatings"]} == {"NEGLIGIBLE"}
    assert probability(candidate["safetyRatings"]) == "NEGLIGIBLE"
    assert probability(answer["promptFeedback"]["safetyRatings"]) == "HIGH"
    assert "blockReason" not in answer["promptFeedback"]
    assert "blocked" not in json.dumps(answer)


def test_a_blocked_prompt_gets_no_candidates(server: Server) -> None:
    for answer in (
        ask(server, body(INSULT, HARMLESS, settings=STRICT)),
        *stream(server, body(INSULT, settings=STRICT)),
    ):
        assert "candidates" not in answer
        assert answer["promptFeedback"]["blockReason"] == "SAFETY"
        blocked = [one["category"] for one in answer["promptFeedback"]["safetyRatings"] if one.get("blocked")]
        assert blocked == ["HARM_CATEGORY_HARASSMENT"]
        assert answer["usageMetadata"]["promptTokenCount"] > 0


def test_a_blocked_candidate_has_no_content(server: Server) -> None:
    answer = ask(server, body("say it", INSULT, settings=STRICT))
    (candidate,) = answer["candidates"]
    assert candidate["finishReason"] == "SAFETY"
    assert "content" not in candidate
    assert [one["category"] for one in candidate["safetyRatings"] if one.get("blocked")] == [ORDER[2]]
    assert "blockReason" not in answer["promptFeedback"]


@pytest.mark.parametrize(
    ("threshold", "blocked"),
    [("BLOCK_LOW_AND_ABOVE", True), ("BLOCK_MEDIUM_AND_ABOVE", True), ("BLOCK_ONLY_HIGH", False), ("OFF", False)],
)
def test_thresholds(server: Server, threshold: str, blocked: bool) -> None:
    answer = ask(server, body("say it", "Fuck you.", settings=[{**STRICT[0], "threshold": threshold}]))
    (candidate,) = answer["candidates"]
    assert probability(candidate["safetyRatings"]) == "MEDIUM"
    assert (candidate["finishReason"] == "SAFETY") is blocked
    other = [{"category": "HARM_CATEGORY_HATE_SPEECH", "threshold": threshold}]
    assert ask(server, body("say it", "Fuck you.", settings=other))["candidates"][0]["finishReason"] == "STOP"


def test_a_stream_ends_where_it_becomes_harmful(server: Server) -> None:
    answer = HARMLESS * 2 + INSULT + HARMLESS * 3
    pieces = stream(server, body("say it", answer, settings=STRICT))
    *before, last = [piece["candidates"][0] for piece in pieces]
    text = "".join(piece["content"]["parts"][0]["text"] for piece in before)
    assert text.startswith(HARMLESS * 2)
    assert len(text) < len(answer) - len(HARMLESS)
    assert last["finishReason"] == "SAFETY"
    assert "content" not in last
    assert probability(last["safetyRatings"]) in ("MEDIUM", "HIGH")
    assert probability(pieces[0]["promptFeedback"]["safetyRatings"]) == "NEGLIGIBLE"


def test_candidates_are_judged_one_by_one(server: Server) -> None:
    several = {"candidateCount": 8, "temperature": 2.0, "topP": 1.0, "topK": 0, "seed": 3}
    answer = ask(server, body("say it", INSULT, HARMLESS, settings=STRICT, **several))
    reasons = [candidate["finishReason"] for candidate in answer["candidates"]]
    assert [candidate["index"] for candidate in answer["candidates"]] == list(range(8))
    assert set(reasons) == {"STOP", "SAFETY"}
    texts = [candidate.get("content") for candidate in answer["candidates"]]
    assert [text is None for text in texts] == [reason == "SAFETY" for reason in reasons]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (STRICT * 2, "safety_settings[1].category: is set twice"),
        ([{"category": "HARM_CATEGORY_MEDICAL", "threshold": "OFF"}], "must be one of"),
        ([{"threshold": "OFF"}], "safety_settings[0].category"),
    ],
)
def test_settings_that_mean_nothing_are_refused(server: Server, settings: Any, told: str) -> None:
    assert told in ask(server, body("say it", HARMLESS, settings=settings), 400)["error"]["message"]


def test_openai_s_surface_calls_it_a_content_filter(server: Server) -> None:
    schema = {"type": "object", "properties": {"say": {"enum": [INSULT]}}, "required": ["say"]}
    asked = {
        "model": BASE,
        "messages": [{"role": "user", "content": "say it"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
        "google": {"safety_settings": STRICT},
    }
    (choice,) = server.http.post("/v1beta/openai/chat/completions", json=asked).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", "")
    asked["messages"] = [{"role": "user", "content": INSULT}]
    (choice,) = server.http.post("/v1beta/openai/chat/completions", json=asked).json()["choices"]
    assert choice["finish_reason"] == "content_filter"


def test_off(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    off = {**tiny, "TUNESMITH_SAFETY_RATER": "off"}
    with Server(tmp_path_factory.mktemp("data"), off, "--workers", "0") as server:
        answer = ask(server, body(INSULT, INSULT, settings=STRICT))
    assert answer["candidates"][0]["content"]["parts"][0]["text"] == INSULT
    assert "safetyRatings" not in json.dumps(answer)
    assert "promptFeedback" not in answer


def test_a_model_of_the_catalog_may_rate(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    model = {**tiny, "TUNESMITH_SAFETY_RATER": BASE, "TUNESMITH_SAFETY_THRESHOLD": "BLOCK_LOW_AND_ABOVE"}
    data_dir = tmp_path_factory.mktemp("data")
    with Server(data_dir, model, "--workers", "0") as server:
        answer = ask(server, body("say it", HARMLESS))
        log = (data_dir.parent / f"{data_dir.name}.log").read_text()
    assert [rating["category"] for rating in answer["candidates"][0]["safetyRatings"]] == ORDER
    assert "says neither Yes nor No" in log  # the tiny model has no word for either: it is no rater, and says so


def test_a_rater_that_is_not_in_the_catalog(tiny: dict[str, str], data_dir: Any) -> None:
    unknown = {**tiny, "TUNESMITH_SAFETY_RATER": "models/none-such"}
    told = Server(data_dir, unknown).run("serve", "--port", "0", "--grpc-port", "-1", code=1)
    assert "models/none-such" in told


def test_generate_text_is_rated_and_blocked_by_palm_s_categories(server: Server) -> None:
    settings = [
        {"category": f"HARM_CATEGORY_{name}", "threshold": "BLOCK_LOW_AND_ABOVE"}
        for name in ("TOXICITY", "VIOLENCE")
    ]
    asked = {"prompt": {"text": INSULT}, "maxOutputTokens": 4}
    (candidate,) = server.call("POST", f"{BASE}:generateText", asked)["candidates"]
    assert probability(candidate["safetyRatings"]) == "NEGLIGIBLE"
    answer = server.call("POST", f"{BASE}:generateText", {**asked, "safetySettings": settings})
    assert "candidates" not in answer
    assert answer["filters"] == [{"reason": "SAFETY"}]
    (feedback,) = answer["safetyFeedback"]
    assert feedback["rating"] == {"category": ORDER[2], "probability": "HIGH", "blocked": True}
    assert feedback["setting"] == {"category": ORDER[2], "threshold": "BLOCK_LOW_AND_ABOVE"}
    wrong = [settings[1], {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}, settings[0]]
    told = server.call("POST", f"{BASE}:generateText", {**asked, "safetySettings": wrong}, 400)
    assert "GenerateTextRequest.safety_settings[2].category: is set twice" in told["error"]["message"]


class Saying:
    """An engine that says given texts, as what a tuned model says cannot be relied on."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def generate(self, *_asked: Any) -> Iterator[Chunk]:
        for index, text in enumerate(self._texts):
            yield Chunk(text, 2, 9, protos.Candidate.STOP, index)


def test_blocked_texts_are_left_out(tmp_path: Path) -> None:
    engine: Any = Saying(INSULT, HARMLESS)
    catalog = Catalog.load(Settings(data_dir=tmp_path))
    strict = Safety(LexiconRater(), "BLOCK_LOW_AND_ABOVE")
    service = TextService(Database(f"sqlite:///{tmp_path / 'test.db'}"), engine, catalog, strict)
    asked = protos.GenerateTextRequest(model="models/gemma-3-270m", prompt={"text": "say it"}, candidate_count=2)
    answer = service.generate_text(asked, Caller("ada@example.com"))
    assert [candidate.output for candidate in answer.candidates] == [HARMLESS]
    assert [one.reason for one in answer.filters] == [protos.ContentFilter.SAFETY]
    assert [one.rating.category for one in answer.safety_feedback] == [CATEGORIES[2]]
