"""A run that decides bits, from the request to what an engine is given to load."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from serve.catalogue import Catalogue, ModelId
from serve.config import EngineOptions, ServeConfig
from serve.models import Began, Models
from tests.serve.conftest import Server
from tests.serve.test_models import call, talk, text
from tests.serve.test_routes import check_error, finished
from unicuco.engines.folder import read_facts
from unicuco.engines.holding import hold
from unicuco.pipeline import Run, prune, unpack
from unicuco.testing.streaming_echo import StreamingEcho
from unicuco.types import Request


@pytest.fixture(scope="module")
def run(tiny_bits_run: Path) -> Run:
    return Run.open(tiny_bits_run)


def requests(run: Run) -> dict[str, dict[str, float]]:
    """Weights of fewer bits; those and keys and values; zeros."""
    dense = run.profile.total_bytes
    total = {"max_total_bytes": int(0.9 * dense), "context": 48, "batch": 8}
    return {"bytes": {"max_bytes": int(0.75 * dense)}, "total": total, "zeros": {"sparsity": 0.4}}


def test_plans_of_bits_are_those_of_the_run(client: httpx.Client, run: Run) -> None:
    asked = list(requests(run).values())
    answer = client.post("/v1/strategies", json={"model": "bits", "requests": asked})
    plans = [plan.to_dict() for plan in run.plan([Request.from_dict(one) for one in asked])]
    assert answer.json()["data"] == json.loads(json.dumps(plans))
    assert {plan["served_as"] for plan in plans} == {"quantised"}


@pytest.mark.parametrize("kind", ["bytes", "total"])
def test_a_job_makes_the_quantised_variant_that_prune_makes(
    client: httpx.Client, server: Server, run: Run, tmp_path: Path, kind: str
) -> None:
    request = requests(run)[kind]
    body = {"model": "bits", "request": request, "suffix": kind}
    job = client.post("/v1/compression/jobs", json=body).json()
    assert job["prediction"]["served_as"] == "quantised"
    done = finished(client, job["id"])
    assert done["status"] == "succeeded"
    plan = prune(run, Request.from_dict(request), tmp_path / "mine").to_dict()
    assert plan["bytes"] < run.profile.total_bytes
    assert {**done["result"], "seconds": 0} == {**json.loads(json.dumps(plan)), "seconds": 0}  # type: ignore[dict-item]
    folder = Path(server.config.data) / "variants" / "bits" / kind
    mine, theirs = (load_file(at / "model.safetensors") for at in (tmp_path / "mine", folder))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert any(name.endswith(("weight_scale", "weight_packed")) for name in mine)
    documents = [
        json.loads((at / "strategy.json").read_text()) for at in (tmp_path / "mine", folder)
    ]
    assert documents[0]["precision"] == documents[1]["precision"]
    listed = client.get("/v1/models").json()["data"]
    assert f"bits:{kind}" in {model["id"] for model in listed}
    model = client.get(f"/v1/models/bits:{kind}").json()
    assert (model["run"], model["plan"]["served_as"]) == ("bits", "quantised")
    (tmp_path / "file").write_bytes(client.get(f"/v1/models/bits:{kind}/packed").content)
    unpack(tmp_path / "file", tmp_path / "back")
    assert read_facts(tmp_path / "back").tensors == read_facts(folder).tensors
    assert client.delete(f"/v1/models/bits:{kind}").status_code == 204


def test_what_bits_can_not_meet_is_422(client: httpx.Client) -> None:
    for request, word in (
        ({"max_bytes": 1000}, "the nearest that can"),
        ({"sparsity": 0.2, "served_as": "mask"}, "learned fewer bits only"),
    ):
        body = {"model": "bits", "request": request}
        error = check_error(
            client.post("/v1/compression/jobs", json=body), 422, "infeasible_request"
        )
        assert word in str(error["message"])


def test_engines_load_quantised_variants_anew_and_switch_between_masks(
    tiny_run: Path, tiny_bits_run: Path, run: Run, tmp_path: Path
) -> None:
    engines = EngineOptions(min_engines=0, longest_wait_s=0.1)
    config = ServeConfig.of_runs([tiny_run, tiny_bits_run], data=tmp_path / "data", engines=engines)
    catalogue = Catalogue(config)
    catalogue.make_folders()
    masks = Run.open(tiny_run)
    for name, made, request in (
        ("bits:bytes", run, requests(run)["bytes"]),
        ("bits:total", run, requests(run)["total"]),
        ("run:less", masks, {"sparsity": 0.3}),
        ("run:more", masks, {"sparsity": 0.6}),
    ):
        prune(made, Request.from_dict(request), catalogue.place(ModelId.parse(name)))

    async def work() -> list[int]:
        engine = StreamingEcho()
        models = Models(config, lambda config: [engine])
        starts = []
        for name in ("run", "run:less", "run:more", "bits:bytes", "bits:total", "bits:bytes"):
            events = await talk(models, call(name))
            assert isinstance(events[0], Began), events
            if ":" in name:
                found = catalogue.find(ModelId.parse(name))
                assert events[0].fingerprint == f"fp_{hold(found, None).digest()[:16]}"
                assert text(events).startswith(found.name)
            starts.append(engine.starts)
        return starts

    assert asyncio.run(work()) == [1, 1, 1, 2, 3, 4]

    async def with_an_engine_of_its_own() -> list[int]:
        two = [StreamingEcho(), StreamingEcho()]
        models = Models(config, lambda config: two)
        for name in ("run", "bits:bytes", "run:more", "bits:bytes", "run:less"):
            assert isinstance((await talk(models, call(name)))[0], Began)
        return [engine.starts for engine in two]

    assert asyncio.run(with_an_engine_of_its_own()) == [1, 1]
