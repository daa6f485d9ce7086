"""Recipes of tuning to try: runs of one recipe with several seeds, side by side in one batch.

The arithmetic is `training.loop.TuningRun`'s; side by side five seeds take little longer than one. What is here
and not in the product was tried and did not become the default.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Special, Turn
from tunesmith.training.examples import Row, collate, order
from tunesmith.training.hyperparameters import total_steps
from tunesmith.training.loop import Base

EVALUATION_TOKENS = 4096
HEAD_ROWS = 128
"""Positions whose logits exist at once."""

_labelled = FORMATS["labelled"]
MORE_FORMATS: Mapping[str, PromptFormat] = {
    "labelled-no-bos": replace(_labelled, start=()),
    "labelled-newline": replace(_labelled, end=Special("\n"), stops=(Special("\n"), Special("<eos>"))),
    "labelled-blank": replace(_labelled, before=("\nInput: ",)),
    "labelled-space": replace(_labelled, after=("\nOutput: ",), answer=""),
    "labelled-same-line": replace(_labelled, after=(" Output:",)),
    "lower": replace(_labelled, before=("input: ",), after=("\noutput:",)),
    "upper": replace(_labelled, before=("INPUT: ",), after=("\nOUTPUT:",)),
    "question": replace(_labelled, before=("Q: ",), after=("\nA:",)),
    "question-answer": replace(_labelled, before=("Question: ",), after=("\nAnswer:",)),
    "arrow": replace(_labelled, before=(), after=(" ->",)),
    "quoted": replace(_labelled, before=('Input: "',), after=('"\nOutput: "',), answer=""),
    "letters": replace(_labelled, before=("x: ",), after=("\ny:",)),
    "headed": replace(_labelled, before=("### Input:\n",), after=("\n\n### Output:\n",), answer=""),
    "example": replace(_labelled, before=("Example:\nInput: ",), after=("\nOutput:",)),
    "pairs": replace(_labelled, before=("Each output follows from its input.\n\nInput: ",)),
    "pattern": replace(_labelled, before=("Inputs and outputs, in the same form:\n\nInput: ",)),
    "tabular": replace(_labelled, before=("Input\tOutput\n",), after=("\t",), answer=""),
    "json": replace(_labelled, before=('{"input": "',), after=('", "output": "',), answer=""),
    "code": replace(_labelled, before=(">>> f('",), after=("')\n'",), answer=""),
    "line": replace(_labelled, before=(), after=("\n",), answer=""),
    "turns": replace(
        _labelled,
        before=(Special("<start_of_turn>"), "user\n"),
        after=(Special("<end_of_turn>"), "\n", Special("<start_of_turn>"), "model\n"),
        answer="",
    ),
}
"""Prompt formats beside the product's."""


@dataclass(frozen=True)
class Trial:
    """A recipe to try.

    Attributes:
        rank, alpha: Of the adapter; what is added is alpha / rank times B A x.
        clip: The gradient's largest norm.
        schedule: linear, cosine, constant, or late (linear over the last 30 %): how the learning rate falls.
        warmup: Over which share of the steps it rises first.
        rate: What the learning rate is multiplied by.
        a_rate, b_rate: What those of A and B are multiplied by (LoRA+: b_rate 4 to 16).
        layers: Words, joined by +, of which the names of the layers that learn have one.
        first, last: Only layers between these shares of the depth learn.
        depth_rate: The learning rate's factor for the first layer, growing to 1 for the last one.
        weight_decay, beta1, beta2, eps: AdamW's.
        optimizer: adam, sign, or muon.
        initial: uniform (PEFT's), orthogonal, top or bottom (singular directions of the base's layer).
        initial_scale: What A is multiplied by at the start.
        average: none, ema:DECAY, or last:SHARE, the mean of the last steps' weights.
        serve: What the trained adapter is multiplied by.
        reduction: token (every token weighs the same) or row (every row does).
        smoothing: Of the labels.
        confident: Tokens that have at least this probability teach nothing; above 1 every token teaches.
        focal: Tokens count with (1 - probability) to this power.
        entropy: The weight of the answers' negative entropy, added to the loss.
        prompt: The weight of the prompts' tokens, learnt as well.
        anchor: The weight of the divergence from the base model at the prompts' tokens.
        dropout: Of the adapter's inputs.
        noise: NEFTune's alpha: noise on the embeddings.
        form: The prompt format; empty: the base model's.
        sort: Whether each epoch goes from short rows to long ones.
    """

    rank: int = 16
    alpha: float = 16.0
    clip: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.0
    rate: float = 1.0
    a_rate: float = 1.0
    b_rate: float = 1.0
    layers: str = ""
    first: float = 0.0
    last: float = 1.0
    depth_rate: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    optimizer: str = "adam"
    initial: str = "uniform"
    initial_scale: float = 1.0
    average: str = "none"
    serve: float = 1.0
    reduction: str = "token"
    smoothing: float = 0.0
    confident: float = 2.0
    focal: float = 0.0
    entropy: float = 0.0
    prompt: float = 0.0
    anchor: float = 0.0
    dropout: float = 0.0
    noise: float = 0.0
    form: str = ""
    sort: bool = False


