"""google-generativeai, over REST or over its default transport, gRPC with TLS."""

import asyncio
import io

import google.generativeai as genai
from calls import STAGE, Calls
from google.api_core import exceptions
from google.generativeai import operations
from google.generativeai.types import GenerationConfig
from google.oauth2.credentials import Credentials

REST = STAGE["transport"] == "REST"
BASE = "models/gemini-1.5-flash-001-tuning"
ID = f"{STAGE['slug']}-numbers"
NAME = f"tunedModels/{ID}"
HYPERPARAMETERS = {"epoch_count": 2, "batch_size": 4, "learning_rate": 0.001}
# Over REST the client names an error by its HTTP status alone.
INVALID, DENIED, EXISTS = (
    (exceptions.BadRequest, exceptions.Forbidden, exceptions.Conflict)
    if REST
    else (exceptions.InvalidArgument, exceptions.PermissionDenied, exceptions.AlreadyExists)
)
calls = Calls()


def sign_in(**credential: object) -> None:
    """Begin to call as somebody."""
    where = {"api_endpoint": STAGE["url"] if REST else STAGE["grpc"]}
    genai.configure(**credential, transport="rest" if REST else None, client_options=where)


def tune() -> None:
    with calls.works("genai.list_models"):
        models = genai.list_models()
        assert BASE in [model.name for model in models if "createTunedModel" in model.supported_generation_methods]
    with calls.works("genai.get_model", "a base model"):
        assert genai.get_model(BASE).input_token_limit > 0
    with calls.works("genai.create_tuned_model"):
        fields = {"display_name": "numbers", "description": "counts", "temperature": 0.5}
        operation = genai.create_tuned_model(BASE, STAGE["examples"], id=ID, **fields, **HYPERPARAMETERS)
        assert operation.metadata.tuned_model == NAME
        assert operation.metadata.total_steps == 5
    with calls.works("operation.wait_bar"):
        states = list(operation.wait_bar(file=io.StringIO()))
        assert all(state.tuned_model == NAME for state in states)
        assert [snapshot.step for snapshot in operation.metadata.snapshots] == [1, 2, 3, 4, 5]
    with calls.works("operation.result"):
        model = operation.result()
        assert model.name == NAME
        assert model.tuning_task.snapshots[-1]["mean_loss"] > 0
        assert model.tuning_task.hyperparameters.batch_size == 4
    with calls.works("operation.done, .metadata, .cancelled"):
        assert operation.done()
        assert operation.metadata.completed_percent == 100
        assert not operation.cancelled()
    with calls.works("genai.get_operation"):
        assert operations.get_operation(operation.name).result().name == NAME
    with calls.works("genai.get_tuned_model"):
        model = genai.get_tuned_model(NAME)
        assert (model.base_model, model.description, model.temperature) == (BASE, "counts", 0.5)
        assert genai.get_model(NAME).display_name == "numbers"
    with calls.works("genai.create_tuned_model", "from a tuned model"):
        operation = genai.create_tuned_model(NAME, STAGE["examples"], id=f"{ID}-child", **HYPERPARAMETERS)
        child = operation.result(timeout=60)
        assert (child.source_model, child.base_model) == (NAME, BASE)
        genai.delete_tuned_model(f"{NAME}-child")


def cancel() -> None:
    with calls.works("operation.cancel", "result() then raises Cancelled"):
        long = {"id": f"{ID}-long", "epoch_count": 1000, "batch_size": 1}
        operation = genai.create_tuned_model(BASE, STAGE["examples"], **long)
        for state in operation.wait_bar(file=io.StringIO()):
            if state.completed_steps > 1:
                break
        assert operation.cancel()
        try:
            operation.result(timeout=60)
        except exceptions.Cancelled:
            pass
        else:
            raise AssertionError("result() of a cancelled operation raised nothing")
        assert operation.cancelled()
        assert genai.get_tuned_model(f"{NAME}-long").state.name == "ACTIVE"
    if REST:
        with calls.client_refuses("genai.list_operations", ValueError, "Invalid request"):
            list(genai.list_operations())
    else:
        with calls.works("genai.list_operations"):
            names = [one.name for one in genai.list_operations()]
            assert operation.name in names, names
    with calls.works("operations.delete_operation"):
        operations.delete_operation(operation.name)
    with calls.raises("genai.get_operation", exceptions.NotFound, "does not exist"):
        operations.get_operation(operation.name)


