"""GenerativeService: answers from base models and tuned models, and embeddings from base models."""

import math
import secrets
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Chunk, Engine, Sampling, TokenLogprob
from tunesmith.errors import InvalidArgument, Unimplemented
from tunesmith.safety.guard import Safety
from tunesmith.services.response_format import constraint
from tunesmith.services.targets import Target, Targets, conversation, question, sampling, text_of
from tunesmith.store.database import Database

MOST_EMBEDDINGS = 100
MOST_PENALTY = 2
MOST_LOGPROBS = 20
_REQUEST = "GenerateContentRequest"


class GenerativeService:
    """The inference half of google.ai.generativelanguage.v1beta.GenerativeService."""

    def __init__(
        self, database: Database, engine: Engine, catalog: Catalog, cache_dir: Path, safety: Safety | None = None
    ) -> None:
        self._targets, self._engine = Targets(database, catalog), engine
        self._cache_dir, self._safety = cache_dir, safety or Safety()

    def generate_content(
        self, request: protos.GenerateContentRequest, caller: Caller
    ) -> protos.GenerateContentResponse:
        """Return a whole answer, with all its candidates."""
        candidates: dict[int, protos.Candidate] = {}
        for response in self.stream_generate_content(request, caller):
            for piece in response.candidates:
                if piece.index in candidates and piece.finish_reason != protos.Candidate.SAFETY:
                    _append(candidates[piece.index], piece)
                else:
                    candidates[piece.index] = piece
        del response.candidates[:]
        response.candidates.extend(candidates[index] for index in sorted(candidates))
        return response

    def stream_generate_content(
        self, request: protos.GenerateContentRequest, caller: Caller
    ) -> Iterator[protos.GenerateContentResponse]:
        """Yield an answer piece by piece; each candidate's last piece has its finish reason."""
        _refuse_unimplemented(request, _REQUEST)
        target = self._targets.find(request.model, caller, "generateContent")
        turns = _turns(request, _REQUEST)
        question(turns, request.contents, f"{_REQUEST}.contents")
        chosen = _sampling(request.generation_config, target, f"{_REQUEST}.generation_config")
        version = weights.get(target.base, self._cache_dir).version
        response_id = secrets.token_urlsafe(12)
        pieces = self._pieces(target, turns, chosen, caller, version, response_id)
        asked = "\n".join(turn.text for turn in turns if turn.role != "model")
        guard = self._safety.guard(request.safety_settings, asked, caller, f"{_REQUEST}.safety_settings")
        if guard is None:
            yield from pieces
        elif guard.blocks_prompt:
            tokens = self._engine.count_tokens(target.base, target.adapter, turns)
            yield _blocked(guard.feedback, tokens, version, response_id)
        else:
            yield from guard.watched(pieces, chosen.candidates)

    def _pieces(
        self,
        target: Target,
        turns: list[Turn],
        chosen: Sampling,
        caller: Caller,
        version: str,
        response_id: str,
    ) -> Generator[protos.GenerateContentResponse]:
        """Yield what the engine makes, a piece of one candidate at a time."""
        output_tokens, logprobs = [0] * chosen.candidates, [0.0] * chosen.candidates
        who = caller.gone, caller.account
        for chunk in self._engine.generate(target.base, target.adapter, turns, chosen, *who):
            output_tokens[chunk.index] = chunk.output_tokens
            logprobs[chunk.index] += sum(place.chosen.logprob for place in chunk.places)
            response = _response(chunk, sum(output_tokens), version, response_id)
            if chosen.logprobs is not None:
                (candidate,) = response.candidates
                candidate.logprobs_result.CopyFrom(_logprobs_result(chunk))
                if chunk.finish_reason and chunk.output_tokens:
                    candidate.avg_logprobs = logprobs[chunk.index] / chunk.output_tokens
            yield response

    def count_tokens(self, request: protos.CountTokensRequest, caller: Caller) -> protos.CountTokensResponse:
        """Return how many tokens a prompt is, as the model sees it."""
        path = "CountTokensRequest"
        if request.HasField("generate_content_request"):
            path += ".generate_content_request"
            if request.contents:
                raise InvalidArgument.at([(path, "give contents or generate_content_request, not both")])
            asked = request.generate_content_request
            _refuse_unimplemented(asked, path)
        else:
            asked = protos.GenerateContentRequest(contents=request.contents)
        target = self._targets.find(request.model, caller, "countTokens")
        turns = _turns(asked, path)
        return protos.CountTokensResponse(
            total_tokens=self._engine.count_tokens(target.base, target.adapter, turns)
        )

    def embed_content(self, request: protos.EmbedContentRequest, caller: Caller) -> protos.EmbedContentResponse:
        """Return a text's embedding: the mean of the base model's last hidden states, of length 1.

        These models were not trained to embed: texts that are alike lie near each other, but a model made for
        search does better. A title goes before the text; the task type changes nothing.
        """
        base = self._targets.base(request.model, "embedContent")
        text = _passage(request, "EmbedContentRequest")
        (vector,) = self._engine.embed(base, [text], caller.gone, caller.account)
        return protos.EmbedContentResponse(embedding=_embedding(vector, request, "EmbedContentRequest"))

    def batch_embed_contents(
        self, request: protos.BatchEmbedContentsRequest, caller: Caller
    ) -> protos.BatchEmbedContentsResponse:
        """Return the embeddings of several texts, in their order; see `embed_content`."""
        path = "BatchEmbedContentsRequest.requests"
        base = self._targets.base(request.model, "batchEmbedContents")
        if not 1 <= len(request.requests) <= MOST_EMBEDDINGS:
            reason = f"must be between 1 and {MOST_EMBEDDINGS} requests, not {len(request.requests)}"
            raise InvalidArgument.at([(path, reason)])
        for number, one in enumerate(request.requests):
            if one.model not in ("", request.model):
                raise InvalidArgument.at(
                    [(f"{path}[{number}].model", f"must be {request.model} as the batch's, not {one.model!r}")]
                )
        texts = [_passage(one, f"{path}[{number}]") for number, one in enumerate(request.requests)]
        vectors = self._engine.embed(base, texts, caller.gone, caller.account)
        return protos.BatchEmbedContentsResponse(
            embeddings=[
                _embedding(vector, one, f"{path}[{number}]")
                for number, (one, vector) in enumerate(zip(request.requests, vectors, strict=True))
            ]
        )


