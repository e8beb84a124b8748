from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from unicuco.cli.app import app

NEED_WORDS = ("serve", "report", "pack", "unpack", "bits")


def test_help_answers_within_half_a_second_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, unicuco.cli as cli; cli.main(['--help']); "
        "heavy = {'torch', 'ray', 'gpytorch', 'transformers', 'vllm', 'matplotlib', 'numpy'}; "
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout
    # Processor time, and twice the goal: the machine may be busy with something else.
    assert after.ru_utime - before.ru_utime < 1.0


def test_only_commands_that_work_are_offered(unicuco) -> None:
    names = {command.callback.__name__ for command in app.registered_commands}
    assert names == {
        "bits", "compare", "compress", "doctor", "evaluate", "front", "generate", "latency",
        "learn", "pack", "plan", "prune", "report", "serve", "unpack",
    }  # fmt: skip
    for name in NEED_WORDS:
        assert unicuco(name).code == 2


def test_every_command_takes_json_and_debug(unicuco) -> None:
    for command in app.registered_commands:
        result = unicuco(command.callback.__name__, "--help")
        assert result.code == 0
        assert "--json" in result.stdout
        assert "--debug" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("plan",),
        ("plan", "RUN"),
        ("plan", "RUN", "--sparsity", "1"),
        ("plan", "RUN", "--sparsity", "-0.1"),
        ("plan", "RUN", "--sparsity", "nan"),
        ("plan", "RUN", "--sparsity", "half"),
        ("plan", "RUN", "--sparsity", "0.5", "--max-kl", "0.1"),
        ("plan", "RUN", "--max-params", "10.5"),
        ("plan", "RUN", "--max-bytes", "0"),
        ("plan", "RUN", "--max-kl", "-1"),
        ("plan", "RUN", "--preference", "1.1"),
        ("plan", "RUN", "--sparsity", "0.5", "--served-as", "zip"),
        ("plan", "RUN", "--wish", "0.5"),
        ("plan", "RUN", "--requests", "FILE", "--sparsity", "0.5"),
        ("prune", "RUN", "--sparsity", "0.5"),
        ("prune", "RUN", "--out", "OUT"),
        ("compress", "reference", "--out", "OUT"),
        ("compress", "reference", "--out", "OUT", "--sparsity", "0.5", "--address", "moon"),
        ("learn", "reference"),
        ("learn", "reference", "--out", "OUT", "--evaluations", "0"),
        ("learn", "reference", "--out", "OUT", "--replicas", "0"),
        ("learn", "reference", "--out", "OUT", "--replicas", "2", "--address", "none"),
        ("learn", "reference", "--out", "OUT", "--address", "moon"),
        ("compare", "reference", "--allocators", "uniform,best"),
        ("compare", "reference", "--allocators", "uniform,uniform"),
        ("compare", "reference", "--sparsity", "0.5,half"),
        ("compare", "reference", "--sparsity", "0.5,1"),
        ("compare", "reference", "--tokens", "0"),
        ("compare", "reference", "--seed", "-1"),
        ("compare", "reference", "--address", "moon"),
        ("generate", "DIR"),
        ("generate", "DIR", "--prompt", "x", "--max-tokens", "0"),
        ("generate", "DIR", "--prompt", "x", "--temperature", "-1"),
        ("generate", "--prompt", "x"),
        ("generate", "DIR", "--packed", "FILE", "--prompt", "x"),
        ("generate", "DIR", "--prompt", "x", "--max-memory-mb", "5"),
        ("pack", "DIR"),
        ("pack", "DIR", "--out", "OUT", "--link-mbps", "0"),
        ("pack", "DIR", "--out", "OUT", "--link-mbps", "nan"),
        ("pack", "DIR", "--out", "OUT", "--max-kl", "0.1"),
        ("pack", "DIR", "--out", "OUT", "--int8", "--max-kl", "0"),
        ("pack", "DIR", "--out", "OUT", "--int8", "--sparsity", "1"),
        ("unpack", "FILE"),
        ("bits", "reference", "--sparsity", "1"),
        ("bits", "reference", "--group", "0"),
        ("nonsense",),
        ("--nonsense",),
    ],
)
def test_wrong_use_ends_with_2_and_one_line_after_the_usage(
    unicuco, words: tuple[str, ...], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = unicuco(*words, *(() if words[-1] == "--nonsense" else ("--json",)))
    assert result.code == 2
    assert result.stdout == ""
    usage, line = result.stderr.splitlines()
    assert usage.startswith("Usage: unicuco")
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_it_shows_help(unicuco) -> None:
    result = unicuco()
    assert result.code == 0
    assert "Commands" in result.stdout


def test_the_version_is_the_package_s(unicuco) -> None:
    from importlib.metadata import version

    assert unicuco("--version").stdout == version("unicuco") + "\n"
