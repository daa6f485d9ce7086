"""TRL's side of the training benchmark: one job with `SFTTrainer` and PEFT, in a process of its own.

training.py runs it in the environment of pins/trl.txt: python training_trl.py JOB RESULT
"""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from training_job import Job, Result, peak_bytes

FASTEST: dict[str, Any] = {"padding_free": True, "gradient_checkpointing": False}
"""Of what docs/benchmarks.md says was tried. TRL documents padding_free for FlashAttention alone; the losses in
float32 show that torch's own attention keeps the rows apart as well."""


class Clock(TrainerCallback):
    """Takes one step's forward and backward pass as a warm-up, and then the time."""

    trainer: SFTTrainer
    began = seconds = 0.0

    def on_train_begin(self, *_: Any, model: Any, train_dataloader: Any, **__: Any) -> None:
        """Warm up; TRL has made its optimizer and batches by now, and is not charged for them."""
        batch = next(iter(train_dataloader))
        targets = (batch["labels"] != -100).sum()
        self.trainer.training_step(self.trainer.model_wrapped, batch, num_items_in_batch=targets)
        model.zero_grad()
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.seconds = time.perf_counter() - self.began


def main(job: Job, folder: Path) -> Result:
    """Train as the job says."""
    torch.set_num_threads(job.threads)
    disable_progress_bar()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(job.weights)
    texts = [dict(zip(("prompt", "completion"), text, strict=True)) for text in job.texts]
    clock = Clock()
    clock.trainer = trainer = SFTTrainer(
        model=start(job),
        args=config(job, folder),
        # In the order that ours takes the rows, over the borders of epochs: so each step has the same batch.
        train_dataset=Dataset.from_list([texts[number] for number in job.sequence]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    versions = {name: version(name) for name in ("trl", "peft", "transformers", "accelerate", "torch")}
    return Result(clock.seconds, losses, seen(trainer, job), peak_bytes(), versions)


def start(job: Job) -> PeftModel:
    """Return the base model with the adapter that ours starts from."""
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.bfloat16 if job.bf16 else torch.float32)
    model.config.use_cache = False
    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True)


def config(job: Job, folder: Path) -> SFTConfig:
    """Return the hyperparameters of ours, and of TRL's own options those that are fastest on a CPU."""
    return SFTConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,  # the rows are those of all epochs
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        seed=job.seed,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        bf16=job.bf16,
        **FASTEST,
    )


def seen(trainer: SFTTrainer, job: Job) -> list[tuple[list[int], int]]:
    """Return what the model gets of each row."""
    places = {number: place for place, number in reversed([*enumerate(job.sequence)])}
    rows = []
    for number in range(len(job.texts)):
        batch = trainer.data_collator([trainer.train_dataset[places[number]]])
        rows.append((batch["input_ids"][0].tolist(), int((batch["labels"] != -100).sum())))
    return rows


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])), Path(sys.argv[2]).parent).write(Path(sys.argv[2]))
