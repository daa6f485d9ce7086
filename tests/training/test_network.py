"""Losses and gradients of a network: PEFT's, whatever the batch, the layout or the kernels."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tiny import SLIDING_WINDOW
from training.training_data import in_peft
from tunesmith import protos
from tunesmith.base_models import decoder
from tunesmith.base_models.decoder import Turns
from tunesmith.kernels import passes
from tunesmith.kernels.passes import CompiledKernels, TorchKernels
from tunesmith.training import network
from tunesmith.training.attention import Heads, PaddedAttention, ShortAttention
from tunesmith.training.batches import collate
from tunesmith.training.examples import Row
from tunesmith.training.loop import Base, Recipe, TuningRun
from tunesmith.training.loss import OutputHead
from tunesmith.training.network import Network, freeze

CPU = torch.device("cpu")
LENGTHS = (5, 12, 3 * SLIDING_WINDOW, 1, 12, SLIDING_WINDOW + 1)
compiles = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def some_rows() -> list[Row]:
    """Rows of several lengths, some beyond the window; one learns a token in its middle too."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        tokens = torch.randint(3, 200, (length + 2,), generator=generator).tolist()
        rows.append(Row(tokens[:-2], tokens[-2:], ((3, 4),) if length > 10 else ()))
    return rows


@pytest.fixture
def adapted(base: Base) -> Iterator[Network]:
    """A network with an adapter that changes what it answers: with B at 0, A would have no gradient."""
    with base.network.adapted(4, 8.0) as made:
        disturb(made)
        yield made


def disturb(made: Network) -> None:
    made.adapter.initialise(3)
    for layer in made.adapter.layers.values():
        layer.b.normal_(std=0.1, generator=torch.Generator().manual_seed(len(layer.b)))
    made.adapter.refresh()


def learnt(made: Network, rows: list[Row]) -> tuple[float, torch.Tensor]:
    """The summed loss and its gradient."""
    made.adapter.gradient.zero_()
    return made.learn(collate(rows, CPU), 1.0), made.adapter.gradient.clone()


