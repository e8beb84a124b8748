"""Runs at URLs: published at checkpoints and at the end, gone on with and read elsewhere."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tests.range_server import range_server
from tests.unicuco.pipeline.conftest import tiny_options
from tests.unicuco.pipeline.test_learning import _Stop, stop_at, values
from unicuco.errors import RunError, StorageError
from unicuco.models import model_digest
from unicuco.pipeline import LocalBackend, Progress, Run, learn, prune, publishing, write_report
from unicuco.pipeline.publishing import run_place
from unicuco.pipeline.run_copy import SNAPSHOT, copy_of_run, parse_snapshot, read_snapshot
from unicuco.remote import RemoteFolder
from unicuco.types import Request, Target

HALF = Request(target=Target.SPARSITY, value=0.5)
Sink = Callable[[Progress], None]
LearnAt = Callable[..., Run]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Become another machine: one with a cache of its own."""

    def become(name: str) -> None:
        monkeypatch.setenv("UNICUCO_CACHE", str(tmp_path / name))

    become("first")
    return become


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(publishing, "_EVERY_S", 0.0)
    return f"memory://runs-{secrets.token_hex(4)}/my-run"


@pytest.fixture
def learn_at(tiny_llama: Path, tiny_text_file: Path, machine: object, quick: None) -> LearnAt:
    def act(url: str, progress: Sink = lambda step: None, **changes: object) -> Run:
        folder, publish_to = run_place(url)
        options = tiny_options(tiny_llama, folder, tiny_text_file, **changes)
        options = replace(options, publish_to=publish_to)
        return learn(options, backend=LocalBackend(), progress=progress)

    return act


