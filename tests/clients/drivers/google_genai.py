"""google-genai: releases that send training data, and newer ones that leave it out of the request."""

import asyncio
import time

from calls import STAGE, Calls
from google import genai
from google.genai import errors, types

BASE = "models/gemini-1.5-flash-001-tuning"
EMBEDDER = STAGE["base_model"]  # 3.x makes one content of a list when the name has "gemini" in it
MAJOR, MINOR = (int(part) for part in STAGE["version"].split(".")[:2])
DROPS_TRAINING_DATA = (MAJOR, MINOR) >= (1, 47)
GREEDY = types.GenerateContentConfig(temperature=0, max_output_tokens=8)
EXAMPLES = types.TuningDataset(examples=[types.TuningExample(**example) for example in STAGE["examples"]])
calls = Calls()


def sign_in(key: str, **headers: str) -> genai.Client:
    """Return a client that calls as somebody."""
    where = types.HttpOptions(base_url=STAGE["url"], headers=headers or None)
    return genai.Client(api_key=key, http_options=where)


def config(name: str, epochs: int = 2, data: bool = True) -> types.CreateTuningJobConfig:
    """Return what to tune with; newer releases pass the examples as extra_body."""
    examples = {"examples": {"examples": STAGE["examples"]}}
    body = {"tuningTask": {"trainingData": examples}} if DROPS_TRAINING_DATA and data else None
    return types.CreateTuningJobConfig(
        tuned_model_display_name=name,
        epoch_count=epochs,
        batch_size=4,
        learning_rate=0.001,
        http_options=types.HttpOptions(extra_body=body) if body else None,
    )


def ended(client: genai.Client, job: types.TuningJob) -> types.TuningJob:
    """Poll as Google's samples do."""
    running = {types.JobState.JOB_STATE_PENDING, types.JobState.JOB_STATE_QUEUED, types.JobState.JOB_STATE_RUNNING}
    while job.state in running:
        time.sleep(0.2)
        job = client.tunings.get(name=job.name)
    return job


def tune(client: genai.Client) -> str:
    """Make a tuned model every way there is; return its name."""
    with calls.works("client.models.list"):
        models = client.models.list()
        assert BASE in [model.name for model in models if "createTunedModel" in (model.supported_actions or [])]
    with calls.works("client.models.get", "a base model"):
        assert client.models.get(model=BASE).input_token_limit > 0
    if DROPS_TRAINING_DATA:
        note = "leave training_dataset out of the request"
        with calls.raises("client.tunings.tune", errors.ClientError, note, "extra_body", code=400):
            client.tunings.tune(base_model=BASE, training_dataset=EXAMPLES, config=config("numbers", data=False))
    how = "the examples in config.http_options.extra_body" if DROPS_TRAINING_DATA else ""
    with calls.works("client.tunings.tune", how):
        job = client.tunings.tune(base_model=BASE, training_dataset=EXAMPLES, config=config("numbers"))
        assert job.name.startswith("tunedModels/numbers-"), job.name
    with calls.works("client.tunings.get", "until JOB_STATE_SUCCEEDED"):
        job = ended(client, job)
        assert job.state == types.JobState.JOB_STATE_SUCCEEDED, job.state
        assert job.tuned_model.model == job.name
        assert job.base_model == BASE
        assert job.end_time >= job.start_time
    with calls.works("client.tunings.tune", "from a tuned model"):
        child = client.tunings.tune(base_model=job.name, training_dataset=EXAMPLES, config=config("child"))
        assert ended(client, child).state == types.JobState.JOB_STATE_SUCCEEDED
    with calls.works("client.tunings.cancel"):
        long = client.tunings.tune(base_model=BASE, training_dataset=EXAMPLES, config=config("long", epochs=1000))
        while not client._api_client.request("get", long.name, {}, None).body.count('"snapshots"'):
            time.sleep(0.1)
        client.tunings.cancel(name=long.name)
        assert ended(client, long).state == types.JobState.JOB_STATE_SUCCEEDED
    with calls.works("client.aio.tunings.tune, .get, .cancel"):
        asyncio.run(asynchronously())
    if (MAJOR, MINOR) < (1, 63):
        with calls.works("client.tunings.list"):
            names = [one.name for one in client.tunings.list(config={"page_size": 2})]
            assert {job.name, child.name, long.name} <= set(names), names
    else:
        with calls.client_refuses("client.tunings.list", ValueError, "only supported in"):
            list(client.tunings.list())
    return job.name


async def asynchronously() -> None:
    """Tune, look and cancel, with a client of this event loop's own."""
    client = sign_in(STAGE["key"])
    long = config("long", epochs=1000)
    job = await client.aio.tunings.tune(base_model=BASE, training_dataset=EXAMPLES, config=long)
    assert (await client.aio.tunings.get(name=job.name)).name == job.name
    await client.aio.tunings.cancel(name=job.name)


