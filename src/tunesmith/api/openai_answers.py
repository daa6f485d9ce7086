"""Answers in Google's words -> answers in OpenAI's: whole ones, and the chunks of streams."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from tunesmith import protos
from tunesmith.api.openai_requests import Asked

_ENDS = {protos.Candidate.STOP: "stop", protos.Candidate.MAX_TOKENS: "length"}


class Form(Protocol):
    """How one kind of completion is written."""

    prefix: str
    whole: str
    piece: str

    def message(self, candidate: protos.Candidate) -> dict[str, Any]:
        """Return what a choice holds of a whole answer."""
        ...

    def delta(self, candidate: protos.Candidate, first: bool, /) -> dict[str, Any]:
        """Return what a choice holds of a piece of an answer."""
        ...

    def logprobs(self, candidate: protos.Candidate, offset: int, /) -> dict[str, Any] | None:
        """Return the probabilities of a candidate's tokens; None when they were not asked for.

        Args:
            candidate: An answer, or a piece of it.
            offset: How many characters came before.
        """
        ...


class Chat:
    """Chat completions."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def message(self, candidate: protos.Candidate) -> dict[str, Any]:
        """See Form."""
        return {"message": {"role": "assistant", "content": _text(candidate), "refusal": None}}

    def delta(self, candidate: protos.Candidate, first: bool, /) -> dict[str, Any]:
        """See Form."""
        text = _text(candidate)
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, **({"content": text} if text or first else {})}}

    def logprobs(self, candidate: protos.Candidate, _offset: int, /) -> dict[str, Any] | None:
        """See Form."""
        if not candidate.HasField("logprobs_result"):
            return None
        return {
            "content": [
                {**_token(chosen), "top_logprobs": [_token(one) for one in top]}
                for chosen, top in _steps(candidate.logprobs_result)
            ],
            "refusal": None,
        }


class Text:
    """The older completions."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def message(self, candidate: protos.Candidate) -> dict[str, Any]:
        """See Form."""
        return {"text": _text(candidate)}

    def delta(self, candidate: protos.Candidate, _first: bool, /) -> dict[str, Any]:
        """See Form."""
        return {"text": _text(candidate)}

    def logprobs(self, candidate: protos.Candidate, offset: int, /) -> dict[str, Any] | None:
        """See Form."""
        if not candidate.HasField("logprobs_result"):
            return None
        steps, offsets = list(_steps(candidate.logprobs_result)), []
        for chosen, _ in steps:
            offsets.append(offset)
            offset += len(chosen.token)
        return {
            "tokens": [chosen.token for chosen, _ in steps],
            "token_logprobs": [chosen.log_probability for chosen, _ in steps],
            "top_logprobs": [{one.token: one.log_probability for one in top} for _, top in steps],
            "text_offset": offsets,
        }


class Answer:
    """The answer to one request, whole or as a stream.

    Args:
        form: How it is written.
        asked: What it answers.
    """

    def __init__(self, form: Form, asked: Asked) -> None:
        self._form, self._asked = form, asked
        self._created, self._id = int(time.time()), ""

    def whole(self, responses: Iterable[protos.GenerateContentResponse]) -> dict[str, Any]:
        """Return the whole answer; `responses` has one for each prompt."""
        usage, version = _Usage(), ""
        choices: list[dict[str, Any]] = []
        for number, response in enumerate(responses):
            self._id, version = self._id or response.response_id, response.model_version
            usage.add(response)
            choices += [
                {
                    "index": number * self._asked.choices + candidate.index,
                    **self._form.message(candidate),
                    "logprobs": self._form.logprobs(candidate, 0),
                    "finish_reason": _end(candidate),
                }
                for candidate in _candidates(response, self._asked.choices)
            ]
        return {**self._head(self._form.whole, version), "choices": choices, "usage": usage.counts()}

    def chunks(self, streams: Iterable[Iterable[protos.GenerateContentResponse]]) -> Iterator[dict[str, Any]]:
        """Yield the answer's chunks; `streams` has one for each prompt."""
        usage, version = _Usage(), ""
        usages: dict[str, Any] = {"usage": None} if self._asked.include_usage else {}
        for number, stream in enumerate(streams):
            lengths: dict[int, int] = {}
            last = None
            for response in stream:
                last, version = response, response.model_version
                self._id = self._id or response.response_id
                for candidate in _candidates(response, self._asked.choices):
                    choice = self._choice(candidate, number, lengths)
                    yield {**self._head(self._form.piece, version), "choices": [choice], **usages}
            if last is not None:
                usage.add(last)
        if self._asked.include_usage:
            yield {**self._head(self._form.piece, version), "choices": [], "usage": usage.counts()}

    def _choice(self, candidate: protos.Candidate, number: int, lengths: dict[int, int]) -> dict[str, Any]:
        """Return a candidate's next piece; `lengths` has the characters that each has so far."""
        before = lengths.get(candidate.index)
        lengths[candidate.index] = (before or 0) + len(_text(candidate))
        return {
            "index": number * self._asked.choices + candidate.index,
            **self._form.delta(candidate, before is None),
            "logprobs": self._form.logprobs(candidate, before or 0),
            "finish_reason": _end(candidate),
        }

    def _head(self, kind: str, version: str) -> dict[str, Any]:
        return {
            "id": f"{self._form.prefix}{self._id}",
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "system_fingerprint": version or None,  # the weights that answered
        }


class _Usage:
    """Token counts, summed over prompts."""

    def __init__(self) -> None:
        self._prompt = self._completion = 0

    def add(self, response: protos.GenerateContentResponse) -> None:
        self._prompt += response.usage_metadata.prompt_token_count
        self._completion += response.usage_metadata.candidates_token_count

    def counts(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
        }


def model(name: str, created: int) -> dict[str, Any]:
    """Return a model as an entry of a list of models; `created` in seconds since 1970, 0 if nobody knows."""
    return {"id": name, "object": "model", "created": created, "owned_by": "tunesmith"}


def _candidates(response: protos.GenerateContentResponse, choices: int) -> Iterable[protos.Candidate]:
    """Return the candidates; for a prompt that was blocked, as many empty ones as were asked for."""
    if response.prompt_feedback.block_reason:
        return [protos.Candidate(index=index, finish_reason=protos.Candidate.SAFETY) for index in range(choices)]
    candidates: Iterable[protos.Candidate] = response.candidates
    return candidates


def _text(candidate: protos.Candidate) -> str:
    return "".join(part.text for part in candidate.content.parts)


def _end(candidate: protos.Candidate) -> str | None:
    reason = candidate.finish_reason
    return _ENDS.get(reason, "content_filter") if reason else None


def _steps(
    result: protos.LogprobsResult,
) -> Iterator[tuple[protos.LogprobsResult.Candidate, list[protos.LogprobsResult.Candidate]]]:
    """Yield each chosen token with the most probable ones of its place, as far as they were asked for."""
    tops = [list(top.candidates) for top in result.top_candidates]
    for number, chosen in enumerate(result.chosen_candidates):
        yield chosen, tops[number] if number < len(tops) else []


def _token(candidate: protos.LogprobsResult.Candidate) -> dict[str, Any]:
    return {
        "token": candidate.token,
        "logprob": candidate.log_probability,
        "bytes": list(candidate.token.encode()),
    }
