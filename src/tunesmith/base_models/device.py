"""Where models run and in which precision."""

import torch

_BF16_MATRIX = ("amx_bf16", "avx512_bf16", "arm_bf16", "bf16")
"""CPU capabilities, by torch's names, with which a bfloat16 matrix product is faster than a float32 one."""


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; `auto` takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of a base model's weights on a device."""
    if device.type != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in _BF16_MATRIX) else torch.float32
