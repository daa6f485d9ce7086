"""Requests in OpenAI's words -> requests in Google's: chat completions and the older completions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tunesmith import protos
from tunesmith.api import resource_names
from tunesmith.api.json_reader import MessageReader
from tunesmith.errors import ApiError, InvalidArgument

GENERATE = protos.SERVICES["google.ai.generativelanguage.v1beta.GenerativeService"].methods_by_name[
    "GenerateContent"
]
STREAM = GENERATE.containing_service.methods_by_name["StreamGenerateContent"]

MOST_PROMPTS = 32
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's answer may be as long as the model's are

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "n": "candidateCount",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_NAMES = {
    "top_p": "top_p",
    "candidate_count": "n",
    "stop_sequences": "stop",
    "response_mime_type": "response_format",
    "response_json_schema": "response_format",
    "response_json_schema_ordered": "response_format",
}
"""OpenAI's name of each field of a GenerationConfig that has another one here."""

_UNTIL_ASKED_OTHERWISE: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_p": (0,),
    "top_a": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "mirostat": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "structured_outputs": (),
}
"""Parameters, OpenAI's own and those of other servers, that would change the answer and do nothing here: they are
refused, but for these values, which change nothing. What is not listed is ignored, as other servers do."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        model: The model as the request names it.
        requests: One for each prompt, in order.
        choices: How many answers each prompt gets.
        stream: Whether the answers come in pieces.
        include_usage: Whether a stream ends with the token counts.
        names: OpenAI's names of Google's fields, as far as they differ.
    """

    model: str
    requests: list[protos.GenerateContentRequest]
    choices: int
    stream: bool
    include_usage: bool
    names: Mapping[str, str] = field(default_factory=dict)


def chat(body: Any) -> Asked:
    """Return what the body of a chat completion asks for.

    Raises:
        InvalidArgument: Names each parameter that is wrong, or that is nothing that a model here does.
    """
    _refuse_unknown(_object(body))
    config, names = _config(body), dict(_NAMES)
    for parameter in ("max_completion_tokens", "max_tokens"):
        if body.get(parameter) is not None:
            config["maxOutputTokens"] = body[parameter]
            names["max_output_tokens"] = parameter
            break
    if body.get("logprobs"):
        config["responseLogprobs"] = body["logprobs"]
    if body.get("top_logprobs") is not None:
        config["logprobs"] = body["top_logprobs"]
    names |= {"response_logprobs": "logprobs", "logprobs": "top_logprobs"}
    names |= {"contents": "messages", "system_instruction": "messages"}
    config |= _format(body.get("response_format"))
    return _asked(body, [_conversation(body.get("messages"))], config, names)


def completion(body: Any) -> Asked:
    """Return what the body of a completion asks for.

    Raises:
        InvalidArgument: Names each parameter that is wrong, or that is nothing that a model here does.
    """
    _refuse_unknown(_object(body))
    config = _config(body)
    given = body.get("max_tokens")
    config["maxOutputTokens"] = COMPLETION_TOKENS if given is None else given
    if body.get("logprobs") is not None:
        config["responseLogprobs"] = True
        if body["logprobs"]:
            config["logprobs"] = body["logprobs"]
    names = {**_NAMES, "max_output_tokens": "max_tokens", "response_logprobs": "logprobs", "contents": "prompt"}
    contents = [{"contents": [_content("user", prompt)]} for prompt in _prompts(body.get("prompt"))]
    return _asked(body, contents, config, names)


def model_name(name: Any) -> str:
    """Return the name of a model here, for one with or without `models/` before it.

    Raises:
        InvalidArgument: It is no text.
    """
    if not isinstance(name, str) or not name:
        _refuse("model", "name a model, such as tunedModels/numbers")
    name = name.removeprefix("models/")
    return name if name.startswith("tunedModels/") else f"models/{name}"


def _asked(
    body: dict[str, Any], prompts: Iterable[dict[str, Any]], config: dict[str, Any], names: Mapping[str, str]
) -> Asked:
    model, requests = model_name(body.get("model")), []
    for prompt in prompts:
        request = protos.GenerateContentRequest()
        reader = MessageReader(request)
        reader.read_body({**prompt, "generationConfig": config, **_safety(body)}, "*")
        _finish(reader, names)
        request.model = model
        resource_names.check(GENERATE, request)
        requests.append(request)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        _refuse("stream_options", "must be an object")
    choices = requests[0].generation_config.candidate_count or 1
    return Asked(
        body["model"], requests, choices, bool(body.get("stream")), bool(options.get("include_usage")), names
    )


