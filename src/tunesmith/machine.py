"""What this machine can run: device, precision, memory, disk, weights."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.base_models import weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.config import Settings
from tunesmith.errors import ApiError

if TYPE_CHECKING:
    from tunesmith.kernels.passes import Kernels

GIB = 1 << 30
ENOUGH_MEMORY = 4 * GIB  # a server and a worker with the default base model
ENOUGH_DISK = 2 * GIB  # the default base model while it is converted


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        fine: Nothing to do.
        remedy: What to do about it otherwise.
        blocks: Tunesmith does not work until it is done.
    """

    what: str
    found: str
    fine: bool = True
    remedy: str = ""
    blocks: bool = False


def examine(settings: Settings, catalog: Catalog) -> Iterator[Finding]:
    """Yield what there is and what is missing."""
    yield from _compute(settings)
    if settings.engine == "vllm":
        yield _vllm(settings, catalog)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "memory",
        f"{memory / GIB:.1f} GiB",
        memory >= ENOUGH_MEMORY,
        "" if memory >= ENOUGH_MEMORY else "4 GiB are needed to tune and serve at once; try --workers 0",
    )
    for what, path in (("data dir", settings.data_dir), ("weights cache", settings.cache_dir)):
        yield _disk(what, path)
    for model in catalog.models.values():
        found = weights.find(model, settings.cache_dir)
        missing = f"not here ({model.download_megabytes} MB to fetch; licence: {model.licence})"
        yield Finding(
            f"models/{model.id}",
            f"{found.version} in {found.path}" if found else missing,
            found is not None,
            "" if found else f"tunesmith doctor --fetch {model.id}",
        )


def _compute(settings: Settings) -> Iterator[Finding]:
    import torch

    from tunesmith.base_models.device import compute_dtype, pick_device
    from tunesmith.kernels import passes

    device = pick_device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    yield Finding("device", f"{device.type}, {name}, torch {torch.__version__}")
    dtype = compute_dtype(device)
    slow = dtype == torch.float32
    yield Finding(
        "precision",
        str(dtype).removeprefix("torch."),
        not slow,
        "this CPU has no bfloat16 matrix instructions: tuning works, several times slower" if slow else "",
    )
    if device.type == "cpu" and not slow:
        yield _kernels(passes.find(device, dtype, settings.cache_dir / "kernels"))


def _kernels(found: "Kernels") -> Finding:
    """Say whether training's small operations are compiled for this CPU."""
    compiled = found.name != "torch"
    remedy = "" if compiled else "install a C compiler (cc): tuning is then two to three times as fast"
    return Finding("training kernels", found.name, compiled, remedy)


def _vllm(settings: Settings, catalog: Catalog) -> Finding:
    """Say whether the vLLM server answers, and whether it has the base weights that are here."""
    from tunesmith.app import vllm_base, vllm_client
    from tunesmith.engines.vllm_adapters import other_weights
    from tunesmith.engines.vllm_client import base_of
    from tunesmith.engines.vllm_fit import fits

    client, model = vllm_client(settings), vllm_base(settings, catalog)
    try:
        base = base_of(client, settings.vllm_model, model.id)
        found = f"vLLM {client.version()} at {client.url}, {base.name}, {base.longest:,} tokens"
        here = weights.find(model, settings.cache_dir)
        if here is None:
            return Finding("engine", f"{found}; its weights were not compared with models/{model.id}: not here")
        if not fits(client, base.name, here):
            return Finding("engine", found, False, other_weights(client.url, base.name, here), blocks=True)
        return Finding("engine", f"{found}; weights of models/{model.id}: the same as here")
    except ApiError as error:
        return Finding("engine", f"vLLM at {client.url}", False, error.message, blocks=True)
    finally:
        client.close()


def _disk(what: str, path: Path) -> Finding:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    remedy = "" if free >= ENOUGH_DISK else "free some space: converting the weights takes 2 GiB"
    return Finding(
        what,
        f"{path}, {free / GIB:.0f} GiB free",
        writable and not remedy,
        remedy
        if writable
        else f"{existing} cannot be written to; choose another with --{what.split(maxsplit=1)[0]}-dir",
        blocks=not writable,
    )