def ask(client: genai.Client, name: str) -> None:
    with calls.works("client.models.generate_content"):
        answer = client.models.generate_content(model=name, contents="7", config=GREEDY)
        assert answer.text
        assert answer.usage_metadata.total_token_count > 0
        assert answer.model_version
    with calls.works("client.models.generate_content_stream"):
        chunks = list(client.models.generate_content_stream(model=name, contents="7", config=GREEDY))
        assert "".join(chunk.text or "" for chunk in chunks) == answer.text
        assert chunks[-1].candidates[0].finish_reason
    with calls.works("client.models.generate_content", "a base model"):
        assert client.models.generate_content(model=BASE, contents="7", config=GREEDY).candidates
    with calls.works("client.models.generate_content", "with a system instruction"):
        told = types.GenerateContentConfig(system_instruction="Count.", temperature=0, max_output_tokens=8)
        assert client.models.generate_content(model=name, contents="7", config=told).candidates
    with calls.works("client.chats.create().send_message", "two turns"):
        chat = client.chats.create(model=name, config=GREEDY)
        chat.send_message("7")
        chat.send_message("8")
        assert [turn.role for turn in chat.get_history()] == ["user", "model", "user", "model"]
    with calls.works("client.aio.models.generate_content, …_stream"):
        assert asyncio.run(both(name)) == (answer.text, answer.text)
    with calls.works("client.models.count_tokens"):
        assert client.models.count_tokens(model=name, contents="seven eight").total_tokens > 2
    with calls.works("client.models.embed_content"):
        found = client.models.embed_content(model=EMBEDDER, contents=["seven", "eight"]).embeddings
        assert len(found) == 2
        assert len(found[0].values) == len(found[1].values) > 1


async def both(name: str) -> tuple[str, str]:
    """Ask without and with a stream, with a client of this event loop's own."""
    client = sign_in(STAGE["key"])
    whole = await client.aio.models.generate_content(model=name, contents="7", config=GREEDY)
    stream = await client.aio.models.generate_content_stream(model=name, contents="7", config=GREEDY)
    return whole.text, "".join([chunk.text or "" async for chunk in stream])


def manage(client: genai.Client, name: str) -> None:
    with calls.works("client.models.list(query_base=False)"):
        assert name in [model.name for model in client.models.list(config={"query_base": False})]
    with calls.works("client.models.list(page_size=10)", "25 models on three pages"):
        shelf = sign_in(STAGE["shelf_key"])  # a client that nobody holds closes itself
        pager = shelf.models.list(config={"query_base": False, "page_size": 10})
        assert len(pager) == 10
        assert len({model.name for model in pager}) == STAGE["shelf_size"]
    with calls.works("client.models.get"):
        model = client.models.get(model=name)
        assert (model.display_name, model.tuned_model_info.base_model) == ("numbers", BASE)
    with calls.works("client.models.update"):
        wanted = types.UpdateModelConfig(display_name="counts", description="counts on")
        client.models.update(model=name, config=wanted)
        model = client.models.get(model=name)
        assert (model.display_name, model.description) == ("counts", "counts on")


def fail(client: genai.Client, name: str) -> None:
    invalid = {"code": 400, "status": "INVALID_ARGUMENT"}
    with calls.raises("client.tunings.tune", errors.ClientError, "batch_size", **invalid):
        wrong = config("numbers").model_copy(update={"batch_size": -1})
        client.tunings.tune(base_model=BASE, training_dataset=EXAMPLES, config=wrong)
    with calls.raises("client.models.generate_content", errors.ClientError, code=404, status="NOT_FOUND"):
        client.models.generate_content(model="none-such", contents="7")
    stranger = sign_in(STAGE["stranger_key"])
    denied = {"code": 403, "status": "PERMISSION_DENIED"}
    with calls.raises("client.tunings.get", errors.ClientError, "You do not have permission to access", **denied):
        stranger.tunings.get(name=name)
    stream = "client.models.generate_content_stream"
    with calls.raises(stream, errors.ClientError, "You do not have permission", **denied):
        list(stranger.models.generate_content_stream(model=name, contents="7"))
    with calls.raises("client.models.get", errors.ClientError, "API key not valid", code=400):
        nobody = sign_in("none")
        nobody.models.get(model=name)
    with calls.works("Client(http_options.headers=…)", "an access token beside a dummy key"):
        headers = {"Authorization": f"Bearer {STAGE['token']}", "x-goog-user-project": "my-project-id"}
        bearer = sign_in("dummy", **headers)
        assert bearer.models.get(model=name).name == name
    with calls.works("client.models.delete"):
        client.models.delete(model=name)
    absent = {"code": 404, "status": "NOT_FOUND"}
    with calls.raises("client.models.get", errors.ClientError, "does not exist", **absent):
        client.models.get(model=name)


me = sign_in(STAGE["key"])
tuned = tune(me)
ask(me, tuned)
manage(me, tuned)
fail(me, tuned)
