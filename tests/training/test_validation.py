"""Validation on a tiny model: against transformers, the best weights, early stop, resume."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tiny import greedy, reference_model
from training.training_data import conversation, conversations, pairs
from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS
from tunesmith.errors import FailedPrecondition
from tunesmith.training import loop
from tunesmith.training.batches import Batch
from tunesmith.training.examples import Row, tokenize
from tunesmith.training.hyperparameters import Options
from tunesmith.training.loop import Base, Recipe, Step, TuningRun, Validation

PAIRS = [
    ("one", "two"),
    ("3", "4"),
    ("a longer input text", "with a longer answer"),
    ("x", "y"),
    ("7", "8"),
    ("another", "one"),
    ("12", "13"),
]
HELD_OUT = [1, 4]
FULL = Recipe(strength=1.0)


@pytest.fixture(autouse=True)
def full_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter as it was trained."""
    monkeypatch.setattr(loop, "STRENGTHS", (1.0,))


@pytest.fixture
def rows(base: Base) -> list[Row]:
    return tokenized(base, pairs(*PAIRS))


def tokenized(base: Base, examples: protos.TuningExamples) -> list[Row]:
    return tokenize(examples, FORMATS[base.weights.model.prompt_format], base.tokenizer, 256)


def tuning(base: Base, rows: list[Row], epochs: int = 4, **changes: Any) -> TuningRun:
    given = protos.Hyperparameters(
        epoch_count=epochs, batch_size=changes.pop("batch", 2), learning_rate=changes.pop("rate", 0.01)
    )
    return TuningRun(base, rows, given, **{"seed": 5, "held_out": HELD_OUT, "recipe": FULL} | changes)


def events(run: TuningRun, count: int | None = None) -> list[Step | Validation]:
    """What a run yields, all or so many, without the times."""
    found: list[Step | Validation] = []
    for event in run:
        found.append(replace(event, seconds=0.0) if isinstance(event, Step) else event)
        if len(found) == count:
            break
    return found


def validations(found: list[Step | Validation]) -> list[Validation]:
    return [event for event in found if isinstance(event, Validation)]


def weights_of(run: TuningRun) -> torch.Tensor:
    return run.adapter.weights.clone()


def test_held_out_rows_are_not_learnt(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows, options=Options(keep="last")) as run:
        found, trained = events(run), weights_of(run)
        assert run.total_steps == 10  # four epochs of five rows
    with tuning(base, [row for number, row in enumerate(rows) if number not in HELD_OUT], held_out=()) as run:
        assert events(run) == [event for event in found if isinstance(event, Step)]
        assert torch.equal(weights_of(run), trained)
    assert [(event.step, event.epoch) for event in validations(found)] == [(3, 1), (5, 2), (8, 3), (10, 4)]
    assert all(found[found.index(event) - 1].step == event.step for event in validations(found))


def test_steps_say_what_they_did(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows, held_out=(), epochs=1) as run:
        steps = [event for event in run if isinstance(event, Step)]
    assert [step.learning_rate for step in steps] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert sum(step.tokens for step in steps) == sum(map(len, rows))
    assert all(step.gradient_norm > 0 and step.seconds > 0 for step in steps)


