"""Models at URLs: their copies, their sources, and what a whole run of one does."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from tests.range_server import RangeServer, range_server
from unicuco.errors import ModelError
from unicuco.models import fetching, model_digest, resolve_model, weight_files
from unicuco.models.fetching import origin_of, place_of
from unicuco.models.weights import UrlSource, weight_source
from unicuco.pipeline import LearnOptions, LocalBackend, Run, evaluate_variant, learn, prune
from unicuco.testing import tiny_model_folder
from unicuco.types import Request, Target

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNICUCO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    tiny_model_folder(tmp_path / "served" / "single")
    tiny_model_folder(tmp_path / "served" / "spread", max_shard_size=20_000)
    with range_server(tmp_path / "served") as running:
        yield running


@pytest.mark.parametrize("name", ["single", "spread"])
def test_a_copy_is_the_model_and_is_made_once(server: RangeServer, name: str) -> None:
    source = server.folder / name
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "modeling.py").write_text("code")
    folder = resolve_model(f"{server.url}/{name}")
    assert model_digest(folder) == model_digest(source)
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in source.iterdir() if path.suffix not in (".bin", ".py")
    } | {"origin.json"}
    weights = {path.name: path.stat().st_size for path in weight_files(source)}
    (given,) = server.given.values()
    assert {file: given[file] for file in weights} == weights, "each byte once"
    assert resolve_model(f"{server.url}/{name}/") == folder
    assert {file: given[file] for file in weights} == weights
    assert place_of(folder) == f"{server.url}/{name}"
    assert origin_of(source) is None


def test_another_state_of_a_model_has_another_copy(server: RangeServer) -> None:
    first = resolve_model(f"{server.url}/single")
    before = weight_source(first)
    path = server.folder / "single" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    second = resolve_model(f"{server.url}/single")
    assert model_digest(second) == model_digest(server.folder / "single") != model_digest(first)
    assert isinstance(before, UrlSource)
    with pytest.raises(ModelError, match=r"holds another model\.safetensors than the model that"):
        before.check(before.files[0])


def test_what_was_broken_off_is_fetched_anew_file_by_file(server: RangeServer) -> None:
    names = [path.name for path in weight_files(server.folder / "spread")]
    server.spoil = lambda name, data: data[:10] if name == names[-1] else data
    with pytest.raises(ModelError, match=f"{names[-1]} can't be read: .* bytes came of"):
        resolve_model(f"{server.url}/spread")
    (given,) = server.given.values()
    whole = {name: given[name] for name in names[:-1]}
    server.spoil = lambda name, data: data
    folder = resolve_model(f"{server.url}/spread")
    assert model_digest(folder) == model_digest(server.folder / "spread")
    assert {name: given[name] for name in names[:-1]} == whole, "what was there stays there"
    assert not list(folder.glob(".*")), "nothing half written"


def test_a_model_that_changes_meanwhile_is_refused(server: RangeServer) -> None:
    def spoil(name: str, data: bytes) -> bytes:
        if name.endswith(".safetensors"):
            (server.folder / "single" / name).touch()
        return data

    server.spoil = spoil
    with pytest.raises(ModelError, match="changed while it was fetched; try again"):
        resolve_model(f"{server.url}/single")


def test_any_store_of_fsspec_will_do(tmp_path: Path) -> None:
    source = tiny_model_folder(tmp_path / "model")
    fsspec.filesystem("memory").put(f"{source}/", "memory://models/tiny/", recursive=True)
    folder = resolve_model("memory://models/tiny")
    assert model_digest(folder) == model_digest(source)
    assert resolve_model(f"file://{source}") == source, "which needs no copy"


def test_what_can_not_be_used_is_one_line(
    server: RangeServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(name: str) -> str:
        with pytest.raises(ModelError) as error:
            resolve_model(f"{server.url}/{name}")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert line("nothing").startswith(f"no model at {server.url}/nothing: there is no config.json")
    index = server.folder / "spread" / INDEX
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    for place in ("../single/model.safetensors", "model.bin"):
        document["weight_map"][name] = place
        index.write_text(json.dumps(document))
        assert "which is no file of this folder" in line("spread")
    weights = server.folder / "single" / "model.safetensors"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(fetching.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
        assert f"takes {int(weights.stat().st_size * 1.02)} bytes and" in line("single")
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "holds no model.safetensors; only safetensors weights are read" in line("single")
    shutil.rmtree(cache)


@pytest.mark.slow
def test_a_run_of_a_model_at_a_url_is_that_of_the_folder(
    server: RangeServer, tmp_path: Path, tiny_text_file: Path
) -> None:
    local, url = server.folder / "spread", f"{server.url}/spread"
    for name, model in (("near", str(local)), ("far", url)):
        options = LearnOptions(
            model=model,
            out=tmp_path / name,
            calibration=tiny_text_file,
            tokens=256,
            evaluations=4,
        )
        run = learn(options, backend=LocalBackend(), progress=lambda step: None)
        prune(run, Request(target=Target.SPARSITY, value=0.5), tmp_path / f"{name}-variant")
    assert Run.open(tmp_path / "far").manifest["base_model"]["path"] == url
    variants = [tmp_path / f"{name}-variant" for name in ("near", "far")]
    assert model_digest(variants[0]) == model_digest(variants[1])
    shutil.move(variants[1], server.folder / "variant")
    reports = [
        evaluate_variant(folder, reference=reference, text=tiny_text_file, tokens=256)
        for folder, reference in ((variants[0], str(local)), (f"{server.url}/variant", url))
    ]
    assert reports[0] == reports[1]
    assert reports[1].sparsity == pytest.approx(0.5, abs=0.01)
