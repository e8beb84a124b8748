"""Every route as a caller sees it, and everything a caller may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from tests.serve.conftest import Server, wait_until
from unicuco.pipeline import Run, prune
from unicuco.types import Request, Target

RUN = "run"
FINAL = ("succeeded", "failed", "cancelled")


def ask(client: httpx.Client, suffix: str | None = None, **target: float) -> httpx.Response:
    body: dict[str, object] = {"model": RUN, "request": target or {"sparsity": 0.5}}
    return client.post(
        "/v1/compression/jobs", json=body if suffix is None else {**body, "suffix": suffix}
    )


def finished(client: httpx.Client, job_id: str, seconds: float = 60) -> dict[str, object]:
    def is_final() -> bool:
        return client.get(f"/v1/compression/jobs/{job_id}").json()["status"] in FINAL

    assert wait_until(is_final, seconds)
    job: dict[str, object] = client.get(f"/v1/compression/jobs/{job_id}").json()
    return job


def check_error(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, object] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert answer.headers["x-request-id"]
    return error


# --- strategies -----------------------------------------------------------------------------------


def test_strategies_are_plan_documents_in_order(client: httpx.Client, tiny_run: Path) -> None:
    requests = [{"sparsity": 0.25}, {"max_kl": 0.1}, {"preference": 0.5}, {"max_params": 8000}]
    answer = client.post("/v1/strategies", json={"model": RUN, "requests": requests})
    assert answer.status_code == 200
    assert answer.json()["object"] == "list"
    plans = Run.open(tiny_run).plan([Request.from_dict(request) for request in requests])
    documents = [json.loads(json.dumps(plan.to_dict())) for plan in plans]  # type: ignore[union-attr]
    assert answer.json()["data"] == documents


def test_what_can_not_be_met_is_told_at_its_place(client: httpx.Client) -> None:
    requests = [{"sparsity": 0.5}, {"sparsity": 0.99}, {"max_latency_ms": 5, "batch": 2}]
    answer = client.post("/v1/strategies", json={"model": RUN, "requests": requests})
    assert answer.status_code == 200
    good, bad, slow = answer.json()["data"]
    assert good["sparsity"] == 0.5
    assert bad["error"]["code"] == slow["error"]["code"] == "infeasible_request"
    assert "masks, which are as fast as the dense model" in slow["error"]["message"]


def test_an_impossible_budget_is_422_and_names_the_nearest(client: httpx.Client) -> None:
    body = {"model": RUN, "requests": [{"max_params": 10}]}
    error = check_error(client.post("/v1/strategies", json=body), 422, "infeasible_request")
    assert "the nearest that can be met is" in str(error["message"])
    error = check_error(ask(client, max_params=10), 422, "infeasible_request")
    assert "the nearest that can be met is" in str(error["message"])


def test_the_front_is_that_of_the_run(client: httpx.Client, tiny_run: Path) -> None:
    front = client.get("/v1/front", params={"model": RUN}).json()
    written = json.loads((tiny_run / "front.json").read_text())
    assert front["model"] == RUN
    assert front["predicted"] == written["predicted"]


# --- jobs and variants ----------------------------------------------------------------------------


def test_a_job_makes_the_variant_that_prune_makes(
    client: httpx.Client, server: Server, tiny_run: Path, tmp_path: Path
) -> None:
    answer = ask(client, "same-bits", sparsity=0.37)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/compression/jobs/{job['id']}"
    assert job["compressed_model"] == "run:same-bits"
    assert job["prediction"]["kl"]["lo95"] <= job["prediction"]["kl"]["mean"]
    done = finished(client, job["id"])
    assert done["status"] == "succeeded"
    plan = prune(Run.open(tiny_run), Request(target=Target.SPARSITY, value=0.37), tmp_path / "v")
    result = dict(done["result"])  # type: ignore[call-overload]
    assert result.pop("seconds") > 0
    assert result == json.loads(json.dumps(plan.to_dict()))
    folder = Path(server.config.data) / "variants" / "run" / "same-bits"
    mine, theirs = (
        load_file(tmp_path / "v" / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)
    assert mine.keys() == theirs.keys()
    model = client.get("/v1/models/run:same-bits").json()
    assert (model["kind"], model["plan"]["sparsity"]) == ("variant", plan.sparsity)
    assert "run:same-bits" in {m["id"] for m in client.get("/v1/models").json()["data"]}


def test_events_are_told_as_a_list_and_as_a_stream_that_can_be_resumed(
    client: httpx.Client,
) -> None:
    job_id = ask(client).json()["id"]
    path = f"/v1/compression/jobs/{job_id}/events"
    with client.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        text = "".join(stream.iter_text())
    events = [block for block in text.split("\n\n") if block.startswith("id: ")]
    assert events[0].startswith("id: 1\nevent: queued\n")
    assert events[-1].split("\n")[1] == "event: succeeded"
    listed = client.get(path).json()["data"]
    assert [f"id: {e['id']}\nevent: {e['type']}" for e in listed] == [
        event.rpartition("\n")[0] for event in events
    ]
    assert listed[-1]["type"] == "succeeded"
    again = client.get(path, headers={"Accept": "text/event-stream", "Last-Event-ID": "2"}).text
    assert again.startswith("id: 3\n")
    assert client.get(path, params={"after": 2, "limit": 1}).json()["has_more"] is True


def test_the_same_key_gives_the_same_job_and_another_body_409(client: httpx.Client) -> None:
    body: dict[str, object] = {"model": RUN, "request": {"sparsity": 0.41}}
    key = {"Idempotency-Key": "once"}
    first = client.post("/v1/compression/jobs", json=body, headers=key)
    second = client.post("/v1/compression/jobs", json=body, headers=key)
    assert first.status_code == second.status_code == 202
    assert first.json()["id"] == second.json()["id"]
    body["request"] = {"sparsity": 0.42}
    third = client.post("/v1/compression/jobs", json=body, headers=key)
    check_error(third, 409, "idempotency_key_reused")


def test_a_suffix_is_used_once_until_its_variant_is_deleted(client: httpx.Client) -> None:
    first = ask(client, "mine").json()
    check_error(ask(client, "mine", sparsity=0.6), 409, "name_taken")
    finished(client, first["id"])
    check_error(ask(client, "mine"), 409, "name_taken")
    deleted = client.delete("/v1/models/run:mine")
    assert (deleted.status_code, deleted.content) == (204, b"")
    check_error(client.get("/v1/models/run:mine"), 404, "model_not_found")
    check_error(client.delete("/v1/models/run:mine"), 404, "model_not_found")
    again = ask(client, "mine", sparsity=0.6)
    assert finished(client, again.json()["id"])["status"] == "succeeded"


def test_pages_of_jobs_meet(client: httpx.Client) -> None:
    made = [ask(client).json()["id"] for _ in range(3)]
    page = client.get("/v1/compression/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == made[:0:-1]
    assert page["has_more"] is True
    following = client.get(
        "/v1/compression/jobs", params={"limit": 1, "after": page["last_id"]}
    ).json()
    assert following["data"][0]["id"] == made[0]


def test_a_finished_job_can_not_be_cancelled(client: httpx.Client) -> None:
    job_id = ask(client).json()["id"]
    finished(client, job_id)
    check_error(client.post(f"/v1/compression/jobs/{job_id}/cancel"), 409, "job_finished")


# --- the system -----------------------------------------------------------------------------------


def test_the_service_lives_is_ready_and_counts(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    # A part that takes a while to answer is not ready meanwhile.
    assert wait_until(lambda: client.get("/ready").json() == {"status": "ready"}, 60)
    text = client.get("/metrics").text
    assert 'unicuco_http_requests_total{method="GET",route="/health",status="200"}' in text
    assert 'unicuco_jobs{status="queued"}' in text


def test_a_request_id_is_echoed_or_made(client: httpx.Client) -> None:
    echoed = client.get("/health", headers={"X-Request-Id": "mine-7"})
    assert echoed.headers.get_list("x-request-id") == ["mine-7"]
    assert len(client.get("/health").headers["x-request-id"]) >= 16


def test_the_api_describes_itself_with_examples(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    paths = document["paths"]
    assert {
        "/v1/strategies", "/v1/compression/jobs", "/v1/compression/jobs/{job_id}",
        "/v1/compression/jobs/{job_id}/cancel", "/v1/compression/jobs/{job_id}/events",
        "/v1/models", "/v1/models/{model_id}", "/v1/models/{model_id}/packed", "/v1/front",
        "/health", "/ready", "/metrics",
    } <= set(paths)  # fmt: skip
    schemas = document["components"]["schemas"]
    for name in ("StrategiesBody", "JobBody", "CompressRequest", "JobObject", "StrategyList"):
        assert schemas[name]["examples"], name
    assert client.get("/docs").status_code == 200


# --- what a caller may get wrong ------------------------------------------------------------------

NESTED = b"[" * 1000 + b"]" * 1000


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"model": "../run"}, 404, "model_not_found"),
        ({"model": 3}, 422, "invalid_request"),
        ({"requests": []}, 422, "invalid_request"),
        ({"requests": [{"sparsity": 0.5, "max_kl": 1}]}, 422, "invalid_request"),
        ({"requests": [{}]}, 422, "invalid_request"),
        ({"requests": [{"speed": 3}]}, 422, "invalid_request"),
        ({"requests": [{"max_latency_ms": 0}]}, 422, "invalid_request"),
        ({"requests": [{"sparsity": 1.5}]}, 422, "invalid_request"),
        ({"requests": [{"sparsity": "0.5"}]}, 422, "invalid_request"),
        ({"requests": [{"sparsity": "\ud800"}]}, 422, "invalid_request"),
        ({"requests": [{"max_params": 10**400}]}, 422, "invalid_request"),
        ({"requests": [{"sparsity": 0.5}] * 101}, 413, "list_too_long"),
        ({"colour": "red"}, 422, "invalid_request"),
    ],
)
def test_wrong_strategy_bodies(
    client: httpx.Client, change: dict[str, object], status: int, code: str
) -> None:
    body = {"model": RUN, "requests": [{"sparsity": 0.5}], **change}
    check_error(client.post("/v1/strategies", content=json.dumps(body), headers=JSON), status, code)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 422, "invalid_request"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"model": NaN}', 422, "invalid_request"),
        (NESTED, 400, "invalid_json"),
        (b'{"model":"run","requests":[{"sparsity":' + NESTED + b"}]}", 400, "invalid_json"),
        (
            b'{"model":"run","requests":[{"sparsity":' + NESTED[600:1400] + b"}]}",
            422,
            "invalid_request",
        ),
        (b"[" * 40_000 + b"]" * 40_000, 400, "invalid_json"),
        (b'"' + b"a" * 10_000_000 + b'"', 413, "body_too_large"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/strategies", "/v1/compression/jobs"])
def test_bodies_that_are_none(
    client: httpx.Client, path: str, content: bytes, status: int, code: str
) -> None:
    answer = client.post(path, content=content, headers=JSON)
    check_error(answer, status, code)
    assert client.get("/health").status_code == 200


def test_a_long_body_of_unknown_length_is_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/strategies", content=(b" " * 10_000 for _ in range(50)), headers=JSON)
    check_error(answer, 413, "body_too_large")


@pytest.mark.parametrize(
    "change",
    [
        {"suffix": "UPPER"},
        {"suffix": "../up"},
        {"suffix": ""},
        {"suffix": "a" * 41},
        {"request": [0.5]},
        {"request": {"sparsity": 0.5, "max_bytes": 10}},
        {"priority": 1},
    ],
)
def test_wrong_job_bodies(client: httpx.Client, change: dict[str, object]) -> None:
    body = {"model": RUN, "request": {"sparsity": 0.5}, **change}
    check_error(client.post("/v1/compression/jobs", json=body), 422, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("DELETE", "/v1/strategies", 405, "method_not_allowed"),
        ("GET", "/v1/front?model=nobody", 404, "model_not_found"),
        ("GET", "/v1/front", 422, "invalid_request"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/v1/models/run:none", 404, "model_not_found"),
        ("GET", "/v1/models/run:..%2f..", 404, None),
        ("DELETE", "/v1/models/run:none", 404, "model_not_found"),
        ("DELETE", "/v1/models/run", 403, "run_is_kept"),
        ("GET", "/v1/compression/jobs/cjob-nothing", 404, "job_not_found"),
        ("POST", "/v1/compression/jobs/cjob-nothing/cancel", 404, "job_not_found"),
        ("GET", "/v1/compression/jobs/nothing/events", 404, "job_not_found"),
        ("GET", "/v1/compression/jobs?after=nothing", 404, "job_not_found"),
        ("GET", "/v1/compression/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/v1/compression/jobs?limit=1000", 422, "invalid_request"),
    ],
)
def test_wrong_paths(
    client: httpx.Client, method: str, path: str, status: int, code: str | None
) -> None:
    answer = client.request(method, path)
    check_error(answer, status, code or answer.json()["error"]["code"])


def test_a_link_out_of_the_root_is_no_variant(
    client: httpx.Client, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "strategy.json").write_text("{}")
    link = Path(server.config.data) / "variants" / "run" / "out"
    link.symlink_to(tmp_path)
    try:
        check_error(client.get("/v1/models/run:out"), 404, "model_not_found")
        check_error(client.delete("/v1/models/run:out"), 404, "model_not_found")
        assert "run:out" not in client.get("/v1/models").text
    finally:
        link.unlink()
    assert (tmp_path / "strategy.json").exists()


@pytest.mark.slow
def test_nothing_random_brings_the_service_down(client: httpx.Client) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, settings

    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    worst: list[tuple[int, str]] = []

    def call(case: schemathesis.Case) -> None:
        if case.path.endswith("/events"):
            case.headers = {**(case.headers or {}), "Accept": "application/json"}
        answer = case.call(base_url=str(client.base_url))
        if answer.status_code == 503 and answer.json()["error"]["code"] == "no_engine":
            return  # the variant is there by now, and this service has nothing that talks
        worst.append((answer.status_code, f"{case.method} {case.path} {case.body!r}"[:500]))

    few = settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        test: Callable[[], None] = few(schemathesis_given(operation)(call))
        test()
    assert len(worst) >= 3 * len(operations)
    # 503 is what a service without engines answers to whoever wants text.
    failures = [(status, what) for status, what in worst if status >= 500 and status != 503]
    assert not failures


def schemathesis_given(operation: object) -> Callable[..., Callable[[], None]]:
    """Return hypothesis' decorator that draws cases of one operation, good and bad."""
    from hypothesis import given
    from schemathesis import GenerationMode

    good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)  # type: ignore[attr-defined]
    bad = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)  # type: ignore[attr-defined]
    return given(good | bad)
