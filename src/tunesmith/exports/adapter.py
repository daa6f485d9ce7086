"""An adapter in PEFT's two files: what it adds to which weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tunesmith.errors import FailedPrecondition
from tunesmith.exports.checkpoint import Rows, TensorFile

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN = {"bias": "none", "peft_type": "LORA"}
_NOT_MERGED = (
    *("bias", "peft_type", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias"),
    *("modules_to_save", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("trainable_token_indices", "target_parameters", "arrow_config", "kasa_config"),
)
"""PEFT's settings of which a value other than the plain one adds something else than `scale * B A`."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by module path: A (rank, inputs), and B (outputs, rank) with the scale in it."""

    factors: Mapping[str, tuple[Rows, Rows]]

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> "Adapter":
        """Read an adapter's files.

        Raises:
            FailedPrecondition: It changes the model in a way that cannot be merged into its weights.
        """
        config = json.loads(files[CONFIG_FILE])
        for setting in _NOT_MERGED:
            if config.get(setting) and config[setting] != _PLAIN.get(setting):
                raise FailedPrecondition(
                    f"The adapter's {setting} is {config[setting]!r}, which cannot be merged into the weights; "
                    "export it with format PEFT."
                )
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        file = TensorFile.read(files[WEIGHTS_FILE])
        found = {tensor.name: np.concatenate([*file.blocks(tensor)]) for tensor in file.tensors}
        paths = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in found}
        names = {path: [f"{_PREFIX}{path}.lora_{side}.weight" for side in "AB"] for path in paths}
        if found.keys() != {name for pair in names.values() for name in pair}:
            raise FailedPrecondition("The adapter holds other tensors than LoRA's A and B; export it with PEFT.")
        return cls({path: (found[a], found[b] * np.float32(scale)) for path, (a, b) in names.items()})

    def update(self, path: str, first: int, count: int) -> Rows:
        """Return what is added to `count` rows of a module's weight from row `first` on."""
        a, b = self.factors[path]
        added: Rows = b[first : first + count] @ a
        return added