def _turns(request: protos.GenerateContentRequest, path: str) -> list[Turn]:
    system = request.system_instruction if request.HasField("system_instruction") else None
    return conversation(request.contents, f"{path}.contents", system, f"{path}.system_instruction")


def _passage(request: protos.EmbedContentRequest, path: str) -> str:
    text = text_of(request.content, f"{path}.content")
    if not text:
        raise InvalidArgument.at([(f"{path}.content", "the text is empty")])
    return f"{request.title}\n{text}" if request.title else text


def _embedding(vector: list[float], request: protos.EmbedContentRequest, path: str) -> protos.ContentEmbedding:
    """Return a vector, or its beginning brought to length 1 again."""
    if request.HasField("output_dimensionality"):
        size = request.output_dimensionality
        if not 1 <= size <= len(vector):
            reason = f"must be between 1 and {len(vector)}, the model's own, not {size}"
            raise InvalidArgument.at([(f"{path}.output_dimensionality", reason)])
        length = math.hypot(*vector[:size]) or 1.0
        vector = [value / length for value in vector[:size]]
    return protos.ContentEmbedding(values=vector)


def _sampling(config: protos.GenerationConfig, target: Target, path: str) -> Sampling:
    """Return how tokens are chosen, with what the older calls cannot ask for.

    Raises:
        InvalidArgument: Names every value that is out of range.
    """
    bad = {
        "presence_penalty": (
            -MOST_PENALTY <= config.presence_penalty <= MOST_PENALTY,
            f"must be between -{MOST_PENALTY} and {MOST_PENALTY}, not {config.presence_penalty:g}",
        ),
        "frequency_penalty": (
            -MOST_PENALTY <= config.frequency_penalty <= MOST_PENALTY,
            f"must be between -{MOST_PENALTY} and {MOST_PENALTY}, not {config.frequency_penalty:g}",
        ),
        "logprobs": (
            0 <= config.logprobs <= MOST_LOGPROBS,
            f"must be between 0 and {MOST_LOGPROBS}, not {config.logprobs}",
        ),
        "response_logprobs": (
            config.response_logprobs or not config.HasField("logprobs"),
            "must be true when logprobs is set",
        ),
    }
    if violations := [(f"{path}.{field}", reason) for field, (fine, reason) in bad.items() if not fine]:
        raise InvalidArgument.at(violations)
    return replace(
        sampling(config, target, path),
        seed=config.seed if config.HasField("seed") else None,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        logprobs=config.logprobs if config.response_logprobs else None,
        constraint=constraint(config, path),
    )


