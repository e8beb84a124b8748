"""Variants sent packed, as a caller sees it, through Serve's own proxy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import Server
from tests.serve.test_routes import ask, check_error, finished
from unicuco.packing import read_header
from unicuco.pipeline import unpack

PATH = "/v1/models/run:sent/packed"


@pytest.fixture(scope="module")
def folder(server: Server) -> Iterator[Path]:
    """A variant of the service."""
    with server.client() as client:
        assert finished(client, ask(client, "sent", sparsity=0.5).json()["id"])["result"]
        yield Path(server.config.data) / "variants" / "run" / "sent"
        client.delete("/v1/models/run:sent")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_variant_is_sent_packed_and_packed_once_for_all(
    client: httpx.Client, folder: Path, tmp_path: Path
) -> None:
    described = client.get("/v1/models/run:sent").json()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get(PATH), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["etag"] for answer in answers}) == 1
    first = answers[0]
    assert first.headers["content-length"] == str(len(first.content))
    assert first.headers["content-disposition"] == 'attachment; filename="sent.pack"'
    assert first.headers["x-request-id"]
    (tmp_path / "sent.pack").write_bytes(first.content)
    unpack(tmp_path / "sent.pack", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert client.get("/v1/models/run:sent").json() == described


def test_a_broken_download_goes_on(client: httpx.Client, folder: Path) -> None:
    whole = client.get(PATH)
    etag = whole.headers["etag"]
    rest = client.get(PATH, headers={"Range": "bytes=1000-", "If-Range": etag})
    assert (rest.status_code, rest.content) == (206, whole.content[1000:])
    assert client.get(PATH, headers={"If-None-Match": etag}).status_code == 304
    behind = client.get(PATH, headers={"Range": "bytes=99999999-"})
    check_error(behind, 416, "range_not_satisfiable")


def test_the_speed_of_a_link_decides_what_is_coded(
    client: httpx.Client, folder: Path, tmp_path: Path
) -> None:
    sizes = {}
    for mbps in ("0.5", "1e12"):
        answer = client.get(PATH, params={"link_mbps": mbps})
        file = tmp_path / mbps
        file.write_bytes(answer.content)
        unpack(file, tmp_path / f"{mbps}-back")
        assert contents(tmp_path / f"{mbps}-back") == contents(folder)
        sizes[mbps] = sum(entry.is_coded for entry in read_header(file).entries)
    assert sizes["0.5"] > sizes["1e12"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/models/run:none/packed", 404, "model_not_found"),
        ("/v1/models/nobody/packed", 404, "model_not_found"),
        ("/v1/models/nobody:v/packed", 404, "model_not_found"),
        ("/v1/models/run:..%2f../packed", 404, None),
        ("/v1/models/run/packed", 404, "not_a_variant"),
        (f"{PATH}?link_mbps=0", 422, "invalid_request"),
        (f"{PATH}?link_mbps=-3", 422, "invalid_request"),
        (f"{PATH}?link_mbps=nan", 422, "invalid_request"),
        (f"{PATH}?link_mbps=inf", 422, "invalid_request"),
        (f"{PATH}?link_mbps=fast", 422, "invalid_request"),
    ],
)
def test_what_can_not_be_sent_is_said_in_one_line(
    client: httpx.Client, folder: Path, path: str, status: int, code: str | None
) -> None:
    answer = client.get(path)
    error = check_error(answer, status, code or answer.json()["error"]["code"])
    assert "\n" not in str(error["message"])


def test_a_damaged_variant_is_not_sent(client: httpx.Client, folder: Path) -> None:
    damaged = shutil.copytree(folder, folder.with_name("damaged"))
    shutil.rmtree(damaged / ".packed", ignore_errors=True)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    error = check_error(client.get("/v1/models/run:damaged/packed"), 500, "variant_damaged")
    assert "model.safetensors was altered" in str(error["message"])
    assert client.delete("/v1/models/run:damaged").status_code == 204


def test_a_variant_that_lies_packed_only_is_listed_described_sent_and_deleted(
    client: httpx.Client, folder: Path
) -> None:
    content = client.get(PATH).content
    file = folder.with_name("moved.pack")
    file.write_bytes(content)
    assert "run:moved" in {model["id"] for model in client.get("/v1/models").json()["data"]}
    moved = client.get("/v1/models/run:moved").json()
    assert moved["plan"] == client.get("/v1/models/run:sent").json()["plan"]
    assert client.get("/v1/models/run:moved/packed?link_mbps=100").content == content
    file.write_bytes(content[: len(content) // 40])
    error = check_error(client.get("/v1/models/run:moved"), 500, "variant_damaged")
    assert "moved.pack is cut short" in str(error["message"])
    assert client.delete("/v1/models/run:moved").status_code == 204
    check_error(client.get("/v1/models/run:moved"), 404, "model_not_found")
    assert not file.exists()
