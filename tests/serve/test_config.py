"""What may be served, where, and to whom."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from serve.config import EngineOptions, ServeConfig, digest_keys, is_loopback
from unicuco.errors import RequestError

KEYS = "first-secret-key,second-secret-key"


def test_a_run_s_id_is_its_folder_s_name(tmp_path: Path) -> None:
    config = ServeConfig.of_runs([tmp_path / "a", tmp_path / "b.2"], data=tmp_path)
    assert config.runs == (("a", str(tmp_path / "a")), ("b.2", str(tmp_path / "b.2")))
    assert config.jobs_location == str(tmp_path / "jobs.db")
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", ["Upper", "-a", "a b", "a:b", "a" * 64])
def test_a_folder_whose_name_is_no_id_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="must match"):
        ServeConfig.of_runs([tmp_path / name], data=tmp_path)


def test_two_runs_of_one_name_and_no_run_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="two runs are called 'a'"):
        ServeConfig.of_runs([tmp_path / "a", tmp_path / "x" / "a"], data=tmp_path)
    with pytest.raises(RequestError, match="at least one run"):
        ServeConfig.of_runs([], data=tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_other_than_loopback_is_refused_without_keys(tmp_path: Path, host: str) -> None:
    with pytest.raises(RequestError, match="UNICUCO_API_KEYS"):
        ServeConfig.of_runs([tmp_path / "a"], data=tmp_path, host=host)
    ServeConfig.of_runs([tmp_path / "a"], data=tmp_path, host=host, api_keys=KEYS)


def test_no_key_is_kept_or_shown(tmp_path: Path) -> None:
    config = ServeConfig.of_runs([tmp_path / "a"], data=tmp_path, api_keys=KEYS)
    assert len(config.key_digests) == 2
    for key in KEYS.split(","):
        assert key.encode() not in pickle.dumps(config)
    assert not any(digest in repr(config) for digest in config.key_digests)


def test_a_key_too_short_is_refused_and_not_shown() -> None:
    with pytest.raises(RequestError) as refused:
        digest_keys(["good-enough", "oops"])
    assert "oops" not in str(refused.value)
    assert digest_keys(["", " "]) == ()


def test_loopback_is_told_from_everywhere_else() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "localhost.org", "")))


def test_every_service_has_a_scratch_folder_of_its_own(tmp_path: Path) -> None:
    fast = EngineOptions(scratch=str(tmp_path / "fast"))
    folders = {
        ServeConfig.of_runs([tmp_path / "a"], data=tmp_path / data, engines=engines).scratch_folder
        for data in ("one", "two")
        for engines in (EngineOptions(), fast)
    }
    assert len(folders) == 4
    assert {folder for folder in folders if folder.parent != tmp_path / "fast"} == {
        tmp_path / "one" / "engines", tmp_path / "two" / "engines"
    }  # fmt: skip
