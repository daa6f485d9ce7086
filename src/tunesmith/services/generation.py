"""GenerativeService: answers from base models and tuned models, and embeddings from base models."""

import math
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Chunk, Engine
from tunesmith.errors import InvalidArgument, Unimplemented
from tunesmith.services.targets import Targets, conversation, question, sampling, text_of
from tunesmith.store.database import Database

MOST_EMBEDDINGS = 100
_REQUEST = "GenerateContentRequest"


class GenerativeService:
    """The inference half of google.ai.generativelanguage.v1beta.GenerativeService."""

    def __init__(self, database: Database, engine: Engine, catalog: Catalog, cache_dir: Path) -> None:
        self._targets, self._engine = Targets(database, catalog), engine
        self._cache_dir = cache_dir

    def generate_content(
        self, request: protos.GenerateContentRequest, caller: Caller
    ) -> protos.GenerateContentResponse:
        """Return a whole answer, with all its candidates."""
        texts: dict[int, list[str]] = {}
        ends: dict[int, int] = {}
        for chunk in self.stream_generate_content(request, caller):
            for candidate in chunk.candidates:
                texts.setdefault(candidate.index, []).extend(part.text for part in candidate.content.parts)
                ends[candidate.index] = candidate.finish_reason
        del chunk.candidates[:]
        for index in sorted(texts):
            candidate = chunk.candidates.add(index=index, finish_reason=ends[index])
            candidate.content.role = "model"
            candidate.content.parts.add(text="".join(texts[index]))
        return chunk

    def stream_generate_content(
        self, request: protos.GenerateContentRequest, caller: Caller
    ) -> Iterator[protos.GenerateContentResponse]:
        """Yield an answer piece by piece; each candidate's last piece has its finish reason."""
        _refuse_unimplemented(request, _REQUEST)
        target = self._targets.find(request.model, caller, "generateContent")
        turns = _turns(request, _REQUEST)
        question(turns, request.contents, f"{_REQUEST}.contents")
        config = request.generation_config
        chosen = sampling(config, target, f"{_REQUEST}.generation_config")
        if config.HasField("seed"):
            chosen = replace(chosen, seed=config.seed)
        version = weights.get(target.base, self._cache_dir).version
        response_id = secrets.token_urlsafe(12)
        output_tokens = [0] * chosen.candidates
        who = caller.gone, caller.account
        for chunk in self._engine.generate(target.base, target.adapter, turns, chosen, *who):
            output_tokens[chunk.index] = chunk.output_tokens
            yield _response(chunk, sum(output_tokens), version, response_id)

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


def _refuse_unimplemented(request: protos.GenerateContentRequest, path: str) -> None:
    """Name what the request asks for and this server does not do, instead of doing without it."""
    config = request.generation_config
    asked = {
        "tools": bool(request.tools),
        "cached_content": bool(request.cached_content),
        "generation_config.response_mime_type": config.response_mime_type not in ("", "text/plain"),
        "generation_config.response_schema": config.HasField("response_schema"),
        "generation_config.response_json_schema": (
            config.HasField("response_json_schema") or config.HasField("response_json_schema_ordered")
        ),
        "generation_config.presence_penalty": config.presence_penalty != 0,
        "generation_config.frequency_penalty": config.frequency_penalty != 0,
        "generation_config.response_logprobs": config.response_logprobs,
        "generation_config.response_modalities other than TEXT": any(
            modality != protos.GenerationConfig.TEXT for modality in config.response_modalities
        ),
    }
    if wanted := [field for field, is_asked in asked.items() if is_asked]:
        raise Unimplemented(
            "; ".join(f"{path}.{field} is not implemented by this server" for field in wanted) + "."
        )


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
