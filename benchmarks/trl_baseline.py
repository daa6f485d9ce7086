"""Tunes with TRL's SFTTrainer and PEFT's LoraConfig as they come: what our recipes are held against.

Runs in an environment of its own (torch==2.13.0, trl==1.16.0, peft==0.21.2), which generalisation.py starts:

    python benchmarks/trl_baseline.py MODEL_DIR ROWS.json OUT_DIR SETTINGS.json SEED...

ROWS.json holds [prompt, completion] texts, SETTINGS.json arguments of SFTConfig. Writes an adapter a seed into
OUT_DIR/SEED, and the seconds and mean loss of training into timing.json there.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(model: str, rows: str, out: str, settings: str, *seeds: str) -> None:
    """Train once a seed."""
    pairs = json.loads(Path(rows).read_text("utf-8"))
    given = json.loads(Path(settings).read_text("utf-8"))
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    for seed in map(int, seeds):
        once(model, data, Path(out) / str(seed), given, seed)


def once(model: str, data: Dataset, out: Path, given: dict[str, Any], seed: int) -> None:
    """Train and save an adapter."""
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        SFTConfig(
            str(out),
            seed=seed,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            **given,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(out))
    loss = trainer.state.log_history[-1]["train_loss"]
    (out / "timing.json").write_text(json.dumps({"seconds": seconds, "loss": loss}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
