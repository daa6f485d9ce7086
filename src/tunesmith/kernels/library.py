"""The functions of the C files beside this one, compiled once for this CPU where there is a C compiler."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

COMPILE_SECONDS = 600.0  # it takes five on an idle machine
_FLAGS = ["-O3", "-march=native", "-fPIC", "-shared"]
_FLAGS += [f"-f{flag}" for flag in ("no-math-errno", "no-trapping-math", "no-signed-zeros", "reciprocal-math")]
_FLAGS += ["-fassociative-math"]
"""Not -ffast-math: a library linked with it makes the whole process take small numbers for 0."""
_MORE_FLAGS: tuple[list[str], ...] = (["-fopenmp", "-mprefer-vector-width=512"], ["-fopenmp"], [])
"""What not every compiler knows; without -fopenmp the kernels run on one thread."""

logger = logging.getLogger(__name__)

_SIGNATURES = {
    "norm": "sspp fpp",
    "add_norm": "ssppp fpp",
    "norm_back": "ss ppppp",
    "norm_back_add": "ss ppppp",
    "turn": "ssss pppp f pp",
    "turn_back": "ssss ppp s pppppp",
    "gate": "sss pp",
    "gate_back": "sss ppp",
    "attend": "ssss ppppp f pp",
    "attend_back": "ssss ppppp f ppppp",
    "softmax": "ss ppppp",
    "attend_tiles": "ssss ppppp f pp",
    "attend_back_tiles": "ssss pppppp f pppppp",
    "attend_scratch": "ssss",
    "adapt": "ssssss p f ppppp pp",
    "has_matrix_unit": "",
    "pack": "sssssssss pp",
    "spread": "p s",
    "product": "sssss ppppppppp",
    "product_scratch": "sssss",
    "decode": "p",
    "decode_scratch": "p",
    "shrink": "ss ppp",
    "head": "sss pppp",
    "head_of_8_bits": "sss ppppp",
    "likeliest": "ssss ppppppppp",
}
"""The functions' arguments: s for a size, f for a float, p for an address."""
_COUNTING = ("has_matrix_unit", "product_scratch", "attend_scratch", "decode_scratch")
"""The functions that return a number."""
_TYPES = {"s": ctypes.c_ssize_t, "f": ctypes.c_float, "p": ctypes.c_void_p}


class Compiled:
    """What calls the functions.

    Args:
        functions: Of the library.
    """

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._library = functions

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function; sizes are ptrdiff_t, other numbers float, tensors their addresses."""
        return getattr(self._library, name)(
            *[_address(value) if isinstance(value, Tensor) else value for value in arguments]
        )


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError("a kernel takes contiguous tensors")
    return tensor.data_ptr()


def library(cache: Path) -> ctypes.CDLL | None:
    """Compile the C files beside this one, or find what was compiled; None where there is no compiler that can.

    Args:
        cache: Directory of compiled libraries.
    """
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.info("no C compiler: training and serving run some of their operations in torch, which is slower")
        return None
    texts = b"".join(source.read_bytes() for source in sources)
    about = hashlib.sha256(texts + repr((compiler, _FLAGS, _MORE_FLAGS, _cpu())).encode())
    made = cache / f"kernels-{about.hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        # Of processes that start together one compiles; were it each, all might take longer than they may.
        with FileLock(made.with_suffix(".lock")):
            if not made.exists() and not _compile(compiler, sources, made):
                return None
    loaded = ctypes.CDLL(str(made))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is not None:  # products only where there is a matrix unit
            function.argtypes = [_TYPES[letter] for letter in arguments if letter != " "]
            function.restype = ctypes.c_ssize_t if name in _COUNTING else None
    return loaded


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, sources: Sequence[Path], made: Path) -> bool:
    files = [str(source) for source in sources if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        out = Path(scratch) / made.name
        for more in _MORE_FLAGS:
            command = [compiler, *_FLAGS, *more, *files, "-o", str(out), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, timeout=COMPILE_SECONDS, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                logger.warning("the kernels could not be compiled: %s", error)
                return False
            if done.returncode == 0:
                out.replace(made)
                return True
        logger.warning("the kernels could not be compiled: %s", done.stderr.decode(errors="replace"))
        return False
