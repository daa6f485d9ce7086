"""Builds llama.cpp for this processor: the source of `llama-cpp-python`, in an environment of its own.

make bench-environment runs it: python serving_build.py ENVIRONMENT PINS. Needs cmake and a C++ compiler.
On some virtual machines llama.cpp's code for AMX ends the process. So the build is tried, and where it does not
work it is built once more without AMX; what lies outside of ggml's CPU part is not compiled again.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from serving_job import Ask, Job, Result
from serving_weights import base_weights, folder_of, gguf_path, make
from tunesmith.config import Settings

PACKAGE = "llama_cpp_python"
SCRIPT = Path(__file__).with_name("serving_llama.py")
BUILT_FOR = "built-for.txt"
"""In the environment: what it was built for. Written last."""

AMX = {"amx_tile": "AMX_TILE", "amx_int8": "AMX_INT8", "amx_bf16": "AMX_BF16"}
INSTRUCTIONS = {
    "sse4_2": "SSE42",
    "f16c": "F16C",
    "fma": "FMA",
    "bmi2": "BMI2",
    "avx": "AVX",
    "avx2": "AVX2",
    "avx_vnni": "AVX_VNNI",
    "avx512bw": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    **AMX,
}
"""The kernel's names of what processors can do, and ggml's options for it."""


def processor_flags() -> set[str]:
    """Return what this processor can do, in the kernel's words."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def fetch(environment: Path, pins: Path) -> Path:
    """Fetch the source and install its Python part; return the folder of the source."""
    requirement = next(line for line in pins.read_text("utf-8").splitlines() if line.startswith(PACKAGE))
    pip, folder = [str(environment / "bin" / "pip"), "--quiet"], environment / "source"
    only_python = os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "download", *options, "--dest", folder, requirement], env=only_python, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([*pip, "install", *options, source], env=only_python, check=True)
    return source / "vendor" / "llama.cpp"


def build(environment: Path, source: Path, *, amx: bool) -> str:
    """Build the library into the folder that serving_llama.py loads it from; return for what it was built."""
    flags = processor_flags()
    wanted = [option for flag, option in INSTRUCTIONS.items() if flag in flags and (amx or flag not in AMX)]
    # Each instruction by itself and not GGML_NATIVE, which is all or nothing.
    switches = {f"GGML_{option}": option in wanted for option in INSTRUCTIONS.values()}
    switches |= {f"LLAMA_BUILD_{part}": False for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")}
    switches |= {"GGML_NATIVE": not wanted, "BUILD_SHARED_LIBS": True}
    options = [f"-D{name}={'ON' if on else 'OFF'}" for name, on in switches.items()]
    path = {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}  # Ninja is installed there
    made = str(environment / "build")
    configure = ["cmake", "-S", str(source), "-B", made, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options]
    for command in (configure, ["cmake", "--build", made, "--target", "llama"]):
        subprocess.run(command, env=os.environ | path, stdout=subprocess.DEVNULL, check=True)
    return ", ".join(wanted) or "what the compiler finds"


def works(environment: Path) -> bool:
    """Answer a question with 8-bit weights, which is where AMX would be used; return whether that went well."""
    base = base_weights(Settings.load())
    folder = folder_of(base)
    make(folder, ["Q8_0"])
    question = Ask("", [2, *range(1000, 1100)], 0)
    job = Job([question], [], 8, os.cpu_count() or 1, True, "", [], "", str(gguf_path(folder, "Q8_0")))
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job.write(asked)
        python = environment / "bin" / "python"
        done = subprocess.run([python, str(SCRIPT), str(asked), str(answer)], check=False)
        return done.returncode == 0 and len(Result.read(answer).answers) == 1


def main(environment: Path, pins: Path) -> None:
    """Build it, without AMX where it does not work with it."""
    amx, source = bool(AMX.keys() & processor_flags()), fetch(environment, pins)
    built = build(environment, source, amx=amx)
    if not works(environment):
        if not amx:
            raise SystemExit("llama.cpp was built, but does not answer")
        print("llama.cpp's AMX code fails on this machine: it is built again without", flush=True)
        built = f"{build(environment, source, amx=False)}; without AMX, whose code fails on this machine"
        if not works(environment):
            raise SystemExit("llama.cpp was built without AMX, but does not answer")
    (environment / BUILT_FOR).write_text(f"{built}\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
