"""Callers that go away, and a service that goes away: what each leaves to the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from serve.running import running
from tests.serve.conftest import STREAMS, Server, small_config, wait_until
from tests.serve.cutters import LET_GO, ChaosCutter
from tests.serve.test_faults import FINAL, ask, job
from unicuco.store import JobStatus, JobStore

pytestmark = pytest.mark.slow

SSE = {"Accept": "text/event-stream"}


def test_a_listener_that_goes_away_makes_room_for_another(chaos: Server) -> None:
    with chaos.client() as client:
        # A second each, four at a time: the last is not done before all of this is over.
        ids = [ask(client, 0.305 + k / 100, f"listened-{k}") for k in range(40)]
        path = f"/v1/compression/jobs/{ids[-1]}/events"

        def opened(stack: ExitStack) -> httpx.Response:
            listener = stack.enter_context(chaos.client())
            return stack.enter_context(listener.stream("GET", path, headers=SSE))

        def all_listen(stack: ExitStack, listeners: list[httpx.Response]) -> bool:
            with ExitStack() as tried:
                listeners[:] = [opened(tried) for _ in range(STREAMS)]
                if all(listener.status_code == 200 for listener in listeners):
                    stack.push(tried.pop_all())
                    return True
            return False

        for _ in range(3):
            with ExitStack() as stack:
                listeners: list[httpx.Response] = []
                # Those of before may go a moment later than they say.
                assert wait_until(partial(all_listen, stack, listeners), 30)
                lines = [listener.iter_lines() for listener in listeners]
                assert {next(one) for one in lines} == {"id: 1"}
                with ExitStack() as another:
                    refused = opened(another)
                    assert refused.status_code == 429
                    assert int(refused.headers["Retry-After"]) > 0
        assert job(client, ids[-1])["status"] == "queued"
        for job_id in ids:
            if job(client, job_id)["status"] == "queued":
                client.post(f"/v1/compression/jobs/{job_id}/cancel")
        assert wait_until(lambda: all(job(client, i)["status"] in FINAL for i in ids), 60)


@contextmanager
def asking(url: str, let_go: Path) -> Iterator[list[httpx.Response]]:
    """Ask again and again, on one connection, and keep the answers; a 503 makes a file."""
    answers: list[httpx.Response] = []
    done = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not done.wait(0.02):
                answers.append(client.get("/v1/models"))
                if answers[-1].status_code == 503:
                    let_go.touch()

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield answers
    finally:
        done.set()
        thread.join()


def test_a_service_that_is_stopped_finishes_what_it_has_and_sends_callers_away_for_a_while(
    serve_port: int, tiny_run: Path, tmp_path: Path
) -> None:
    config = small_config(tiny_run, tmp_path / "data", serve_port)
    texts: list[str] = []
    with (
        ExitStack() as stack,
        running(config, build_cutter=ChaosCutter, name="stopped", route_prefix="/stopped") as url,
    ):
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        # The first is not done, and so not everything is, before callers are sent away.
        ids = [ask(client, 0.306, "stopped-first")]
        ids += [ask(client, 0.305 + k / 100, f"stopped-{k}") for k in range(39)]
        assert wait_until(lambda: job(client, ids[0])["status"] != "queued", 30)
        path = f"{url}/v1/compression/jobs/{ids[-1]}/events"
        listener = threading.Thread(
            target=lambda: texts.append(httpx.get(path, headers=SSE, timeout=60).text)
        )
        listener.start()
        answers = stack.enter_context(asking(url, tmp_path / "data" / LET_GO))
        assert wait_until(lambda: len(answers) > 5, 30)
    listener.join(timeout=30)
    assert texts == [texts[0]]
    assert texts[0].startswith("id: 1\nevent: queued\n")
    codes = [answer.status_code for answer in answers]
    assert codes[0] == 200
    turned_away = [answer for answer in answers if answer.status_code == 503]
    assert turned_away == answers[codes.index(503) :][: len(turned_away)]
    assert set(codes[: codes.index(503)]) == {200}
    for answer in turned_away:
        assert answer.json()["error"]["code"] == "stopping"
        assert int(answer.headers["Retry-After"]) > 0
    with JobStore.open(config.jobs_location) as left:
        counts = left.counts()
    assert counts[JobStatus.RUNNING] == counts[JobStatus.FAILED] == 0
    assert counts[JobStatus.QUEUED] > 0
    assert counts[JobStatus.QUEUED] + counts[JobStatus.SUCCEEDED] == len(ids)