def prompt_format(name: str) -> PromptFormat:
    """Return a format of the product's or of the ones to try."""
    return MORE_FORMATS[name] if name in MORE_FORMATS else FORMATS[name]


def rows_of(tokenizer: Tokenizer, form: PromptFormat, pairs: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return pairs as rows of tokens."""
    return [
        Row(form.prompt(tokenizer, [Turn("user", pair["text_input"])]), form.output(tokenizer, pair["output"]))
        for pair in pairs
    ]


class _Product(torch.autograd.Function):
    """`W x + scale * B A x` where each seed's rows have an A and a B of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _weights: Tensor, layer: "Layer") -> Tensor:
        rows = x.reshape(layer.adapters.seeds, -1, x.shape[-1])
        seen = rows
        ctx.kept = None
        if layer.adapters.dropout:
            keep = 1 - layer.adapters.dropout
            ctx.kept = (torch.rand(rows.shape) < keep).to(x.dtype) / keep
            seen = rows * ctx.kept
        low = torch.bmm(seen, layer.a_copy.transpose(1, 2))
        y = functional.linear(rows, layer.base.weight, layer.base.bias)
        y.baddbmm_(low, layer.b_copy.transpose(1, 2), alpha=layer.adapters.scale)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(seen, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        rows, low = ctx.saved_tensors
        layer: Layer = ctx.layer
        upstream = upstream.reshape(rows.shape[0], -1, upstream.shape[-1])
        low_upstream = torch.bmm(upstream, layer.b_copy).mul_(layer.adapters.scale)
        layer.b_gradient.add_(torch.bmm(upstream.transpose(1, 2), low), alpha=layer.adapters.scale)
        layer.a_gradient.add_(torch.bmm(low_upstream.transpose(1, 2), rows))
        gradient = upstream @ layer.base.weight
        through = torch.bmm(low_upstream, layer.a_copy)
        gradient.add_(through if ctx.kept is None else through * ctx.kept)
        return gradient.view(ctx.shape), None, None


class Layer(nn.Module):
    """A frozen linear layer with an adapter for each seed.

    Attributes:
        a, b: (seeds, rank, in_features) and (seeds, out_features, rank), parts of all adapters' flat weights.
        a_copy, b_copy, a_gradient, b_gradient: Their copies in the base's precision, and their gradients.
    """

    def __init__(self, base: nn.Linear, adapters: "Adapters", start: int, rank: int) -> None:
        super().__init__()
        self.base, self.adapters, self.start = base, adapters, start
        a, b = (rank, base.in_features), (base.out_features, rank)
        middle = start + math.prod(a)
        self.end = middle + math.prod(b)

        def parts(flat: Tensor) -> tuple[Tensor, Tensor]:
            return flat[:, start:middle].view(-1, *a), flat[:, middle : self.end].view(-1, *b)

        self.a, self.b = parts(adapters.weights)
        self.a_copy, self.b_copy = parts(adapters.copy)
        self.a_gradient, self.b_gradient = parts(adapters.gradient)

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) with each seed's adapter's part added to its rows."""
        if not self.adapters.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        return _Product.apply(x, self.adapters.leaf, self)  # type: ignore[no-any-return, no-untyped-call]


class Adapters:
    """The adapters of all seeds on a base model; all weights are one tensor, a row a seed."""

    def __init__(self, linears: Mapping[str, nn.Linear], trial: Trial, seeds: Sequence[int]) -> None:
        size = sum(trial.rank * (linear.in_features + linear.out_features) for linear in linears.values())
        self.seeds, self.scale, self.enabled = len(seeds), trial.alpha / trial.rank, True
        self.dropout = 0.0
        self.weights = torch.zeros(len(seeds), size)
        self.gradient = torch.zeros_like(self.weights)
        self.copy = self.weights.to(next(iter(linears.values())).weight.dtype)
        self.leaf = torch.zeros((), requires_grad=True)  # makes autograd go through every layer
        self.layers: dict[str, Layer] = {}
        start = 0
        for path, linear in linears.items():
            self.layers[path] = Layer(linear, self, start, trial.rank)
            start = self.layers[path].end
        for number, seed in enumerate(seeds):
            self._initialise(number, seed, trial)
        self.refresh()

    def _initialise(self, number: int, seed: int, trial: Trial) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            a, bound = layer.a[number], 1 / math.sqrt(layer.base.in_features)
            drawn = (torch.rand(a.shape, generator=generator) * 2 - 1) * bound
            size = drawn.norm()
            if trial.initial == "orthogonal":
                drawn = torch.linalg.qr(drawn.T)[0].T
            elif trial.initial != "uniform":
                _, vectors = torch.linalg.eigh(layer.base.weight.float().T @ layer.base.weight.float())
                # In ascending order; the last ones are the largest.
                chosen = vectors[:, -trial.rank :] if trial.initial == "top" else vectors[:, : trial.rank]
                drawn = chosen.T
            a.copy_(drawn * (trial.initial_scale * size / drawn.norm()))

    def refresh(self, scale: float = 1.0) -> None:
        """Bring the copies up to date, the adapters multiplied by `scale`."""
        self.copy.copy_(self.weights)
        if scale != 1.0:
            for layer in self.layers.values():
                layer.b_copy.mul_(scale)


@contextmanager
def attached(model: Any, trial: Trial, seeds: Sequence[int]) -> Iterator[Adapters]:
    """Adapt every linear layer of the model's blocks inside the block."""
    head = model.get_output_embeddings()
    parts = ((path, part) for path, part in model.named_modules() if part is not head)
    found = {path: part for path, part in parts if isinstance(part, nn.Linear)}
    adapters = Adapters(found, trial, seeds)
    try:
        for path, layer in adapters.layers.items():
            model.set_submodule(path, layer)
        yield adapters
    finally:
        for path, linear in found.items():
            model.set_submodule(path, linear)


@contextmanager
def attached_files(model: Any, folders: Sequence[Path]) -> Iterator[None]:
    """Put adapters that PEFT saved on the model, a seed each; all have one rank and one scale."""
    config = json.loads((folders[0] / "adapter_config.json").read_text("utf-8"))
    trial = Trial(rank=config["r"], alpha=config["lora_alpha"])
    with attached(model, trial, range(len(folders))) as adapters:
        adapters.weights.zero_()
        for number, folder in enumerate(folders):
            tensors = load_file(folder / "adapter_model.safetensors")
            for path, layer in adapters.layers.items():
                for side, part in (("A", layer.a), ("B", layer.b)):
                    found = tensors.pop(f"base_model.model.{path}.lora_{side}.weight", None)
                    if found is not None:
                        part[number].copy_(found)
            if tensors:
                raise SystemExit(f"{folder} adapts layers that are not known here: {min(tensors)}")
        adapters.refresh()
        yield


@dataclass
class Targets:
    """What is to be learnt at some positions of a batch.

    Attributes:
        positions: (n, 2) rows and columns.
        targets: (n,) tokens, or the base model's hidden states, (n, width), where its answers are to be kept.
        weights: (n,) of their losses.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor


class _Loss(torch.autograd.Function):
    """Weighted cross-entropy of a recipe; the forward pass makes the gradient, in parts."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, wanted: Targets, trial: Trial) -> Tensor:
        losses = torch.empty(len(hidden))
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logs = functional.linear(hidden[part].contiguous(), head).float().log_softmax(-1)
            losses[part], change = _through(logs, wanted.targets[part], wanted.weights[part], head, trial)
            gradient[part] = change.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # of the weighted sum: the weights are in it
        return gradient, None, None, None


def _through(logs: Tensor, targets: Tensor, weights: Tensor, head: Tensor, trial: Trial) -> tuple[Tensor, Tensor]:
    """Return the losses, unweighted, and the logits' gradient; overwrites the log probabilities."""
    if targets.ndim == 2:
        base = functional.linear(targets, head).float().log_softmax(-1)
        losses = functional.kl_div(logs, base, reduction="none", log_target=True).sum(-1)
        return losses, logs.exp_().sub_(base.exp_()).mul_(weights[:, None])
    rows = torch.arange(len(logs))
    right = logs[rows, targets]
    losses = -right
    probability = right.exp()
    weights = weights * (probability < trial.confident) * (1 - probability) ** trial.focal
    extra = None
    if trial.entropy:
        chances = logs.exp()
        along = (chances * logs).sum(-1, keepdim=True)
        extra = chances.mul_(logs - along).mul_(weights[:, None] * trial.entropy)
    change = logs.exp_()
    if trial.smoothing:
        change.sub_(trial.smoothing / change.shape[1])
    change[rows, targets] -= 1 - trial.smoothing
    change.mul_(weights[:, None])
    return losses, change if extra is None else change.add_(extra)


class TrialRuns:
    """Runs of one recipe with several seeds, on adapters that are attached to the base."""

    def __init__(
        self, base: Base, adapters: Adapters, rows: Sequence[Row], given: protos.Hyperparameters, trial: Trial,
        seeds: Sequence[int],
    ) -> None:  # fmt: skip
        self._base, self._adapters, self._rows, self._given = base, adapters, rows, given
        self._trial, self._seeds = trial, seeds
        self._total = total_steps(len(rows), given)
        self._rates = self._vector(self._rate_of)
        self._first = torch.zeros_like(adapters.weights)
        self._second = torch.zeros_like(adapters.weights)
        self._mean: Tensor | None = None
        self._averaged = 0
        self._random = torch.Generator().manual_seed(7)
        self._kept = self._base_hidden() if trial.anchor else {}

    def train(self) -> Tensor:
        """Train all steps; return the last one's mean losses, a number a seed, in nats a token."""
        size, wanted = self._given.batch_size, len(self._rows) * self._given.epoch_count
        numbers = [self._order(seed) for seed in self._seeds]
        self._adapters.dropout = self._trial.dropout
        torch.manual_seed(0)
        for step in range(self._total):
            count = min(size, wanted - step * size)
            batch = [[self._rows[n] for n in islice(order, count)] for order in numbers]
            losses = self._gradient(batch)
            self._change(step)
            self._average(step)
            self._adapters.refresh()
        self._adapters.dropout = 0.0
        if self._mean is not None:
            self._adapters.weights.copy_(self._mean)
        return losses

    def _order(self, seed: int) -> Iterator[int]:
        numbers = order(len(self._rows), seed)
        while self._trial.sort:
            epoch = islice(numbers, len(self._rows))
            yield from sorted(epoch, key=lambda n: len(self._rows[n]))
        yield from numbers

    def _hidden(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._base.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return found

    @torch.no_grad()
    def _base_hidden(self) -> dict[int, Tensor]:
        """Return the base model's own hidden states at each row's prompt."""
        self._adapters.enabled = False
        kept = {id(row): self._hidden(torch.tensor([row.prompt]))[0, :-1] for row in self._rows}
        self._adapters.enabled = True
        return kept

    def _gradient(self, batch: Sequence[Sequence[Row]]) -> Tensor:
        """Fill in the gradients; return the mean loss of each seed's rows."""
        learnt = torch.tensor([float(sum(row.learnt for row in rows)) for rows in batch])
        prompts = torch.tensor([float(sum(len(row.prompt) - 1 for row in rows)) for rows in batch])
        self._adapters.gradient.zero_()
        losses = sum((self._part(part, len(batch[0]), learnt, prompts) for part in _parts(batch)), torch.zeros(()))
        norm = self._adapters.gradient.norm(dim=1, keepdim=True)
        self._adapters.gradient.mul_((self._trial.clip / (norm + 1e-6)).clamp(max=1.0))
        return losses / learnt

    def _part(self, batch: Sequence[Sequence[Row]], size: int, learnt: Tensor, prompts: Tensor) -> Tensor:
        """Add the gradients of a part of a batch; return the sum of each seed's losses."""
        rows = [row for part in batch for row in part]
        made = collate(rows, self._base.device)
        head = self._base.model.get_output_embeddings().weight
        at, seed_of = made.positions[:, 0], torch.arange(len(rows)) // len(batch[0])
        weights = 1 / learnt[seed_of[at]]
        if self._trial.reduction == "row":
            weights = 1 / (size * torch.bincount(at).float()[at])
        with self._noise():
            hidden = self._hidden(made.tokens)
        losses = _loss(hidden, head, Targets(made.positions, made.targets, weights), self._trial)
        total = losses.sum()
        for extra in self._prompts(rows, made.tokens, 1 / prompts[seed_of]):
            total = total + _loss(hidden, head, extra, Trial()).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return torch.zeros(len(batch)).index_add(0, seed_of[at], losses.detach())

    def _prompts(self, rows: Sequence[Row], tokens: Tensor, weights: Tensor) -> Iterator[Targets]:
        """Yield what is learnt at the prompts' own tokens."""
        if not self._trial.prompt and not self._trial.anchor:
            return
        at = torch.tensor([(n, column) for n, row in enumerate(rows) for column in range(len(row.prompt) - 1)])
        weights = weights[at[:, 0]]
        if self._trial.prompt:
            yield Targets(at, tokens[at[:, 0], at[:, 1] + 1], weights * self._trial.prompt)
        if self._trial.anchor:
            yield Targets(at, torch.cat([self._kept[id(row)] for row in rows]), weights * self._trial.anchor)

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """Put noise on the embeddings: NEFTune, Jain et al. 2023, arXiv:2310.05914."""

        def shake(_module: Any, _given: Any, embedded: Tensor) -> Tensor:
            size = self._trial.noise / math.sqrt(embedded.shape[1] * embedded.shape[2])
            drawn = torch.rand(embedded.shape, generator=self._random) * 2 - 1
            # Relative to the embeddings' own size, which the paper's models had at about 1.
            return embedded + (drawn * size * embedded.float().std()).to(embedded.dtype)

        embed = self._base.model.base_model.embed_tokens
        hook = embed.register_forward_hook(shake) if self._trial.noise else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _vector(self, value: Callable[[str, str], float]) -> Tensor:
        """Return a flat vector with a value for each layer's A and B."""
        parts = []
        for path, layer in self._adapters.layers.items():
            parts += [torch.full((layer.a[0].numel(),), value(path, "a"))]
            parts += [torch.full((layer.b[0].numel(),), value(path, "b"))]
        return torch.cat(parts)

    def _rate_of(self, path: str, side: str) -> float:
        trial = self._trial
        numbers = [int(word) for name in self._adapters.layers for word in name.split(".") if word.isdigit()]
        depth = next(int(word) for word in path.split(".") if word.isdigit()) / max(numbers)
        if trial.layers and not any(word in path for word in trial.layers.split("+")):
            return 0.0
        if not trial.first <= depth <= trial.last:
            return 0.0
        rate = trial.a_rate if side == "a" else trial.b_rate
        return rate * trial.rate * (trial.depth_rate + (1 - trial.depth_rate) * depth)

    def _factor(self, step: int) -> float:
        """Return the share of the learning rate at a step, from 0."""
        trial, done = self._trial, step / self._total
        if done < trial.warmup:
            return (step + 1) / (math.ceil(trial.warmup * self._total) + 1)
        left = 1 - (done - trial.warmup) / (1 - trial.warmup)
        return {
            "linear": left,
            "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
            "constant": 1.0,
            "late": min(1.0, left / 0.3),
        }[trial.schedule]

    def _change(self, step: int) -> None:
        """Change the weights: AdamW, its sign, or Muon (orthogonalised momentum)."""
        trial, number = self._trial, step + 1
        rate = self._given.learning_rate * self._factor(step)
        weights, gradient = self._adapters.weights, self._adapters.gradient
        if trial.weight_decay:
            weights.mul_(1 - rate * trial.weight_decay)
        self._first.lerp_(gradient, 1 - trial.beta1)
        self._second.mul_(trial.beta2).addcmul_(gradient, gradient, value=1 - trial.beta2)
        if trial.optimizer == "adam":
            change = (self._second / (1 - trial.beta2**number)).sqrt_().add_(trial.eps)
            change = torch.div(self._first, change, out=change).mul_(1 / (1 - trial.beta1**number))
        elif trial.optimizer == "sign":
            change = self._first.sign()
        else:
            change = self._orthogonal(self._first)
        weights.addcmul_(change, self._rates, value=-rate)

    def _orthogonal(self, flat: Tensor) -> Tensor:
        """Return each matrix's nearest orthogonal one, half as large as Adam's first change is."""
        made = torch.empty_like(flat)
        for layer in self._adapters.layers.values():
            start = layer.start
            for part in (layer.a, layer.b):
                end = start + part[0].numel()
                matrix = flat[:, start:end].view(part.shape)
                wide = matrix if matrix.shape[1] < matrix.shape[2] else matrix.transpose(1, 2)
                values, vectors = torch.linalg.eigh(wide @ wide.transpose(1, 2))
                inverse = (vectors * values.clamp(min=1e-20).rsqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
                nearest = inverse @ wide * (0.5 * math.sqrt(wide.shape[2]))
                nearest = nearest if wide is matrix else nearest.transpose(1, 2)
                made[:, start:end] = nearest.reshape(len(made), -1)
                start = end
        return made

    def _average(self, step: int) -> None:
        kind, _, value = self._trial.average.partition(":")
        weights, done = self._adapters.weights, (step + 1) / self._total
        if kind == "ema":
            # A short memory at first, so that the start is forgotten.
            self._averaged += 1
            keep = min(float(value), self._averaged / (self._averaged + 9))
            self._mean = weights.clone() if self._mean is None else self._mean.lerp_(weights, 1 - keep)
        elif kind == "last" and done > 1 - float(value):
            self._averaged += 1
            self._mean = weights.clone() if self._mean is None else self._mean.lerp_(weights, 1 / self._averaged)


@torch.inference_mode()
def answers(base: Base, cases: Sequence[Row], seeds: int = 1) -> list[list[bool]]:
    """Return for each seed and case whether the whole answer is what greedy generation gives.

    Args:
        base: With the adapters of so many seeds attached; or with one adapter, or none.
        cases: What is asked.
        seeds: How many adapters there are.
    """
    head = base.model.get_output_embeddings().weight
    right = [[False] * len(cases) for _ in range(seeds)]
    left = sorted(range(len(cases)), key=lambda n: len(cases[n]))
    while left:
        many = max(1, EVALUATION_TOKENS // (seeds * len(cases[left[-1]])))
        part, left = left[-many:], left[:-many]
        batch = collate([cases[n] for n in part] * seeds, base.device)
        hidden = base.model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        chunks = torch.split(hidden[batch.positions[:, 0], batch.positions[:, 1]], HEAD_ROWS)
        found = torch.cat([functional.linear(chunk.contiguous(), head).argmax(-1) for chunk in chunks])
        wrong = set(batch.positions[found != batch.targets, 0].tolist())
        for number in range(seeds * len(part)):
            right[number // len(part)][part[number % len(part)]] = number not in wrong
    return right


def _parts(batch: Sequence[Sequence[Row]]) -> list[list[list[Row]]]:
    """Return a batch as one part or, where that spares much padding, as one of short and one of long rows."""
    rows = [sorted(part, key=len) for part in batch]
    widths = [max(len(part[n]) for part in rows) for n in range(len(rows[0]))]
    tokens = {cut: cut * widths[cut - 1] + (len(widths) - cut) * widths[-1] for cut in range(1, len(widths))}
    cut = min(tokens, key=tokens.__getitem__, default=0)
    if cut == 0 or tokens[cut] > 0.75 * len(widths) * widths[-1]:
        return [rows]
    return [[part[:cut] for part in rows], [part[cut:] for part in rows]]


def _loss(hidden: Tensor, head: Tensor, wanted: Targets, trial: Trial) -> Tensor:
    at = hidden[wanted.positions[:, 0], wanted.positions[:, 1]]
    losses: Tensor = _Loss.apply(at, head, wanted, trial)  # type: ignore[no-untyped-call]
    return losses
