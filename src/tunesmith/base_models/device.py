"""Where the models run, and in which number format."""

import torch


def pick_device(name: str) -> torch.device:
    """Return the device that a setting names; `auto` takes the fastest one that this machine has."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the number format of a base model's weights and activations on a device.

    bfloat16 where the device multiplies it natively; a CPU without such instructions emulates it, slower than
    it computes in float32.
    """
    if device.type != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32
