"""Make or renew ``.venv``; every make target does this first.

Does nothing when ``.venv`` was made from the present pyproject.toml and constraints.txt at the
present place. On a machine without an NVIDIA GPU it sees to it that torch is a CPU build and
removes torchvision, torchaudio and torchcodec: vLLM pulls builds of them for CUDA, which break
`import transformers` there.

Needs only the standard library, no root, and a package registry that pip can reach.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
PYTHON: Final = VENV / "bin" / "python"
STAMP: Final = VENV / ".unicuco-setup"
INPUTS: Final = (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__).resolve())
TORCH: Final = "torch==2.13.0"
# Only asked when pip by itself would take a CUDA build.
TORCH_CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
CUDA_COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")


class SetupError(Exception):
    """The environment can't be made; the message is one line that says what to do."""


def main() -> int:
    """Bring ``.venv`` up to date and return the exit code."""
    try:
        # One set-up at a time in one checkout; other checkouts have a .venv of their own.
        with (ROOT / "pyproject.toml").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_current():
                make()
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


def fingerprint() -> str:
    digest = hashlib.sha256(str(ROOT).encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    digest.update(b"gpu" if has_nvidia_gpu() else b"cpu")
    return digest.hexdigest()


def is_current() -> bool:
    try:
        return PYTHON.exists() and STAMP.read_text() == fingerprint()
    except OSError:
        return False


def make() -> None:
    if sys.version_info[:2] != (3, 11):
        raise SetupError(f"needs Python 3.11, this is {platform.python_version()}")
    if not venv_works():
        say("making .venv")
        run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            "python3.11 has no usable venv module",
        )
    STAMP.unlink(missing_ok=True)
    gpu = has_nvidia_gpu()
    say(f"installing the pinned packages for {'GPU' if gpu else 'CPU'}; minutes the first time")
    install_torch(cpu_build=not gpu and platform.system() == "Linux")
    extras = "gpu,bench,dev" if gpu else "cpu,bench,dev"
    pip_install("-c", "constraints.txt", "-e", f".[{extras}]")
    if not gpu:
        pip("uninstall", "-y", "-q", *CUDA_COMPANIONS)
    STAMP.write_text(fingerprint())
    say(".venv is ready")


def install_torch(*, cpu_build: bool) -> None:
    """Install torch first, so that nothing later chooses another build of it.

    Where pip by itself finds a CPU build (a local wheel folder, a mirror), that one is taken and no
    other index is asked.
    """
    if not cpu_build or resolved_torch().endswith("+cpu"):
        pip_install("-c", "constraints.txt", TORCH)
        return
    pip_install("-c", "constraints.txt", TORCH, "--extra-index-url", TORCH_CPU_INDEX)
    if not installed_torch().endswith("+cpu"):
        raise SetupError(
            f"no CPU build of {TORCH} was found; make pip find a +cpu wheel (PIP_FIND_LINKS=FOLDER)"
            " or let it reach PyTorch's CPU wheel index"
        )


def resolved_torch() -> str:
    """Return the torch version that pip would install or has installed, e.g. ``2.13.0+cpu``."""
    if installed_torch().startswith(TORCH.removeprefix("torch==")):
        return installed_torch()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--dry-run", "--no-deps", "-qq", "--report", str(report))
        if pip("install", *options, TORCH) or not report.exists():
            return ""
        plan = json.loads(report.read_text())["install"]
    return str(plan[0]["metadata"]["version"]) if plan else ""


def installed_torch() -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU 0" in listing.stdout


def venv_works() -> bool:
    if not PYTHON.exists():
        return False
    code = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, check=False).returncode == 0


def pip_install(*arguments: str) -> None:
    if pip("install", "-qq", *arguments):
        raise SetupError(f"pip could not install {arguments[-1]}; its last lines above say why")


def pip(*arguments: str) -> int:
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    command = [str(PYTHON), "-m", "pip", "--no-input", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, check=False).returncode


def run(command: list[str], trouble: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(
            f"{trouble} (on Debian or Ubuntu: install python3.11-venv): {done.stdout[:300]}"
        )


def say(line: str) -> None:
    print(f"set-up: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
