"""transformers' `generate`, with PEFT's adapters: one job, in a process of its own.

serving.py runs it: python serving_transformers.py JOB RESULT
One adapter is merged into the weights, which is fastest; of several, each row of the batch names its own.
"""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from serving_job import WARM_UP, Answer, Ask, Job, Result
from training_job import peak_bytes


class Clock(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Notes when each token of the batch was there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note the time."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(job: Job) -> Any:
    """Return the base model with the adapters."""
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.bfloat16 if job.bf16 else torch.float32)
    first, *others = job.adapters
    adapted = PeftModel.from_pretrained(model, first, adapter_name="0")
    if not others:
        return adapted.merge_and_unload().eval()
    for number, path in enumerate(others, start=1):
        adapted.load_adapter(path, adapter_name=str(number))
    return adapted.eval()


@torch.inference_mode()
def answer(model: Any, asks: list[Ask], outputs: int) -> list[Answer]:
    """Answer questions in one batch."""
    width = max(len(ask.prompt) for ask in asks)
    left = [width - len(ask.prompt) for ask in asks]
    tokens = torch.tensor([[0] * gap + ask.prompt for gap, ask in zip(left, asks, strict=True)])
    seen = torch.tensor([[0] * gap + [1] * (width - gap) for gap in left])
    clock = Clock()
    settings = GenerationConfig(do_sample=False, max_new_tokens=outputs, pad_token_id=0)
    mixed = {"adapter_names": [str(ask.adapter) for ask in asks]} if isinstance(model, PeftModel) else {}
    began = time.perf_counter()
    output = model.generate(
        input_ids=tokens,
        attention_mask=seen,
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([clock]),
        **mixed,
    )
    first, last = clock.times[0] - began, clock.times[-1] - began
    return [Answer(first, last, len(row) - width, row[width:].tolist()) for row in output]


def main(job: Job) -> Result:
    """Answer as the job says."""
    torch.set_num_threads(job.threads)
    model = load(job)
    model.generation_config.eos_token_id = None  # which ends answers
    for burst in job.warm:
        answer(model, burst, WARM_UP)
    answers = answer(model, job.asks, job.outputs)
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}
    return Result(answers, peak_bytes(), versions)


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
