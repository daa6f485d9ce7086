"""TextService: the legacy PaLM calls, answered by the same models."""

from collections.abc import Iterable

from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Engine
from tunesmith.errors import InvalidArgument
from tunesmith.safety.base import category
from tunesmith.safety.guard import Guard, Safety
from tunesmith.services.targets import LONGEST_INPUT, Targets, sampling
from tunesmith.store.database import Database

_RATED = {
    category("DEROGATORY"): category("HATE_SPEECH"),
    category("TOXICITY"): category("HARASSMENT"),
    category("SEXUAL"): category("SEXUALLY_EXPLICIT"),
    category("DANGEROUS"): category("DANGEROUS_CONTENT"),
}
"""PaLM's categories, as those that came after them."""
_UNRATED = (category("VIOLENCE"), category("MEDICAL"))


class TextService:
    """google.ai.generativelanguage.v1beta.TextService, without its embeddings."""

    def __init__(self, database: Database, engine: Engine, catalog: Catalog, safety: Safety | None = None) -> None:
        self._targets, self._engine = Targets(database, catalog), engine
        self._safety = safety or Safety()

    def generate_text(self, request: protos.GenerateTextRequest, caller: Caller) -> protos.GenerateTextResponse:
        """Return what the model makes of a prompt, a candidate after the other, without those that are blocked."""
        target = self._targets.find(request.model, caller, "generateText")
        turns = _turns(request.prompt, "GenerateTextRequest")
        chosen = sampling(request, target, "GenerateTextRequest")
        settings = _settings(request.safety_settings)
        path = "GenerateTextRequest.safety_settings"
        guard = self._safety.guard(settings, request.prompt.text, caller, path, _UNRATED)
        if guard and guard.blocks_prompt:
            return _blocked(guard, guard.feedback.safety_ratings)
        texts = [""] * chosen.candidates
        who = caller.gone, caller.account
        for chunk in self._engine.generate(target.base, target.adapter, turns, chosen, *who):
            texts[chunk.index] += chunk.text
        response = protos.GenerateTextResponse()
        for text in texts:
            ratings = guard.rated(text) if guard else []
            if guard and any(rating.blocked for rating in ratings):
                response.MergeFrom(_blocked(guard, ratings))
            else:
                response.candidates.add(output=text, safety_ratings=ratings)
        return response

    def count_text_tokens(
        self, request: protos.CountTextTokensRequest, caller: Caller
    ) -> protos.CountTextTokensResponse:
        """Return how many tokens a prompt is, as the model sees it."""
        target = self._targets.find(request.model, caller, "countTextTokens")
        turns = _turns(request.prompt, "CountTextTokensRequest")
        count = self._engine.count_tokens(target.base, target.adapter, turns)
        return protos.CountTextTokensResponse(token_count=count)


def _blocked(guard: Guard, ratings: Iterable[protos.SafetyRating]) -> protos.GenerateTextResponse:
    """Return what is said in the place of a text that is blocked."""
    reason = protos.ContentFilter(reason=protos.ContentFilter.SAFETY)
    return protos.GenerateTextResponse(filters=[reason], safety_feedback=guard.feedback_on(ratings))


def _settings(settings: Iterable[protos.SafetySetting]) -> list[protos.SafetySetting]:
    """Return settings with PaLM's categories as those that are rated, where there is one."""
    return [
        protos.SafetySetting(category=_RATED.get(one.category, one.category), threshold=one.threshold)
        for one in settings
    ]


def _turns(prompt: protos.TextPrompt, request: str) -> list[Turn]:
    path = f"{request}.prompt.text"
    if not prompt.text:
        raise InvalidArgument.at([(path, "text is not specified")])
    if len(prompt.text) > LONGEST_INPUT:
        reason = f"must be at most {LONGEST_INPUT:,} characters long, not {len(prompt.text):,}"
        raise InvalidArgument.at([(path, reason)])
    return [Turn("user", prompt.text)]