def test_the_loss_and_the_gradients_are_pefts(base: Base, adapted: Network) -> None:
    rows = some_rows()
    loss, _ = learnt(adapted, rows)
    losses, right = adapted.evaluate(collate(rows, CPU))
    model = in_peft(base, adapted.adapter.to_files("tiny"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    total, hits = torch.zeros(()), []
    for row in rows:
        tokens = torch.tensor(row.prompt + row.output)
        logits = model(input_ids=tokens[None]).logits[0]
        for start, end in row.answers:
            at = logits[start - 1 : end - 1]
            total = total + torch.nn.functional.cross_entropy(at, tokens[start:end], reduction="sum")
            hits += (at.argmax(-1) == tokens[start:end]).tolist()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert losses.sum().item() == pytest.approx(total.item(), rel=1e-5)
    assert right.tolist() == hits
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    ours = {
        f"base_model.model.{path}.lora_{side}.default.weight": gradient
        for path, layer in adapted.adapter.layers.items()
        for side, gradient in (("A", layer.a_gradient), ("B", layer.b_gradient))
    }
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_rows_together_are_rows_alone(adapted: Network) -> None:
    """Packed behind one another, padded for attention, or one by one."""
    rows = some_rows()
    loss, gradient = learnt(adapted, rows)
    alone = [learnt(adapted, [row]) for row in rows]
    assert loss == pytest.approx(sum(one for one, _ in alone), rel=1e-5)
    torch.testing.assert_close(gradient, torch.stack([one for _, one in alone]).sum(0), rtol=1e-3, atol=1e-4)
    same = [rows[1], rows[4]]
    torch.testing.assert_close(learnt(adapted, same)[1], alone[1][1] + alone[4][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_what_is_not_kept_is_computed_again(base: Base, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()
    with base.network.adapted(4, 8.0) as made:
        disturb(made)
        loss, gradient = learnt(made, rows)
    monkeypatch.setattr(network, "MOST_KEPT_TOKENS", kept)
    with base.network.adapted(4, 8.0) as made:
        disturb(made)
        again, same = learnt(made, rows)
    assert again == loss
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-5)


def test_without_the_adapter_the_base_answers(base: Base, adapted: Network) -> None:
    batch = collate(some_rows(), CPU)
    tuned = adapted.evaluate(batch)[0]
    with adapted.adapter.disabled():
        untuned = adapted.evaluate(batch)[0]
    assert torch.equal(adapted.evaluate(batch)[0], tuned)
    with base.network.adapted(4, 8.0) as fresh:
        assert torch.equal(fresh.evaluate(batch)[0], untuned)
    assert not torch.allclose(tuned, untuned, atol=0.1)


def test_the_output_head_in_chunks_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(50, (300,))
    head = OutputHead(weight, TorchKernels())
    with torch.no_grad():
        loss, gradient = head.learn(hidden, weight, targets, 290)
        losses, right = head.evaluate(hidden, targets)
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert loss == pytest.approx(expected[:290].sum().item(), rel=1e-5)
    torch.testing.assert_close(losses, expected.detach())
    assert torch.equal(right, logits.argmax(-1) == targets)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected[:290].sum(), hidden)[0], rtol=1e-4, atol=1e-5
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledKernels:
    found = passes.find(CPU, torch.bfloat16, tmp_path_factory.mktemp("kernels"))
    assert isinstance(found, CompiledKernels)
    return found


@compiles
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("normed", [True, False])
def test_compiled_kernels_are_torchs(compiled: CompiledKernels, rows: int, kind: str, normed: bool) -> None:
    torch.manual_seed(rows)
    x, y, of_x = (torch.randn(rows, 40).bfloat16() for _ in range(3))
    factor, total = torch.rand(40), torch.randn(rows, 40)
    heads = torch.randn(rows, 5, 8).bfloat16()
    turns = Turns(torch.randn(rows, 1, 8), torch.randn(rows, 1, 8))
    of_heads = tuple(torch.randn(rows, count, 8).bfloat16() for count in (3, 1, 1))
    both, of_product = 4 * torch.randn(rows, 80).bfloat16(), torch.randn(rows, 40).bfloat16()
    both[0, 0], both[0, 1] = 60.0, -60.0
    logits, targets = 5 * torch.randn(rows, 1001).bfloat16(), torch.randint(1001, (rows,))
    of_heads_factor = torch.rand(4, 8) if normed else None
    found: list[list[torch.Tensor]] = []
    for own in (TorchKernels(), compiled):
        inverse = own.norm(x, factor, 1e-6)[1]
        turned, turned_inverse = own.turn(heads, 4, turns, of_heads_factor, 1e-6)
        added = total.clone()
        own.norm_back_add(of_x, x, inverse, factor, added)
        found.append(
            [
                *own.norm(x, factor, 1e-6),
                *own.add_norm(x, y, factor, 1e-6),
                own.norm_back(total, x, inverse, factor),
                added,
                turned,
                own.turn_back(of_heads, heads, turned_inverse, turns, of_heads_factor),
                own.gate(kind, both),
                own.gate_back(kind, of_product, both),
                *own.softmax(logits, targets),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


@compiles
@pytest.mark.parametrize(("queries", "keys"), [(4, 1), (6, 2), (3, 3)])
def test_short_rows_are_attended_to_as_padded_ones(compiled: CompiledKernels, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    batch = collate([Row([1] * length, [1]) for length in (11, 0, 40, 11)], CPU)
    heads = torch.randn(len(batch.tokens), queries + 2 * keys, 16).bfloat16()
    turned, gradient = heads[:, : queries + keys].contiguous(), torch.randn(len(heads), queries * 16).bfloat16()
    shape = Heads(queries, keys, 16, 0.3)
    found = []
    for own in (PaddedAttention(batch, shape, None), ShortAttention(batch, shape, compiled)):
        gathered, kept = own.forward(turned, heads)
        found.append([gathered, *own.backward(gradient, kept)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


@compiles
def test_in_bfloat16_the_gradients_stray_no_farther_than_pefts(
    base: Base, adapted: Network, compiled: CompiledKernels
) -> None:
    """From those of float32, whether the small operations are compiled or not."""
    rows = some_rows()
    exact = learnt(adapted, rows)[1]
    model = in_peft(base, adapted.adapter.to_files("tiny"), torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for row in rows:
        labels = torch.full((len(row),), -100)
        tokens = torch.tensor(row.prompt + row.output)
        for start, end in row.answers:
            labels[start:end] = tokens[start:end]
        (model(input_ids=tokens[None], labels=labels[None]).loss * row.learnt).backward()
    parameters = dict(model.named_parameters())
    theirs = torch.cat(
        [
            parameters[f"base_model.model.{path}.lora_{side}.default.weight"].grad.flatten().float()  # type: ignore[union-attr]
            for path in adapted.adapter.layers
            for side in "AB"
        ]
    )
    exact_in_order = in_order(adapted)
    allowed = (theirs - exact_in_order).norm()
    assert allowed < exact.norm() / 5
    load = partial(decoder.load, base.weights.path, CPU, torch.bfloat16)
    for own in (compiled, TorchKernels()):
        with freeze(load, own).adapted(4, 8.0) as made:
            disturb(made)
            learnt(made, rows)
            assert (in_order(made) - exact_in_order).norm() < 1.3 * allowed


def in_order(made: Network) -> torch.Tensor:
    layers = made.adapter.layers.values()
    return torch.cat([part.flatten() for layer in layers for part in (layer.a_gradient, layer.b_gradient)])


def test_without_a_compiler_torch_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler in ("false", "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        assert isinstance(passes.find(CPU, torch.bfloat16, tmp_path), TorchKernels)
    assert {left.suffix for left in tmp_path.iterdir()} <= {".lock"}
    assert isinstance(passes.find(CPU, torch.float32, tmp_path), TorchKernels)


def test_an_adapter_may_have_any_rank_and_alpha(base: Base) -> None:
    given = protos.Hyperparameters(epoch_count=8, batch_size=6, learning_rate=0.01)
    with TuningRun(base, some_rows(), given, 0, Recipe(rank=3, alpha=5.0)) as run:
        losses = [step.mean_loss for step in run]
    assert losses[-1] < losses[0]
