"""TextService: the legacy PaLM calls, answered by the same models."""

from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Engine
from tunesmith.errors import InvalidArgument
from tunesmith.services.targets import LONGEST_INPUT, Targets, sampling
from tunesmith.store.database import Database


class TextService:
    """google.ai.generativelanguage.v1beta.TextService, without its embeddings."""

    def __init__(self, database: Database, engine: Engine, catalog: Catalog) -> None:
        self._targets, self._engine = Targets(database, catalog), engine

    def generate_text(self, request: protos.GenerateTextRequest, caller: Caller) -> protos.GenerateTextResponse:
        """Return what the model makes of a prompt, a candidate after the other."""
        target = self._targets.find(request.model, caller, "generateText")
        turns = _turns(request.prompt, "GenerateTextRequest")
        chosen = sampling(request, target, "GenerateTextRequest")
        texts = [""] * chosen.candidates
        who = caller.gone, caller.account
        for chunk in self._engine.generate(target.base, target.adapter, turns, chosen, *who):
            texts[chunk.index] += chunk.text
        return protos.GenerateTextResponse(candidates=[protos.TextCompletion(output=text) for text in texts])

    def count_text_tokens(
        self, request: protos.CountTextTokensRequest, caller: Caller
    ) -> protos.CountTextTokensResponse:
        """Return how many tokens a prompt is, as the model sees it."""
        target = self._targets.find(request.model, caller, "countTextTokens")
        turns = _turns(request.prompt, "CountTextTokensRequest")
        count = self._engine.count_tokens(target.base, target.adapter, turns)
        return protos.CountTextTokensResponse(token_count=count)


def _turns(prompt: protos.TextPrompt, request: str) -> list[Turn]:
    path = f"{request}.prompt.text"
    if not prompt.text:
        raise InvalidArgument.at([(path, "text is not specified")])
    if len(prompt.text) > LONGEST_INPUT:
        reason = f"must be at most {LONGEST_INPUT:,} characters long, not {len(prompt.text):,}"
        raise InvalidArgument.at([(path, reason)])
    return [Turn("user", prompt.text)]