@pytest.mark.parametrize("most_tokens", [loop.MICRO_BATCH_TOKENS, 1])
def test_the_scores_are_the_models_own(
    base: Base, rows: list[Row], most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what transformers computes row by row, and the exact matches are what it generates."""
    monkeypatch.setattr(loop, "MICRO_BATCH_TOKENS", most_tokens)
    known = [*rows, rows[0], rows[3], rows[6]]  # rows that are learnt are answered right
    held = [*HELD_OUT, 7, 8, 9]
    with tuning(base, known, epochs=20, held_out=held, options=Options(keep="last")) as run:
        last = validations(events(run))[-1]
        model = merged(base, run)
    loss, right, exact, tokens = 0.0, 0, 0, 0
    for row in (known[number] for number in held):
        scores = model(input_ids=torch.tensor([row.prompt + row.output])).logits[0, len(row.prompt) - 1 : -1]
        targets = torch.tensor(row.output)
        loss += torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item()
        right += int((scores.argmax(-1) == targets).sum())
        exact += greedy(model, row.prompt, len(row.output)) == row.output
        tokens += len(row.output)
    assert 3 <= exact < len(held)
    assert last.loss == pytest.approx(loss / tokens, rel=1e-4)
    assert (last.token_accuracy, last.exact_match) == (right / tokens, exact / len(held))


def merged(base: Base, run: TuningRun) -> Any:
    """The model as transformers runs it, with the adapter added to its weights."""
    model = reference_model(base.weights)
    with torch.no_grad():
        for path, layer in run.adapter.layers.items():
            model.get_submodule(path).weight += run.adapter.scale * (layer.b @ layer.a)
    return model


def test_a_conversation_matches_when_all_its_answers_do(base: Base) -> None:
    known = conversation(["one", "two", "three", "four"])
    rows = tokenized(base, conversations([known, known, conversation(["one", "six", "three", "four"])]))
    with tuning(base, rows, epochs=40, batch=1, held_out=[1, 2], options=Options(keep="last")) as run:
        last = validations(events(run))[-1]
    assert last.exact_match == 0.5
    assert last.token_accuracy > 0.5


def test_the_best_weights_are_kept(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows, epochs=12, rate=0.03) as run:
        found: list[Validation] = []
        at_best = weights_of(run)
        for event in run:
            if isinstance(event, Validation):
                found.append(event)
                at_best = weights_of(run) if event.best else at_best
        assert torch.equal(run.adapter.weights, at_best)
        kept, steps, recipe = run.kept_step, run.step, run.manifest()["recipe"]
    lowest = min(found, key=lambda event: event.loss)
    assert found[0].step < kept == lowest.step < steps == run.total_steps
    assert (recipe["steps"], recipe["kept_step"]) == (steps, kept)
    assert [event.best for event in found] == [
        all(event.loss < earlier.loss for earlier in found[:number]) for number, event in enumerate(found)
    ]


def test_the_kept_weights_are_those_of_the_products(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in lower precision multiplies a copy of them."""
    monkeypatch.setattr(loop, "compute_dtype", lambda _device: torch.bfloat16)
    lower = Base.load(base.weights, base.device)
    with tuning(lower, tokenized(lower, pairs(*PAIRS)), epochs=12, rate=0.3) as run:
        events(run)
        assert run.kept_step < run.step
        assert torch.equal(run.adapter.copy, run.adapter.weights.bfloat16())


def test_the_last_weights_are_kept_when_asked_for(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows, epochs=12, rate=0.03, options=Options(keep="last")) as run:
        for event in run:
            if isinstance(event, Step):
                last = weights_of(run)
        assert torch.equal(run.adapter.weights, last)
        assert run.kept_step == run.step == run.total_steps


def test_a_run_that_is_left_early_can_keep_its_best(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows) as run:
        for event in run:
            if isinstance(event, Validation):
                validated = weights_of(run)
            elif event.step == 4:
                break
        assert not torch.equal(run.adapter.weights, validated)
        run.settle()
        assert torch.equal(run.adapter.weights, validated)
        assert (run.kept_step, run.step) == (3, 4)


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("batch", [2, 20])
def test_patience_ends_the_run(base: Base, rows: list[Row], patience: int, batch: int) -> None:
    options = Options(patience=patience)
    with tuning(base, rows, epochs=60, rate=0.03, options=options, batch=batch) as run:
        found = validations(events(run))
        assert run.finished
        assert run.step == found[-1].step < run.total_steps
        best = [event for event in found if event.best][-1]
        assert run.kept_step == best.step
    # A step that spans epochs counts them all.
    assert found[-2].epoch - best.epoch < patience <= found[-1].epoch - best.epoch


@pytest.mark.parametrize("options", [Options(), Options(keep="last"), Options(patience=2)])
def test_a_resumed_run_is_equal_to_the_last_bit(base: Base, rows: list[Row], options: Options) -> None:
    def fresh() -> TuningRun:
        return tuning(base, rows, epochs=8, rate=0.03, options=options)

    with fresh() as run:
        whole, trained, kept = events(run), weights_of(run), run.kept_step
    assert validations(whole)[-1].step > kept or options.keep == "last"
    second = whole.index(validations(whole)[1])
    for stop in (1, second, second + 1, len(whole)):  # before a validation, after it, and at the end
        with fresh() as run:
            before = events(run, stop)
            files = run.checkpoint()
        with fresh() as run:
            run.restore(files)
            assert before + events(run) == whole
            assert torch.equal(run.adapter.weights, trained)
            assert torch.equal(run.adapter.copy, trained)
            assert run.kept_step == kept


def test_a_checkpoint_of_an_earlier_version_is_left_aside(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows) as run:
        whole = events(run)
    with tuning(base, rows) as run:
        run.restore({"state.safetensors": b""})
        assert events(run) == whole


def test_a_gradient_that_is_no_number_ends_the_run(
    base: Base, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tuning(base, rows) as run:
        learn = run._network.learn

        def spoilt(batch: Batch, weight: float) -> float:
            loss = learn(batch, weight)
            run.adapter.gradient[0] = float("nan")
            return loss

        monkeypatch.setattr(run._network, "learn", spoilt)
        with pytest.raises(FailedPrecondition, match=r"gradient of step 1 is not a number.*rate below 0\.01"):
            list(run)


def test_a_validation_loss_that_is_no_number_ends_the_run(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows) as run:
        going = iter(run)
        assert [next(going).step for _ in range(3)] == [1, 2, 3]
        run.adapter.weights.fill_(float("nan"))
        run.adapter.refresh()
        with pytest.raises(FailedPrecondition, match="validation loss after step 3 is not a number"):
            next(going)


def test_the_strength_is_the_one_that_held_out_rows_prefer(
    base: Base, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(strengths: tuple[float, ...]) -> tuple[float, float, torch.Tensor]:
        monkeypatch.setattr(loop, "STRENGTHS", strengths)
        with tuning(base, rows, epochs=12, rate=0.03) as run:
            events(run)
            return run.strength, run._scores().loss, weights_of(run)

    each = {strength: losses((strength,)) for strength in (1.0, 0.8, 0.6)}
    strength, loss, weights = losses((1.0, 0.8, 0.6))
    assert (strength, loss) == min(((own, found) for own, found, _ in each.values()), key=lambda pair: pair[1])
    assert torch.equal(weights, each[strength][2])


def test_without_held_out_rows_the_recipe_says_how_strong(base: Base, rows: list[Row]) -> None:
    with tuning(base, rows, held_out=()) as run:
        events(run)
        full = {path: (layer.a.clone(), layer.b.clone()) for path, layer in run.adapter.layers.items()}
        assert run.manifest()["recipe"]["strength"] == 1.0
    with tuning(base, rows, held_out=(), recipe=Recipe(strength=0.5)) as run:
        events(run)
        run.settle()  # once is enough
        for path, layer in run.adapter.layers.items():
            assert torch.equal(layer.a, full[path][0])
            assert torch.equal(layer.b, full[path][1] * 0.5)
        assert run.manifest()["recipe"]["strength"] == 0.5
