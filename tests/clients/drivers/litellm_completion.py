"""litellm: completions of tuned models."""

import asyncio

import litellm
from calls import STAGE, Calls

TUNED = f"gemini/{STAGE['shelf_model']}"
BASE = "gemini/gemini-1.5-flash-001-tuning"
QUESTION = [{"role": "user", "content": "7"}]
calls = Calls()
litellm.suppress_debug_info = True


def where(key: str = STAGE["shelf_key"]) -> dict[str, object]:
    """Return what every call is given."""
    return {"api_key": key, "api_base": f"{STAGE['url']}/v1beta", "num_retries": 0}


GREEDY = {"temperature": 0, "max_tokens": 8}

with calls.works("litellm.completion"):
    answer = litellm.completion(TUNED, QUESTION, **GREEDY, **where())
    text = answer.choices[0].message.content
    assert answer.usage.total_tokens > 0
with calls.works("litellm.completion(stream=True)"):
    chunks = list(litellm.completion(TUNED, QUESTION, stream=True, **GREEDY, **where()))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
with calls.works("litellm.acompletion"):
    found = asyncio.run(litellm.acompletion(TUNED, QUESTION, **GREEDY, **where()))
    assert found.choices[0].message.content == text
with calls.works("litellm.completion", "a base model"):
    assert litellm.completion(BASE, QUESTION, **GREEDY, **where()).usage.total_tokens > 0
with calls.works("litellm.completion", "with a system message"):
    told = [{"role": "system", "content": "Count."}, *QUESTION]
    assert litellm.completion(TUNED, told, **GREEDY, **where()).usage.total_tokens > 0
with calls.works("litellm.completion", "three turns"):
    turns = [*QUESTION, {"role": "assistant", "content": "8"}, {"role": "user", "content": "9"}]
    assert litellm.completion(TUNED, turns, **GREEDY, **where()).usage.total_tokens > 0
with calls.works("litellm.embedding"):
    both = litellm.embedding(BASE, input=["seven", "eight"], **where())
    assert len(both.data) == 2
with calls.raises("litellm.completion", litellm.NotFoundError, "is not found for API version"):
    litellm.completion("gemini/none-such", QUESTION, **where())
with calls.raises("litellm.completion", litellm.BadRequestError, "You do not have permission", '"code": 403'):
    litellm.completion(TUNED, QUESTION, **where(STAGE["stranger_key"]))
with calls.raises("litellm.completion", litellm.AuthenticationError, "API key not valid"):
    litellm.completion(TUNED, QUESTION, **where("none"))
with calls.raises("litellm.completion", litellm.BadRequestError, "temperature"):
    litellm.completion(TUNED, QUESTION, temperature=9, **where())