def _refuse_unimplemented(request: protos.GenerateContentRequest, path: str) -> None:
    """Name what the request asks for and this server does not do, instead of doing without it.

    Raises:
        InvalidArgument: It asks for what the models cannot do: call functions, write anything but text.
        Unimplemented: It names cached content.
    """
    text_only = all(one == protos.GenerationConfig.TEXT for one in request.generation_config.response_modalities)
    cannot = {
        "tools": (bool(request.tools), "these models do not call functions: leave the tools out"),
        "tool_config": (request.HasField("tool_config"), "these models do not call functions: leave it out"),
        "generation_config.response_modalities": (not text_only, "must be TEXT, which is all these models write"),
    }
    if violations := [(f"{path}.{field}", reason) for field, (asked, reason) in cannot.items() if asked]:
        raise InvalidArgument.at(violations)
    if request.cached_content:
        raise Unimplemented(f"{path}.cached_content is not implemented by this server.")


def _response(chunk: Chunk, output_tokens: int, version: str, response_id: str) -> protos.GenerateContentResponse:
    response = protos.GenerateContentResponse(
        model_version=version,
        response_id=response_id,
        usage_metadata=protos.GenerateContentResponse.UsageMetadata(
            prompt_token_count=chunk.prompt_tokens,
            candidates_token_count=output_tokens,
            total_token_count=chunk.prompt_tokens + output_tokens,
        ),
    )
    candidate = response.candidates.add(index=chunk.index, finish_reason=chunk.finish_reason)
    candidate.content.role = "model"
    candidate.content.parts.add(text=chunk.text)
    return response


def _logprobs_result(chunk: Chunk) -> protos.LogprobsResult:
    result = protos.LogprobsResult(log_probability_sum=sum(place.chosen.logprob for place in chunk.places))
    for place in chunk.places:
        result.chosen_candidates.append(_logprob(place.chosen))
        if place.top:
            result.top_candidates.add(candidates=[_logprob(one) for one in place.top])
    return result


def _logprob(one: TokenLogprob) -> protos.LogprobsResult.Candidate:
    return protos.LogprobsResult.Candidate(token=one.text, token_id=one.token, log_probability=one.logprob)


def _blocked(
    feedback: protos.GenerateContentResponse.PromptFeedback, tokens: int, version: str, response_id: str
) -> protos.GenerateContentResponse:
    """Return the answer to a prompt that gets none."""
    usage = protos.GenerateContentResponse.UsageMetadata(prompt_token_count=tokens, total_token_count=tokens)
    return protos.GenerateContentResponse(
        prompt_feedback=feedback, usage_metadata=usage, model_version=version, response_id=response_id
    )


def _append(whole: protos.Candidate, piece: protos.Candidate) -> None:
    """Add a candidate's next piece to what there is of it."""
    whole.content.parts[0].text += piece.content.parts[0].text
    whole.finish_reason, whole.avg_logprobs = piece.finish_reason, piece.avg_logprobs
    del whole.safety_ratings[:]  # each piece has those of all until then
    whole.safety_ratings.extend(piece.safety_ratings)
    if piece.HasField("logprobs_result"):
        total = whole.logprobs_result.log_probability_sum + piece.logprobs_result.log_probability_sum
        whole.logprobs_result.MergeFrom(piece.logprobs_result)
        whole.logprobs_result.log_probability_sum = total