def ask() -> None:
    model = genai.GenerativeModel(NAME)
    greedy = GenerationConfig(temperature=0, max_output_tokens=8)
    with calls.works("GenerativeModel.generate_content"):
        answer = model.generate_content("7", generation_config=greedy)
        assert answer.candidates[0].content.parts[0].text == answer.text
        assert answer.usage_metadata.total_token_count > 0
    with calls.works("GenerativeModel.generate_content(stream=True)"):
        chunks = list(model.generate_content("7", generation_config=greedy, stream=True))
        assert "".join(part.text for chunk in chunks for part in chunk.parts) == answer.text
        assert chunks[-1].candidates[0].finish_reason.value > 0
    with calls.works("GenerativeModel.generate_content", "a base model"):
        assert genai.GenerativeModel(BASE).generate_content("7", generation_config=greedy).candidates
    with calls.works("GenerativeModel.start_chat().send_message", "two turns"):
        chat = model.start_chat()
        chat.send_message("7", generation_config=greedy)
        chat.send_message("8", generation_config=greedy)
        assert [turn.role for turn in chat.history] == ["user", "model", "user", "model"]
    with calls.works("GenerativeModel(system_instruction=…)"):
        told = genai.GenerativeModel(NAME, system_instruction="Answer with the next number.")
        assert told.generate_content("7", generation_config=greedy).candidates
    if REST:
        with calls.client_refuses("GenerativeModel.count_tokens", ValueError, "Invalid request"):
            model.count_tokens("seven eight")
    else:
        with calls.works("GenerativeModel.count_tokens"):
            assert model.count_tokens("seven eight").total_tokens > 2
        with calls.works("…_async", "generate, stream, count, chat, embed and list permissions"):
            assert asyncio.run(asynchronously(model, greedy)) == (answer.text, answer.text)
    with calls.works("GenerativeModel.count_tokens", "a base model"):
        assert genai.GenerativeModel(BASE).count_tokens("seven eight").total_tokens > 2
    with calls.works("genai.embed_content"):
        one = genai.embed_content(BASE, "seven")["embedding"]
        two = genai.embed_content(BASE, ["seven", "eight"])["embedding"]
        assert len(two) == 2
        assert max(abs(a - b) for a, b in zip(one, two[0], strict=True)) < 0.02


async def asynchronously(model: genai.GenerativeModel, config: GenerationConfig) -> tuple[str, str]:
    """Make the calls that exist twice; return a whole answer and a streamed one."""
    whole = await model.generate_content_async("7", generation_config=config)
    stream = await model.generate_content_async("7", generation_config=config, stream=True)
    pieces = [part.text async for chunk in stream for part in chunk.parts]
    assert (await model.count_tokens_async("seven")).total_tokens > 2
    assert (await model.start_chat().send_message_async("7", generation_config=config)).candidates
    assert (await genai.embed_content_async(BASE, "seven"))["embedding"]
    assert [one.role.name async for one in genai.types.Permissions(NAME).list_async()] == ["OWNER"]
    return whole.text, "".join(pieces)


