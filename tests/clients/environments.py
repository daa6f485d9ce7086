"""One environment a client, kept between runs under .clients/ for as long as its pins stay the same."""

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from clients import PINS

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".clients"
COMPLETE = "complete"  # written last: a folder without it was interrupted


def environment(pins: str, say: Callable[[str], object]) -> Path:
    """Return the folder of an environment, installing it when its pins are new.

    Args:
        pins: A file or folder of `pins/`.
        say: Told when something is installed.

    Raises:
        subprocess.CalledProcessError: The packages could not be installed.
    """
    source = PINS / pins
    slug = source.name.removesuffix(".txt")
    path = ENVIRONMENTS / f"{slug}-{_digest(source)}"
    if (path / COMPLETE).exists():
        return path
    say(f"installing {slug}")
    for old in ENVIRONMENTS.glob(f"{slug}-{'[0-9a-f]' * 12}"):
        shutil.rmtree(old)
    path.mkdir(parents=True)
    if source.is_dir():
        _install_npm(source, path)
    else:
        _install_python(source, path)
    (path / COMPLETE).touch()
    return path


def _install_python(requirements: Path, path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(path / "bin" / "python")]
    subprocess.run([*pip, "install", "-qq", "--no-deps", "-r", requirements], check=True)


def _install_npm(source: Path, path: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(source / name, path)
    npm = ["npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(npm, cwd=path, check=True)


def _digest(source: Path) -> str:
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    digest = hashlib.sha256(platform.python_version().encode() if source.is_file() else b"npm")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
