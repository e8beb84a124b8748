from __future__ import annotations

import io
from pathlib import Path

import pytest

from unicuco.cli.request_options import read_requests_file
from unicuco.errors import RequestError, TextError
from unicuco.types import Request, ServedAs, Target


def test_each_line_is_one_request_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"sparsity": 0.6}\n\n{"max_bytes": 9, "served_as": "mask"}\n')
    assert read_requests_file(path) == [
        Request(target=Target.SPARSITY, value=0.6),
        Request(target=Target.MAX_BYTES, value=9, served_as=ServedAs.MASK),
    ]


def test_an_empty_file_holds_no_requests(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("")
    assert read_requests_file(path) == []


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"max_kl": 0.1}\n'))
    assert read_requests_file(Path("-")) == [Request(target=Target.MAX_KL, value=0.1)]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"max_kl": 1, "task_weights": {"a": 1' + 400 * "0" + "}}",
        "{",
        "7",
        '"x"',
        "[0.5]",
        "{}",
        '{"sparsity": 2}',
        '{"wish": 1}',
        '{"sparsity": "a"}',
    ],
)
def test_a_line_that_is_no_request_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"sparsity": 0.6}\n' + line)
    with pytest.raises(RequestError, match=r"requests\.jsonl line 2"):
        read_requests_file(path)


def test_unreadable_and_binary_files_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="can't read"):
        read_requests_file(tmp_path / "nothing")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="UTF-8"):
        read_requests_file(binary)
