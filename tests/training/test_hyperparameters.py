"""Step arithmetic and defaults, against what the hosted service was seen to do."""

import pytest

from tunesmith import protos
from tunesmith.training.hyperparameters import epoch_of, resolve, total_steps, violations


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps"),
    [
        (15, 2, 5, 38),
        (15, 4, 5, 19),
        (15, 4, 100, 375),
        (15, 2, 3, 23),
        (15, 4, 3, 12),
        (25, 16, 10, 16),
        (1, 4, 5, 2),
    ],
)
def test_total_steps_as_observed(examples: int, batch: int, epochs: int, steps: int) -> None:
    assert total_steps(examples, protos.Hyperparameters(batch_size=batch, epoch_count=epochs)) == steps


def test_epochs_as_observed() -> None:
    tutorial = protos.Hyperparameters(batch_size=4, epoch_count=5)
    assert [epoch_of(step, 15, tutorial) for step in (1, 3, 4, 7, 8, 11, 12, 15, 19)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        4,
        5,
    ]
    assert epoch_of(16, 25, protos.Hyperparameters(batch_size=16, epoch_count=10)) == 10
    assert epoch_of(2, 1, protos.Hyperparameters(batch_size=4, epoch_count=5)) == 5  # never past the last


@pytest.mark.parametrize(
    ("examples", "given", "expected"),
    [
        (15, {}, (5, 4, 0.001)),
        (999, {}, (5, 4, 0.001)),
        (1000, {}, (5, 16, 0.0002)),
        (15, {"learning_rate_multiplier": 0.5}, (5, 4, 0.0005)),
        (1000, {"learning_rate_multiplier": 2.0}, (5, 16, 0.0004)),
        (15, {"learning_rate": 0.01, "epoch_count": 1, "batch_size": 8}, (1, 8, 0.01)),
    ],
)
def test_defaults(examples: int, given: dict[str, float], expected: tuple[int, int, float]) -> None:
    resolved = resolve(protos.Hyperparameters(**given), examples)  # type: ignore[arg-type]
    assert (resolved.epoch_count, resolved.batch_size) == expected[:2]
    assert resolved.learning_rate == pytest.approx(expected[2])
    assert not resolved.HasField("learning_rate_multiplier")  # Google's old client cannot read it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch_count", 0),
        ("epoch_count", -1),
        ("epoch_count", 1001),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", 1.5),
        ("learning_rate_multiplier", -1.0),
    ],
)
def test_impossible_values_are_named(field: str, value: float) -> None:
    assert [name for name, _ in violations(protos.Hyperparameters(**{field: value}))] == [field]


def test_possible_values() -> None:
    assert list(violations(protos.Hyperparameters(epoch_count=1, batch_size=1, learning_rate=1e-6))) == []
