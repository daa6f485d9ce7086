"""Training on a tiny model: soundness against PEFT, determinism, resume."""

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch

from tiny import reference_model, tiny_cache
from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.prompts import FORMATS
from tunesmith.errors import FailedPrecondition
from tunesmith.training import loop
from tunesmith.training.examples import Row, collate, micro_batches, order, tokenize
from tunesmith.training.loop import Base, TuningRun
from tunesmith.training.loss import output_loss

PAIRS = [("one", "two"), ("3", "4"), ("a longer input text", "with a longer answer"), ("x", "y"), ("7", "8")]


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    model, cache = tiny_cache(tmp_path_factory.mktemp("cache"), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compute_dtype", lambda _device: torch.float32)
        yield Base.load(weights.get(model, cache), torch.device("cpu"))


@pytest.fixture
def rows(base: Base) -> list[Row]:
    examples = protos.TuningExamples(
        examples=[protos.TuningExample(text_input=text, output=output) for text, output in PAIRS]
    )
    return tokenize(examples, FORMATS[base.weights.model.prompt_format], base.tokenizer, 256)


def hyperparameters(epochs: int = 4, batch: int = 2, rate: float = 0.01) -> protos.Hyperparameters:
    return protos.Hyperparameters(epoch_count=epochs, batch_size=batch, learning_rate=rate)


def test_the_loss_falls_and_the_base_is_left_as_it_was(base: Base, rows: list[Row]) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with TuningRun(base, rows, hyperparameters(epochs=12), seed=0) as run:
        steps = list(run)
    assert [step.step for step in steps] == list(range(1, 31))
    assert steps[-1].epoch == 12
    assert steps[-1].mean_loss < steps[0].mean_loss / 2
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_loss_is_the_models_own(base: Base, rows: list[Row]) -> None:
    """The first step's loss is what transformers computes, row by row and without padding, for the same batch."""
    with TuningRun(base, rows, hyperparameters(batch=5), seed=3) as run:
        first = next(iter(run)).mean_loss
    model = reference_model(base.weights)
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor([[-100] * len(row.prompt) + row.output])
        loss = model(input_ids=torch.tensor([row.prompt + row.output]), labels=labels).loss
        total, tokens = total + loss.item() * len(row.output), tokens + len(row.output)
    assert first == pytest.approx(total / tokens, rel=1e-5)


def test_gradients_are_pefts(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(), seed=1) as run:
        with torch.no_grad():  # with B at 0, A would have no gradient to compare
            for layer in run.adapter.layers.values():
                layer.b.normal_(std=0.1, generator=torch.Generator().manual_seed(len(layer.b)))
        run.adapter.refresh()
        files = run.adapter.to_files(base.weights.model.id)
        (run._loss(rows) / 7).backward()
        ours = {
            f"base_model.model.{path}.lora_{side}.default.weight": gradient.clone()
            for path, layer in run.adapter.layers.items()
            for side, gradient in (("A", layer.a_gradient), ("B", layer.b_gradient))
        }
    model = _peft(base, files)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    batch = collate(rows, base.device)
    lengths = torch.tensor([len(row) for row in rows])
    attention = (torch.arange(batch.tokens.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=batch.tokens, attention_mask=attention).logits
    at_outputs = logits[batch.positions[:, 0], batch.positions[:, 1]]
    (torch.nn.functional.cross_entropy(at_outputs, batch.targets, reduction="sum") / 7).backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_the_adapter_loads_in_peft_and_answers_alike(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(), seed=0) as run:
        list(run)
        probe, files = run.probe(), run.adapter.to_files(base.weights.model.id)
    model = _peft(base, files)
    tokens, start = torch.tensor(probe["tokens"]), probe["prompt_length"]
    scores = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    mean = scores[start - 1 : -1].gather(1, tokens[start:, None]).mean().item()
    assert mean == pytest.approx(probe["logprob"], abs=1e-4)
    assert abs(probe["logprob"] - probe["base_logprob"]) > 0.1


def _peft(base: Base, files: dict[str, bytes]) -> peft.PeftModel:
    """The model as PEFT loads it from our files."""
    folder = Path(base.weights.path.parent.parent) / "exported"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return peft.PeftModel.from_pretrained(reference_model(base.weights), folder)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_has_the_same_losses(base: Base, rows: list[Row], stop: int) -> None:
    with TuningRun(base, rows, hyperparameters(), seed=5) as run:
        whole, weights_then = [step.mean_loss for step in run], run.adapter.weights.detach().clone()
    with TuningRun(base, rows, hyperparameters(), seed=5) as run:
        steps = iter(run)
        before = [next(steps).mean_loss for _ in range(stop)]
        files = run.checkpoint()
    with TuningRun(base, rows, hyperparameters(), seed=5) as run:
        run.restore(files)
        after = [step.mean_loss for step in run]
        assert torch.equal(run.adapter.weights, weights_then)
    assert before + after == whole


def test_a_run_goes_on_from_an_adapter(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(epochs=12), seed=5) as run:
        steps = [step.mean_loss for step in run]
        files, trained = run.adapter.to_files("tiny"), run.adapter.weights.detach().clone()

    def again(stop: int = 0) -> tuple[list[float], torch.Tensor]:
        found: list[float] = []
        checkpoint = None
        if stop:
            with TuningRun(base, rows, hyperparameters(rate=0.001), seed=5, start=files) as run:
                going = iter(run)
                found, checkpoint = [next(going).mean_loss for _ in range(stop)], run.checkpoint()
        with TuningRun(base, rows, hyperparameters(rate=0.001), seed=5, start=files) as run:
            assert torch.equal(run.adapter.weights, trained)
            if checkpoint is not None:
                run.restore(checkpoint)
            return found + [step.mean_loss for step in run], run.adapter.weights.detach().clone()

    whole, weights_then = again()
    assert max(whole) < steps[0] / 2
    for stop in (1, 6):
        resumed, weights_now = again(stop)
        assert resumed == whole
        assert torch.equal(weights_now, weights_then)


def test_an_adapter_of_another_shape_is_no_start(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(), 0, loop.Recipe(rank=4)) as run:
        files = run.adapter.to_files("tiny")
    with pytest.raises(FailedPrecondition, match="another rank"):
        TuningRun(base, rows, hyperparameters(), 0, start=files)
    with TuningRun(base, rows, hyperparameters(), 0) as run:  # the base model is free again
        next(iter(run))


def test_the_loss_of_a_conversation_is_that_of_all_its_answers(base: Base) -> None:
    texts = ["one", "two", "three", "four and more", "five", "six"]
    contents = [protos.TuningContent(parts=[protos.TuningPart(text=text)]) for text in texts]
    examples = protos.TuningExamples(multiturn_examples=[protos.TuningMultiturnExample(contents=contents)])
    form = FORMATS[base.weights.model.prompt_format]
    (row,) = tokenize(examples, form, base.tokenizer, 256)
    with TuningRun(base, [row], hyperparameters(batch=1), seed=3) as run:
        first = next(iter(run)).mean_loss
        probe = run.probe()
    labels = torch.full((len(row),), -100)
    for start, end in row.answers:
        labels[start:end] = torch.tensor((row.prompt + row.output)[start:end])
    tokens = torch.tensor([row.prompt + row.output])
    loss = reference_model(base.weights)(input_ids=tokens, labels=labels[None]).loss
    assert first == pytest.approx(loss.item(), rel=1e-5)
    assert (len(probe["tokens"]), probe["prompt_length"]) == (len(row), len(row.prompt))
    last = torch.tensor([[-100] * len(row.prompt) + row.output])
    loss = reference_model(base.weights)(input_ids=tokens, labels=last).loss
    assert probe["base_logprob"] == pytest.approx(-loss.item(), rel=1e-5)


def test_the_seed_decides(base: Base, rows: list[Row]) -> None:
    def losses(seed: int) -> list[float]:
        with TuningRun(base, rows, hyperparameters(), seed) as run:
            return [step.mean_loss for step in run]

    assert losses(1) == losses(1) != losses(2)


def test_micro_batches_change_nothing(base: Base, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        with TuningRun(base, rows, hyperparameters(batch=5), 0) as run:
            return [step.mean_loss for step in run]

    together = losses()
    monkeypatch.setattr(loop, "MICRO_BATCH_TOKENS", 1)
    assert losses() == pytest.approx(together, rel=1e-3)


def test_a_loss_that_is_no_number_ends_the_run(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(), seed=0) as run:
        with torch.no_grad():
            run.adapter.weights.fill_(float("nan"))
        run.adapter.refresh()
        with pytest.raises(FailedPrecondition, match=r"step 1 is not a number.*learning rate below 0\.01"):
            list(run)


def test_the_output_loss_in_chunks_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(50, (300,))
    loss = output_loss(hidden, head, targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-5)


def test_every_epoch_has_every_row_in_an_order_of_its_own() -> None:
    numbers = order(10, seed=0)
    epochs = [[next(numbers) for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    later = order(10, seed=0, first=13)
    assert [next(later) for _ in range(7)] == epochs[1][3:]


def test_micro_batches_hold_every_row_once() -> None:
    rows = [Row([1] * length, [2]) for length in (5, 1, 30, 7, 7, 2)]
    parts = list(micro_batches(rows, 20))
    assert sorted(len(row) for part in parts for row in part) == sorted(len(row) for row in rows)
    assert all(len(part) == 1 or max(map(len, part)) * len(part) <= 20 for part in parts)


def test_a_long_row_keeps_the_end_of_its_input_and_its_output(base: Base) -> None:
    form = FORMATS[base.weights.model.prompt_format]
    example = protos.TuningExample(text_input="start " + "x" * 500 + " end", output="the answer")
    (row,) = tokenize(protos.TuningExamples(examples=[example]), form, base.tokenizer, 100)
    assert len(row) == 100
    assert row.output == form.output(base.tokenizer, "the answer")
    opening = form.opening(base.tokenizer)
    assert row.prompt[: len(opening)] == opening
    text = base.tokenizer.decode(row.prompt)
    assert " end" in text
    assert "start" not in text


def test_adapter_files_go_back_in(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(), 0) as run:
        list(run)
        files, trained = run.adapter.to_files("tiny"), run.adapter.weights.detach().clone()
    assert all(
        name.startswith("base_model.model.model.layers.")
        for name in safetensors.torch.load(files["adapter_model.safetensors"])
    )
    with TuningRun(base, rows, hyperparameters(), 1) as other:
        other.adapter.from_files(files)
        assert torch.equal(other.adapter.weights, trained)
