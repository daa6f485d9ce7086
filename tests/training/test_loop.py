"""Training on a tiny model: soundness against PEFT, determinism, resume."""

import pytest
import safetensors.torch
import torch

from tiny import reference_model
from training.training_data import in_peft
from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS
from tunesmith.errors import FailedPrecondition
from tunesmith.training import loop
from tunesmith.training.batches import Batch, collate, micro_batches
from tunesmith.training.examples import Row, order, tokenize
from tunesmith.training.loop import Base, TuningRun
from tunesmith.training.network import Network

PAIRS = [("one", "two"), ("3", "4"), ("a longer input text", "with a longer answer"), ("x", "y"), ("7", "8")]


@pytest.fixture
def rows(base: Base) -> list[Row]:
    examples = protos.TuningExamples(
        examples=[protos.TuningExample(text_input=text, output=output) for text, output in PAIRS]
    )
    return tokenize(examples, FORMATS[base.weights.model.prompt_format], base.tokenizer, 256)


def hyperparameters(epochs: int = 4, batch: int = 2, rate: float = 0.01) -> protos.Hyperparameters:
    return protos.Hyperparameters(epoch_count=epochs, batch_size=batch, learning_rate=rate)


def test_the_loss_falls_and_the_base_is_left_as_it_was(base: Base, rows: list[Row]) -> None:
    before = safetensors.torch.load_file(next(base.weights.path.glob("*.safetensors")))
    untuned = losses_of(base, rows)
    with TuningRun(base, rows, hyperparameters(epochs=12), seed=0) as run:
        steps = list(run)
    assert [step.step for step in steps] == list(range(1, 31))
    assert steps[-1].epoch == 12
    assert steps[-1].mean_loss < steps[0].mean_loss / 2
    after = safetensors.torch.load_file(next(base.weights.path.glob("*.safetensors")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(losses_of(base, rows), untuned)


def losses_of(base: Base, rows: list[Row]) -> torch.Tensor:
    """The untuned model's loss at each target."""
    with base.network.adapted(4, 4.0) as network:
        return network.evaluate(collate(rows, base.device))[0]


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


def test_the_adapter_loads_in_peft_and_answers_alike(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(), seed=0) as run:
        list(run)
        probe, files = run.probe(), run.adapter.to_files(base.weights.model.id)
    model = in_peft(base, files)
    tokens, start = torch.tensor(probe["tokens"]), probe["prompt_length"]
    scores = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    mean = scores[start - 1 : -1].gather(1, tokens[start:, None]).mean().item()
    assert mean == pytest.approx(probe["logprob"], abs=1e-4)
    assert abs(probe["logprob"] - probe["base_logprob"]) > 0.1


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_has_the_same_losses(base: Base, rows: list[Row], stop: int) -> None:
    with TuningRun(base, rows, hyperparameters(), seed=5) as run:
        whole, weights_then = [step.mean_loss for step in run], run.adapter.weights.clone()
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
        files, trained = run.adapter.to_files("tiny"), run.adapter.weights.clone()

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
            return found + [step.mean_loss for step in run], run.adapter.weights.clone()

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
        run.adapter.weights.fill_(float("nan"))
        run.adapter.refresh()
        with pytest.raises(FailedPrecondition, match=r"step 1 is not a number.*learning rate below 0\.01"):
            list(run)


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
        files, trained = run.adapter.to_files("tiny"), run.adapter.weights.clone()
    assert all(
        name.startswith("base_model.model.model.layers.")
        for name in safetensors.torch.load(files["adapter_model.safetensors"])
    )
    with TuningRun(base, rows, hyperparameters(), 1) as other:
        other.adapter.from_files(files)
        assert torch.equal(other.adapter.weights, trained)


class Short:
    """A network that has memory for so many tokens at once."""

    def __init__(self, network: Network, tokens: int, error: Exception) -> None:
        self.adapter, self.sizes = network.adapter, list[int]()
        self._network, self._tokens, self._error = network, tokens, error

    def learn(self, batch: Batch, weight: float) -> float:
        self.sizes.append(sum(batch.lengths))
        loss = self._network.learn(batch, weight)
        if self.sizes[-1] > self._tokens:
            raise self._error  # after it has changed the gradient
        return loss

    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._network.evaluate(batch)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_a_step_that_runs_out_of_memory_is_done_in_smaller_parts(
    base: Base, rows: list[Row], error: Exception
) -> None:
    def losses(tokens: int) -> tuple[list[float], TuningRun]:
        with TuningRun(base, rows, hyperparameters(batch=5), 0) as run:
            run._network = short = Short(run._network, tokens, error)
            found = [step.mean_loss for step in run]
            assert all(size <= tokens for size in short.sizes[-8:])
            return found, run

    together, run = losses(10_000)
    assert run.micro_batch_tokens == loop.MICRO_BATCH_TOKENS
    longest = max(map(len, rows))
    parted, run = losses(longest + 32)
    assert parted == pytest.approx(together, rel=1e-3)
    assert run.micro_batch_tokens < longest * len(rows)


def test_a_row_that_memory_does_not_hold_ends_the_run(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(batch=5), 0) as run:
        run._network = Short(run._network, 10, MemoryError())
        longest = max(map(len, rows))
        with pytest.raises(FailedPrecondition, match=rf"{longest} tokens, and 1 of all 5 are as long"):
            list(run)


def test_other_errors_are_no_shortage(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(batch=5), 0) as run:
        run._network = Short(run._network, 10, RuntimeError("shape mismatch"))
        with pytest.raises(RuntimeError, match="shape mismatch"):
            list(run)


def test_a_run_after_a_kill_takes_less(base: Base, rows: list[Row]) -> None:
    with TuningRun(base, rows, hyperparameters(batch=5), 0) as run:
        run.be_frugal(one_by_one=False)
        assert run.micro_batch_tokens == loop.MICRO_BATCH_TOKENS // 2
        run.be_frugal(one_by_one=True)
        assert run.micro_batch_tokens == 1