def change() -> None:
    with calls.works("genai.update_tuned_model"):
        genai.update_tuned_model(NAME, {"description": "counts on", "temperature": 0.25})
        model = genai.get_tuned_model(NAME)
        assert (model.description, model.temperature, model.display_name) == ("counts on", 0.25, "numbers")
    with calls.works("genai.list_tuned_models"):
        assert NAME in [model.name for model in genai.list_tuned_models()]
    sign_in(api_key=STAGE["shelf_key"])
    with calls.works("genai.list_tuned_models(page_size=10)", "25 models on three pages"):
        names = {model.name for model in genai.list_tuned_models(page_size=10)}
        assert len(names) == STAGE["shelf_size"], names
    sign_in(api_key=STAGE["key"])


def share() -> None:
    permissions = genai.get_tuned_model(NAME).permissions
    with calls.works("permissions.list", "the owner"):
        assert [(one.email_address, one.role.name) for one in permissions.list()] == [(STAGE["email"], "OWNER")]
    with calls.works("permissions.create"):
        friend = permissions.create("READER", "USER", STAGE["friend"])
        everyone = permissions.create("READER", "EVERYONE")
    with calls.works("permissions.get"):
        assert permissions.get(friend.name).email_address == STAGE["friend"]
    sign_in(api_key=STAGE["friend_key"])
    with calls.works("GenerativeModel.generate_content", "a model shared with the caller"):
        config = GenerationConfig(max_output_tokens=4)
        assert genai.GenerativeModel(NAME).generate_content("7", generation_config=config).candidates
    with calls.raises("genai.delete_tuned_model", DENIED):
        genai.delete_tuned_model(NAME)
    sign_in(api_key=STAGE["key"])
    with calls.works("permission.update"):
        friend.update({"role": "WRITER"})
        assert permissions.get(friend.name).role.name == "WRITER"
    with calls.works("permission.delete"):
        everyone.delete()
        assert len(list(permissions.list())) == 2
    with calls.works("permissions.transfer_ownership"):
        permissions.transfer_ownership(STAGE["friend"])
        roles = {one.email_address: one.role.name for one in permissions.list()}
        assert roles == {STAGE["friend"]: "OWNER", STAGE["email"]: "WRITER"}, roles
    sign_in(api_key=STAGE["friend_key"])
    with calls.works("permissions.transfer_ownership", "and back"):
        genai.get_tuned_model(NAME).permissions.transfer_ownership(STAGE["email"])
    sign_in(api_key=STAGE["key"])


def fail() -> None:
    with calls.raises("genai.create_tuned_model", EXISTS, f"Tuned model {NAME} already exists."):
        genai.create_tuned_model(BASE, STAGE["examples"], id=ID)
    with calls.raises("genai.create_tuned_model", INVALID, "top_p"):
        genai.create_tuned_model(BASE, STAGE["examples"], top_p=9)
    with calls.raises("genai.create_tuned_model", exceptions.NotFound, "is not found for CREATE TUNED MODEL"):
        genai.create_tuned_model("models/none-such", STAGE["examples"])
    sign_in(api_key=STAGE["stranger_key"])
    with calls.raises("genai.get_tuned_model", DENIED, "You do not have permission to access"):
        genai.get_tuned_model(NAME)
    with calls.raises("GenerativeModel.generate_content", DENIED, "You do not have permission"):
        genai.GenerativeModel(NAME).generate_content("7")
    sign_in(api_key="none")
    with calls.raises("genai.get_tuned_model", INVALID, "API key not valid"):
        genai.get_tuned_model(NAME)
    sign_in(credentials=Credentials(STAGE["token"], quota_project_id="my-project-id"))
    with calls.works("genai.configure(credentials=…)", "an access token and a quota project"):
        assert genai.get_tuned_model(NAME).name == NAME
    with calls.works("genai.delete_tuned_model"):
        genai.delete_tuned_model(NAME)
    with calls.raises("genai.get_tuned_model", exceptions.NotFound, f"Tuned model {NAME} does not exist."):
        genai.get_tuned_model(NAME)


sign_in(api_key=STAGE["key"])
tune()
cancel()
ask()
change()
share()
fail()