def files_in(folder: Path) -> set[str]:
    """Return the names of all files in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def names_at(url: str) -> set[str]:
    """Return the names of all files at a URL."""
    files, root = fsspec.url_to_fs(url)
    return {path.removeprefix(f"{root}/") for path in files.find(root)}


@pytest.mark.slow
def test_a_published_run_is_the_run_and_is_read_as_far_as_it_is_needed(
    url: str, learn_at: LearnAt, machine: Callable[[str], None], tmp_path: Path
) -> None:
    learned = learn_at(url)
    own = files_in(learned.folder)
    assert names_at(url) == own | {SNAPSHOT}
    snapshot = read_snapshot(RemoteFolder(url))
    assert snapshot is not None
    assert set(snapshot.files) == own
    prune(learned, HALF, tmp_path / "here")

    machine("second")
    run = Run.open(url)
    assert (run.folder.name, run.digest, run.manifest) == (
        "my-run", learned.digest, learned.manifest
    )  # fmt: skip
    assert run.plan([HALF]) == learned.plan([HALF])
    fetched = {path.name for path in run.folder.iterdir()}
    assert fetched == {"run.json", *run.manifest["files"]}, "a plan needs no ranks"
    prune(run, HALF, tmp_path / "there")
    whole = copy_of_run(url).need_all()
    assert {
        path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()
    } == own
    assert model_digest(tmp_path / "there") == model_digest(tmp_path / "here")
    write_report(run, tmp_path / "page.html")
    assert values(run.folder) == values(learned.folder)


@pytest.mark.slow
def test_what_is_published_is_whole_at_every_moment(
    url: str, learn_at: LearnAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[str] = []
    genuine = RemoteFolder.put

    def put(self: RemoteFolder, name: str, source: Path) -> None:
        puts.append(name)
        genuine(self, name, source)

    monkeypatch.setattr(RemoteFolder, "put", put)
    learn_at(url)
    assert "run.json" not in puts[: puts.index(SNAPSHOT)], "the first is of an unfinished run"
    last = puts[-puts[::-1].index(SNAPSHOT, 1) :]
    assert last[-2:] == ["run.json", SNAPSHOT]
    assert puts.count("fisher.safetensors") == 1, "what did not change stays"
    assert puts.count(SNAPSHOT) >= puts.count("evaluations.db") > 6


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_on_another_machine(
    url: str,
    learn_at: LearnAt,
    machine: Callable[[str], None],
    run: Run,
) -> None:
    with pytest.raises(_Stop):
        learn_at(url, stop_at("evaluate", 3))
    with pytest.raises(RunError, match=f"{url} holds an unfinished run; finish it with: .*{url} "):
        Run.open(url)
    with pytest.raises(RunError, match=f"{url} already holds a run; add --resume"):
        learn_at(url)
    machine("second")
    finished = learn_at(url, resume=True)
    assert values(finished.folder) == values(run.folder), "as if nothing had happened"
    machine("first")
    with pytest.raises(RunError, match=r"was gone on with elsewhere; to go on .* remove (.*)") as e:
        learn_at(url, resume=True)
    shutil.rmtree(str(e.value).rpartition("remove ")[2])
    longer = learn_at(url, resume=True, evaluations=8)
    assert values(longer.folder)[:6] == values(run.folder)
    assert Run.open(url).manifest["evaluations"] == 8


@pytest.mark.slow
def test_a_driver_that_is_killed_while_it_publishes_leaves_a_run_that_goes_on(
    url: str,
    learn_at: LearnAt,
    machine: Callable[[str], None],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = RemoteFolder.put
    puts: list[str] = []

    def put(self: RemoteFolder, name: str, source: Path) -> None:
        genuine(self, name, source)
        puts.append(name)
        if puts.count("evaluations.db") == 4:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "put", put)
        with pytest.raises(_Stop):
            learn_at(url)
    snapshot = read_snapshot(RemoteFolder(url))
    assert snapshot is not None
    assert set(snapshot.coming) == {"evaluations.db"}
    machine("second")
    assert values(learn_at(url, resume=True).folder) == values(run.folder)


@pytest.mark.slow
def test_a_driver_whose_run_was_taken_over_stops(
    url: str, learn_at: LearnAt, machine: Callable[[str], None]
) -> None:
    def take_over(step: Progress) -> None:
        if step.stage == "evaluate" and step.done == 2:
            machine("second")
            learn_at(url, resume=True)
            machine("first")

    with pytest.raises(RunError, match=f"another driver goes on with {url}, so this one stops"):
        learn_at(url, take_over)
    assert Run.open(url).manifest["evaluations"] == 6


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_while_is_told_of_and_caught_up_with(
    url: str, learn_at: LearnAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    genuine = RemoteFolder.put

    def put(self: RemoteFolder, name: str, source: Path) -> None:
        if name == "evaluations.db" and 1 <= len(told) < 3:
            raise StorageError("nobody answers")
        genuine(self, name, source)

    def progress(step: Progress) -> None:
        if step.stage == "publish":
            told.append(step.detail)
        elif step.stage == "evaluate" and step.done == 2:
            told.append("gone from here on")

    monkeypatch.setattr(RemoteFolder, "put", put)
    learned = learn_at(url, progress)
    assert told == ["gone from here on", "nobody answers", "nobody answers"]
    assert Run.open(url).digest == learned.digest


def test_a_place_where_nothing_can_be_written_is_one_line_before_anything_is_learned(
    learn_at: LearnAt, tmp_path: Path
) -> None:
    (tmp_path / "served").mkdir()
    told: list[Progress] = []
    with range_server(tmp_path / "served") as server:
        line = rf"^{server.url}/run/.unicuco can't be written: "
        with pytest.raises(StorageError, match=line) as error:
            learn_at(f"{server.url}/run", told.append)
    assert "\n" not in str(error.value)
    assert told == []


def test_a_run_that_never_began_leaves_nothing_at_the_url(url: str, learn_at: LearnAt) -> None:
    with pytest.raises(_Stop):
        learn_at(url, stop_at("fisher", 0))
    assert names_at(url) == set()


def test_what_lies_at_a_url_is_checked(
    url: str, learn_at: LearnAt, machine: Callable[[str], None]
) -> None:
    with pytest.raises(RunError, match=f"no run at {url}; learn one with: unicuco learn MODEL"):
        Run.open(url)
    learn_at(url)
    machine("second")
    files, root = fsspec.url_to_fs(url)
    genuine = files.cat_file(f"{root}/stratnet.safetensors")
    files.pipe_file(f"{root}/stratnet.safetensors", genuine[:-1] + bytes([genuine[-1] ^ 1]))
    with pytest.raises(RunError, match=r"/stratnet\.safetensors is not the file that its snapsho"):
        Run.open(url)
    files.pipe_file(f"{root}/{SNAPSHOT}", b"{")
    with pytest.raises(RunError, match=r"snapshot\.json is damaged"):
        Run.open(url)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "."])
def test_a_snapshot_never_leads_out_of_the_run(name: str) -> None:
    files = {name: {"num_bytes": 1, "sha256": "0" * 64}}
    data = json.dumps({"format": 1, "writer": "w", "files": {}, "coming": files}).encode()
    with pytest.raises(RunError, match="which is no file of a run"):
        parse_snapshot(data, "here")
