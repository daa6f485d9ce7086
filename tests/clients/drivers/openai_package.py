"""openai: chats with tuned models, completions, models."""

import asyncio

import openai
from calls import STAGE, Calls

TUNED, BASE = STAGE["shelf_model"], "gemini-1.5-flash-001-tuning"
QUESTION = [{"role": "user", "content": "7"}]
GREEDY = {"temperature": 0, "max_tokens": 8}
calls = Calls()


def where(key: str = STAGE["shelf_key"]) -> dict[str, object]:
    """Return what every client is given."""
    return {"api_key": key, "base_url": f"{STAGE['url']}/v1beta/openai/", "max_retries": 0}


async def _asynchronously() -> tuple[str, str]:
    """Ask whole and in pieces."""
    async with openai.AsyncOpenAI(**where()) as other:
        whole = await other.chat.completions.create(model=TUNED, messages=QUESTION, **GREEDY)
        pieces = await other.chat.completions.create(model=TUNED, messages=QUESTION, stream=True, **GREEDY)
        texts = [chunk.choices[0].delta.content or "" async for chunk in pieces]
    return whole.choices[0].message.content, "".join(texts)


client = openai.OpenAI(**where())
text = ""
with calls.works("client.chat.completions.create"):
    answer = client.chat.completions.create(model=TUNED, messages=QUESTION, **GREEDY)
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.total_tokens > 0
with calls.works("client.chat.completions.create(stream=True)"):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=TUNED, messages=QUESTION, **options, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == answer.usage
with calls.works("client.chat.completions.stream", "the package's own accumulation"):
    end = text[len(text) // 2 :]  # it refuses answers that are cut off for their length
    with client.chat.completions.stream(model=TUNED, messages=QUESTION, stop=end, **GREEDY) as stream:
        last = stream.get_final_completion().choices[0]
    assert (last.message.role, last.message.content) == ("assistant", text.removesuffix(end))
    assert last.finish_reason == "stop"
with calls.works("AsyncOpenAI().chat.completions.create", "whole and as a stream"):
    assert asyncio.run(_asynchronously()) == (text, text)
with calls.works("client.chat.completions.create", "a base model, system message, three turns"):
    turns = [{"role": "system", "content": "Count."}, *QUESTION, {"role": "assistant", "content": "8"}]
    assert client.chat.completions.create(model=BASE, messages=[*turns, *QUESTION], **GREEDY).choices
with calls.works("client.chat.completions.create(n=2, seed=1)"):
    drawn = {"n": 2, "seed": 1, "temperature": 1, "max_tokens": 8}
    first = client.chat.completions.create(model=TUNED, messages=QUESTION, **drawn).choices
    again = client.chat.completions.create(model=TUNED, messages=QUESTION, **drawn).choices
    assert [choice.message.content for choice in first] == [choice.message.content for choice in again]
with calls.works("client.completions.create"):
    assert client.completions.create(model=TUNED, prompt="7", **GREEDY).choices[0].text == text
with calls.works("client.models.list"):
    assert TUNED in [model.id for model in client.models.list()]
with calls.works("client.models.retrieve"):
    assert client.models.retrieve(TUNED).created > 0
with calls.works("OpenAI(api_key=…)", "an access token"):
    owned = openai.OpenAI(**where(STAGE["token"])).models.list()
    assert f"models/{BASE}" in [model.id for model in owned]
with calls.raises("client.chat.completions.create", openai.NotFoundError, status_code=404, code="model_not_found"):
    client.chat.completions.create(model="none-such", messages=QUESTION)
with calls.raises("client.chat.completions.create", openai.PermissionDeniedError, status_code=403):
    openai.OpenAI(**where(STAGE["stranger_key"])).chat.completions.create(model=TUNED, messages=QUESTION)
with calls.raises("client.chat.completions.create", openai.AuthenticationError, code="invalid_api_key"):
    openai.OpenAI(**where("none")).chat.completions.create(model=TUNED, messages=QUESTION)
with calls.raises("client.chat.completions.create", openai.BadRequestError, param="temperature"):
    client.chat.completions.create(model=TUNED, messages=QUESTION, temperature=9)
with calls.raises("client.chat.completions.create", openai.BadRequestError, "not supported", param="tools"):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    client.chat.completions.create(model=TUNED, messages=QUESTION, tools=[tool])
with calls.raises("client.embeddings.create", openai.APIStatusError, "not implemented", status_code=501):
    client.embeddings.create(model=BASE, input="seven")
