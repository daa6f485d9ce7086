"""langchain-google-genai: chat with tuned models, and embeddings."""

import asyncio

from calls import STAGE, Calls
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_google_genai import ChatGoogleGenerativeAI, GoogleGenerativeAIEmbeddings
from langchain_google_genai.chat_models import ChatGoogleGenerativeAIError

BASE = "models/gemini-1.5-flash-001-tuning"
calls = Calls()


TUNED, KEY = STAGE["shelf_model"], STAGE["shelf_key"]


def model(name: str = TUNED, key: str = KEY, **options: float) -> ChatGoogleGenerativeAI:
    """Return a chat model that answers in a few tokens."""
    fields = {"temperature": 0, "max_output_tokens": 8} | options
    return ChatGoogleGenerativeAI(model=name, api_key=key, base_url=STAGE["url"], max_retries=1, **fields)


chat = model()
with calls.works("ChatGoogleGenerativeAI.invoke"):
    answer = chat.invoke("7")
    assert answer.content
    assert answer.usage_metadata["total_tokens"] > 0
with calls.works("ChatGoogleGenerativeAI.stream"):
    assert "".join(chunk.text for chunk in chat.stream("7")) == answer.text
with calls.works("ChatGoogleGenerativeAI.ainvoke, .astream"):

    async def both() -> tuple[str, str]:
        whole = await chat.ainvoke("7")
        return whole.text, "".join([chunk.text async for chunk in chat.astream("7")])

    assert asyncio.run(both()) == (answer.text, answer.text)
with calls.works("ChatGoogleGenerativeAI.batch"):
    assert len(chat.batch(["7", "8", "9"])) == 3
with calls.works("ChatGoogleGenerativeAI.invoke", "a base model"):
    assert model(BASE).invoke("7").usage_metadata
with calls.works("ChatGoogleGenerativeAI.invoke", "three turns"):
    assert chat.invoke([HumanMessage("7"), AIMessage("8"), HumanMessage("9")]).usage_metadata
with calls.works("ChatGoogleGenerativeAI.invoke", "with a system message"):
    assert chat.invoke([SystemMessage("Count."), HumanMessage("7")]).usage_metadata
with calls.works("ChatGoogleGenerativeAI.get_num_tokens"):
    assert chat.get_num_tokens("seven eight") > 2
embeddings = GoogleGenerativeAIEmbeddings(model=BASE, api_key=STAGE["shelf_key"], base_url=STAGE["url"])
with calls.works("GoogleGenerativeAIEmbeddings.embed_query"):
    assert len(embeddings.embed_query("seven")) > 1
with calls.works("GoogleGenerativeAIEmbeddings.embed_documents"):
    assert len(embeddings.embed_documents(["seven", "eight"])) == 2
with calls.raises("ChatGoogleGenerativeAI.invoke", ChatGoogleGenerativeAIError, "404", "NOT_FOUND"):
    model("models/none-such").invoke("7")
with calls.raises("ChatGoogleGenerativeAI.invoke", ChatGoogleGenerativeAIError, "403", "PERMISSION_DENIED"):
    model(key=STAGE["stranger_key"]).invoke("7")
with calls.raises("ChatGoogleGenerativeAI.stream", ChatGoogleGenerativeAIError, "403", "PERMISSION_DENIED"):
    list(model(key=STAGE["stranger_key"]).stream("7"))
with calls.raises("ChatGoogleGenerativeAI.invoke", ChatGoogleGenerativeAIError, "400", "API key not valid"):
    model(key="none").invoke("7")
with calls.raises("ChatGoogleGenerativeAI.invoke", ChatGoogleGenerativeAIError, "400", "max_output_tokens"):
    model(max_output_tokens=1_000_000).invoke("7")