def _finish(reader: MessageReader, names: Mapping[str, str]) -> None:
    """Raise what the reader found, field by field; its own sentences name fields that OpenAI's API lacks."""
    try:
        reader.finish()
    except InvalidArgument as error:
        wrong = {parameter(one.field, names): one.description for one in violations(error)}
        raise InvalidArgument.at(
            [(name, f"this value is none that it takes: {_value(text)}") for name, text in wrong.items()]
        ) from None


def _value(description: str) -> str:
    """Return what follows the place in `Invalid value at 'place' (type), value`."""
    return description.partition("), ")[2] or description


def violations(error: ApiError) -> list[protos.BadRequest.FieldViolation]:
    """Return the fields that an error names."""
    bad = [detail for detail in error.details if isinstance(detail, protos.BadRequest)]
    return [violation for detail in bad for violation in detail.field_violations]


def parameter(path: str, names: Mapping[str, str]) -> str:
    """Return OpenAI's name for a field of Google's that a service refuses."""
    path = path.removeprefix("GenerateContentRequest.").removeprefix("generation_config.")
    name = path.partition("[")[0].partition(".")[0]
    return names.get(name, path)


def _refuse(name: str, reason: str) -> NoReturn:
    raise InvalidArgument.at([(name, reason)])


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidArgument("The body must be a JSON object.")
    return body


def _refuse_unknown(body: dict[str, Any]) -> None:
    wrong = [
        (name, "is not supported by this server: leave it out")
        for name, harmless in _UNTIL_ASKED_OTHERWISE.items()
        if body.get(name) is not None and body[name] not in harmless
    ]
    if wrong:
        raise InvalidArgument.at(wrong)


def _config(body: dict[str, Any]) -> dict[str, Any]:
    """Return what both kinds of requests say about sampling, as a GenerationConfig in JSON."""
    config = {ours: body[theirs] for theirs, ours in _SAMPLING.items() if body.get(theirs) is not None}
    stop = body.get("stop")
    if stop is not None:
        config["stopSequences"] = [stop] if isinstance(stop, str) else stop
    seed = body.get("seed")
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            _refuse("seed", "must be an integer")
        config["seed"] = (seed + 2**31) % 2**32 - 2**31  # Google's is of 32 bits
    return config


def _format(wanted: Any) -> dict[str, Any]:
    """Return what a `response_format` says, as a part of a GenerationConfig in JSON."""
    if wanted is None:
        return {}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"responseMimeType": "application/json"}
    if kind != "json_schema":
        _refuse("response_format.type", f"must be text, json_object or json_schema, not {kind!r}")
    schema = wanted.get("json_schema")
    schema = schema.get("schema") if isinstance(schema, dict) else None
    if not isinstance(schema, dict):
        _refuse("response_format.json_schema.schema", "give the JSON schema that the answer is to fit")
    return {"responseMimeType": "application/json", "responseJsonSchema": schema}


def _safety(body: dict[str, Any]) -> dict[str, Any]:
    """Return the safety settings, which come where Google's own compatible API has what OpenAI's lacks."""
    extra = body.get("extra_body")
    google = body.get("google") or (extra.get("google") if isinstance(extra, dict) else None)
    settings = google.get("safety_settings") if isinstance(google, dict) else None
    return {"safetySettings": settings} if settings else {}


def _conversation(messages: Any) -> dict[str, Any]:
    """Return contents and system instruction, in JSON."""
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "give at least one message")
    contents, instructions = [], []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            _refuse(place, "must be an object with role and content")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                _refuse(f"{place}.{name}", "is not supported by this server: send text only")
        text, role = _text(message.get("content"), f"{place}.content"), message.get("role")
        if role in ("system", "developer"):
            instructions.append(text)
        elif role in ("user", "assistant"):
            contents.append(_content("user" if role == "user" else "model", text))
        else:
            allowed = "system, developer, user or assistant"
            _refuse(f"{place}.role", f"must be {allowed}, not {role!r}; calls of tools are not supported")
    if not contents or contents[-1]["role"] != "user":
        _refuse("messages", "the last message must be the user's")
    system = {"systemInstruction": {"parts": [{"text": "\n".join(instructions)}]}} if instructions else {}
    return {"contents": contents, **system}


def _content(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(place, "must be a text, or a list of parts that are texts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "refusal"):
            _refuse(f"{place}[{number}]", f"a part of type {kind!r} is not supported by this server: send text")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            _refuse(f"{place}[{number}].text", "must be a text")
        texts.append(text)
    return "".join(texts)


def _prompts(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        _refuse("prompt", "must be a text or a list of texts; tokens by number are not supported")
    if len(prompts) > MOST_PROMPTS:
        _refuse("prompt", f"must be at most {MOST_PROMPTS} texts, not {len(prompts)}")
    return prompts
