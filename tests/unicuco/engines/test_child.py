from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from unicuco.engines.child import ChildProcess
from unicuco.errors import EngineError

pytestmark = pytest.mark.slow  # every test starts a process that imports torch

SERVE = """
import os, subprocess, sys, time
from unicuco.engines.serve_lines import serve_lines

def handle(question):
    op = question["op"]
    if op == "die":
        sys.stderr.write("first\\nlast words\\n\\n")
        sys.stderr.flush()
        os._exit(3)
    if op == "sleep":
        time.sleep(60)
    if op == "fork":
        return {"pid": subprocess.Popen(["sleep", "60"]).pid}
    print("noise on standard output")
    os.system("echo noise of a subprocess")
    return {"echo": question["text"]}

serve_lines(handle)
"""


def start() -> ChildProcess:
    return ChildProcess([sys.executable, "-P", "-c", SERVE], os.environ)


def gone(pid: int, *, within_s: float = 30.0) -> bool:
    """Whether the process ends in time; a dead one that nobody has waited for counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_answers_are_clean_of_what_libraries_print() -> None:
    child = start()
    long = "ä" * 300_000  # more than a pipe holds
    for text in ("one", long, "two"):
        assert child.ask({"op": "echo", "text": text}) == {"echo": text}
    assert child.alive
    child.close()
    assert not child.alive
    assert gone(child.pid)


def test_a_death_is_one_line_with_the_last_words_and_the_status() -> None:
    child = start()
    with pytest.raises(EngineError, match=r"ended: last words \(exit status 3\)"):
        child.ask({"op": "die"})
    assert not child.alive
    with pytest.raises(EngineError, match="gone"):
        child.ask({"op": "echo", "text": "x"})


def test_no_answer_in_time_ends_the_child() -> None:
    child = start()
    with pytest.raises(EngineError, match=r"did not answer within 0\.1 s"):
        child.ask({"op": "sleep"}, timeout_s=0.1)
    assert gone(child.pid)


def test_an_interrupt_in_the_middle_ends_the_child() -> None:
    child = start()
    assert child.ask({"op": "echo", "text": "x"})
    # Whoever runs the tests in the background of a script has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            child.ask({"op": "sleep"})
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone(child.pid)


def test_closing_ends_what_the_child_started_too() -> None:
    child = start()
    pid = child.ask({"op": "fork"})["pid"]
    assert isinstance(pid, int)
    child.close()
    assert gone(pid)


def test_a_forgotten_child_is_ended() -> None:
    child = start()
    pid = child.pid
    assert child.alive
    del child
    assert gone(pid)


def test_a_killed_owner_takes_the_child_along() -> None:
    owner = f"""
        import os, signal, sys
        from unicuco.engines.child import ChildProcess
        child = ChildProcess([sys.executable, "-P", "-c", {SERVE!r}], os.environ)
        child.ask({{"op": "echo", "text": "x"}})
        print(child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(owner)], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))
