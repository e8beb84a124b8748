from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from unicuco.cli.terminal import Invocation, open_terminal


class FakeContext:
    """What a command's context offers here."""

    def __init__(self) -> None:
        self.obj = Invocation()

    def get_usage(self) -> str:
        return "Usage: unicuco test"


def terminal(*, as_json: bool, debug: bool = False) -> Any:
    return open_terminal(FakeContext(), as_json=as_json, debug=debug)


def test_with_json_stdout_holds_one_document_whatever_libraries_print(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with terminal(as_json=True) as out:
        print("chatter of a library")
        os.write(1, b"chatter below Python\n")
        subprocess.run([sys.executable, "-c", "print('chatter of a child')"], check=True)
        out.show({"text": "… “x”", "values": [1, 2.5, None]}, "for people")
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"text": "… “x”", "values": [1, 2.5, None]}
    assert captured.out.count("\n") == 1
    assert captured.err.count("chatter") == 3


def test_without_json_people_get_text(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal(as_json=False) as out:
        out.show({"kl": 1.0}, "KL [bold]1.0[/bold]")
    assert capfd.readouterr().out == "KL 1.0\n"


def test_numbers_that_json_lacks_become_null(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal(as_json=True) as out:
        out.show({"perplexity": float("inf"), "kl": {"mean": float("nan")}, "list": (1.5,)})
    document = json.loads(capfd.readouterr().out)
    assert document == {"perplexity": None, "kl": {"mean": None}, "list": [1.5]}


def test_stdout_is_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), terminal(as_json=True):
        raise RuntimeError
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_debug_and_usage_are_left_for_the_error_line() -> None:
    context = FakeContext()
    with open_terminal(context, as_json=False, debug=True):  # type: ignore[arg-type]
        pass
    assert context.obj == Invocation(usage="Usage: unicuco test", debug=True)
