"""What every database must do for jobs: subclass `JobStoreContract`, give it a `location`."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from unicuco.store import (
    Claim,
    Job,
    JobConflictError,
    JobFailure,
    JobStatus,
    JobStore,
    LeaseState,
    NewJob,
    QueueFullError,
    UnknownJobError,
)
from unicuco.testing.processes import child_environment
from unicuco.types import Request, Target

LONG_S = 60.0
_TAKE_JOB = """
import sys
from unicuco.store import JobStore
with JobStore.open(sys.argv[1]) as store:
    assert store.claim("another process", lease_s=600, max_attempts=3) is not None
"""


def make_new(number: int = 0, *, key: str | None = None, digest: str = "d") -> NewJob:
    """Return a job to ask for; equal arguments, equal job."""
    return NewJob(
        model="run",
        compressed_model=f"run:v{number}",
        request=Request(target=Target.SPARSITY, value=0.5),
        prediction={"kl": {"mean": 1 / 3}},
        idempotency_key=key,
        body_digest=digest,
    )


def take(store: JobStore, *, lease_s: float = LONG_S) -> Claim:
    """Claim a job that must be there."""
    claim = store.claim("worker", lease_s=lease_s, max_attempts=3)
    assert claim is not None
    return claim


def complete(store: JobStore, claim: Claim) -> Job:
    """Bring a claimed job to success."""
    assert store.commit(claim, staged="s", result={"sparsity": 0.5}) is LeaseState.HELD
    return store.succeed(claim.job.id)


def kinds(store: JobStore, job_id: str) -> list[str]:
    """Return the types of a job's events, whose ids must count from 1."""
    events = store.events(job_id)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events]


class JobStoreContract:
    """Tests of `JobStore` against one kind of database."""

    @pytest.fixture
    def location(self, tmp_path: Path) -> str | Path:
        """Return the path or URL of a database that holds nothing yet."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, location: str | Path) -> Iterator[JobStore]:
        """Yield an empty store at ``location``."""
        with JobStore.open(location) as store:
            yield store

    # --- asking ---------------------------------------------------------------------------------

    def test_a_job_comes_back_as_it_was_asked_for(self, store: JobStore) -> None:
        new = make_new()
        job = store.submit(new, max_active=10)
        assert store.get(job.id) == job
        assert (job.status, job.model, job.compressed_model) == ("queued", "run", "run:v0")
        assert job.request == new.request
        assert job.prediction == new.prediction
        assert kinds(store, job.id) == ["queued"]
        assert store.job_of_name("run:v0") == job

    def test_the_same_key_with_the_same_body_is_the_same_job(self, store: JobStore) -> None:
        first = store.submit(make_new(key="k"), max_active=1)
        assert store.submit(make_new(key="k"), max_active=1) == first
        assert kinds(store, first.id) == ["queued"]

    def test_the_same_key_with_another_body_is_refused(self, store: JobStore) -> None:
        store.submit(make_new(key="k"), max_active=10)
        with pytest.raises(JobConflictError) as refused:
            store.submit(make_new(1, key="k", digest="e"), max_active=10)
        assert refused.value.code == "idempotency_key_reused"

    def test_a_name_is_taken_while_its_variant_is_made_or_there(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        with pytest.raises(JobConflictError, match=job.id) as refused:
            store.submit(make_new(key="k"), max_active=10)
        assert refused.value.code == "name_taken"
        store.free_name("run:v0")
        assert store.job_of_name("run:v0") is not None, "a name in the making is not free"
        complete(store, take(store))
        with pytest.raises(JobConflictError):
            store.submit(make_new(), max_active=10)
        store.free_name("run:v0")
        assert store.submit(make_new(), max_active=10).id != job.id

    def test_a_name_is_free_again_after_failure_and_cancellation(self, store: JobStore) -> None:
        store.submit(make_new(), max_active=10)
        store.fail(take(store), JobFailure(code="c", message="m"))
        second = store.submit(make_new(), max_active=10)
        store.cancel(second.id)
        assert store.submit(make_new(), max_active=10).status is JobStatus.QUEUED

    def test_callers_at_once_with_one_key_get_one_job(self, location: str | Path) -> None:
        def ask(_: int) -> str:
            with JobStore.open(location) as own:
                return own.submit(make_new(key="k"), max_active=10).id

        with ThreadPoolExecutor(8) as threads:
            assert len(set(threads.map(ask, range(8)))) == 1

    def test_a_full_queue_refuses_and_empties(self, store: JobStore) -> None:
        store.submit(make_new(0), max_active=2)
        store.submit(make_new(1), max_active=2)
        with pytest.raises(QueueFullError):
            store.submit(make_new(2), max_active=2)
        complete(store, take(store))
        store.submit(make_new(2), max_active=2)

    def test_pages_are_newest_first_and_meet_without_gap(self, store: JobStore) -> None:
        ids = [store.submit(make_new(n), max_active=10).id for n in range(5)][::-1]
        first = [job.id for job in store.page(after=None, limit=2)]
        rest = [job.id for job in store.page(after=first[-1], limit=10)]
        assert first + rest == ids
        with pytest.raises(UnknownJobError):
            store.page(after="nobody", limit=1)

    def test_an_unknown_job_is_refused_everywhere(self, store: JobStore) -> None:
        for ask in (store.get, store.cancel, store.succeed):
            with pytest.raises(UnknownJobError):
                ask("nobody")
        assert store.events("nobody") == []

    # --- working --------------------------------------------------------------------------------

    def test_jobs_are_taken_oldest_first_and_by_one_worker_each(self, store: JobStore) -> None:
        ids = [store.submit(make_new(n), max_active=10).id for n in range(3)]
        assert [take(store).job.id for _ in ids] == ids
        assert store.claim("worker", lease_s=LONG_S, max_attempts=3) is None
        assert store.counts()[JobStatus.RUNNING] == 3

    def test_workers_at_once_never_take_the_same_job(self, location: str | Path) -> None:
        with JobStore.open(location) as store:
            for number in range(16):
                store.submit(make_new(number), max_active=99)
        taken: list[str] = []
        lock = threading.Lock()

        def work(_: int) -> None:
            with JobStore.open(location) as own:
                while (claim := own.claim("w", lease_s=LONG_S, max_attempts=3)) is not None:
                    with lock:
                        taken.append(claim.job.id)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        assert len(taken) == len(set(taken)) == 16

    def test_a_whole_life_is_told_in_order(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        claim = take(store)
        assert store.progress(claim, "cut", 1, 2) is LeaseState.HELD
        running = store.get(job.id)
        assert (running.status, running.stage, running.done, running.total) == (
            ("running", "cut", 1, 2)
        )
        done = complete(store, claim)
        assert done.status is JobStatus.SUCCEEDED
        assert done.result == {"sparsity": 0.5}
        assert job.created_at <= (done.started_at or 0) <= (done.finished_at or 0)
        assert kinds(store, job.id) == ["queued", "running", "progress", "succeeded"]
        assert [event.type for event in store.events(job.id, after=2)] == ["progress", "succeeded"]
        assert store.succeed(job.id) == done, "told again, it changes nothing"

    def test_a_failure_is_told_with_its_reason(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        failure = JobFailure(code="infeasible_request", message="no", param="request")
        store.fail(take(store), failure)
        assert store.get(job.id).error == failure
        assert kinds(store, job.id)[-1] == "failed"
        assert store.events(job.id)[-1].data["error"]["code"] == "infeasible_request"

    def test_a_silent_worker_is_replaced_and_can_do_nothing_any_more(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        zombie = take(store, lease_s=-1.0)
        second = take(store)
        assert second.job.id == job.id
        assert second.token > zombie.token
        assert store.renew(zombie, lease_s=LONG_S) is LeaseState.LOST
        assert store.progress(zombie, "cut", 1, 2) is LeaseState.LOST
        assert store.commit(zombie, staged="z", result={}) is LeaseState.LOST
        assert store.fail(zombie, JobFailure(code="c", message="m")) is LeaseState.LOST
        assert store.stop(zombie) is LeaseState.LOST
        store.give_back(zombie)
        assert store.succeed(job.id).status is JobStatus.RUNNING, "nothing was committed"
        assert store.renew(second, lease_s=LONG_S) is LeaseState.HELD
        assert complete(store, second).result == {"sparsity": 0.5}
        assert store.commit(second, staged="again", result={}) is LeaseState.LOST

    def test_a_renewed_lease_is_not_taken(self, store: JobStore) -> None:
        store.submit(make_new(), max_active=10)
        claim = take(store, lease_s=-1.0)
        assert store.renew(claim, lease_s=LONG_S) is LeaseState.HELD
        assert store.claim("worker", lease_s=LONG_S, max_attempts=3) is None

    def test_the_job_of_a_dead_process_is_taken_over_at_once(
        self, store: JobStore, location: str | Path
    ) -> None:
        job = store.submit(make_new(), max_active=10)
        subprocess.run(
            [sys.executable, "-c", _TAKE_JOB, str(location)],
            env=child_environment(),
            check=True,
        )
        assert store.get(job.id).status is JobStatus.RUNNING
        assert take(store).job.id == job.id

    def test_what_is_committed_is_only_published_by_whoever_comes_next(
        self, store: JobStore
    ) -> None:
        store.submit(make_new(), max_active=10)
        first = take(store)
        assert store.commit(first, staged="s", result={"n": 1}) is LeaseState.HELD
        store.give_back(first)
        second = take(store)
        assert second.staged == "s"
        assert store.commit(second, staged="t", result={"n": 2}) is LeaseState.HELD
        done = store.succeed(second.job.id)
        assert done.result == {"n": 1}
        assert kinds(store, done.id).count("succeeded") == 1

    def test_a_job_that_kills_its_workers_fails(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        for _ in range(3):
            take(store, lease_s=-1.0)
        assert store.claim("worker", lease_s=LONG_S, max_attempts=3) is None
        failed = store.get(job.id)
        assert failed.status is JobStatus.FAILED
        assert failed.error is not None
        assert failed.error.code == "worker_died"

    def test_a_job_given_back_is_taken_at_once_and_not_counted(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        for _ in range(5):
            claim = take(store)
            assert claim.job.id == job.id
            store.give_back(claim)

    # --- cancelling -----------------------------------------------------------------------------

    def test_a_queued_job_is_cancelled_at_once(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        cancelled = store.cancel(job.id)
        assert cancelled.status is JobStatus.CANCELLED
        assert store.cancel(job.id) == cancelled
        assert kinds(store, job.id) == ["queued", "cancelled"]
        assert store.claim("worker", lease_s=LONG_S, max_attempts=3) is None

    def test_a_running_job_is_cancelled_when_its_worker_hears_of_it(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        claim = take(store)
        assert store.cancel(job.id).cancel_requested
        assert store.renew(claim, lease_s=LONG_S) is LeaseState.CANCELLED
        assert store.commit(claim, staged="s", result={}) is LeaseState.CANCELLED
        store.stop(claim)
        assert store.get(job.id).status is JobStatus.CANCELLED
        assert kinds(store, job.id)[-1] == "cancelled"

    def test_a_cancelled_job_whose_worker_died_is_cancelled(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        take(store, lease_s=-1.0)
        store.cancel(job.id)
        assert store.claim("worker", lease_s=LONG_S, max_attempts=3) is None
        assert store.get(job.id).status is JobStatus.CANCELLED

    def test_a_finished_job_can_not_be_cancelled(self, store: JobStore) -> None:
        job = store.submit(make_new(), max_active=10)
        claim = take(store)
        store.commit(claim, staged="s", result={})
        with pytest.raises(JobConflictError, match="already finished"):
            store.cancel(job.id)
        store.succeed(job.id)
        with pytest.raises(JobConflictError):
            store.cancel(job.id)

    # --- staying --------------------------------------------------------------------------------

    def test_all_is_there_when_opened_again(self, store: JobStore, location: str | Path) -> None:
        job = store.submit(make_new(), max_active=10)
        claim = take(store)
        with JobStore.open(location) as again:
            assert replace(again.get(job.id)) == claim.job
            complete(again, claim)
        assert store.get(job.id).status is JobStatus.SUCCEEDED

    def test_processes_that_start_together_make_the_tables_once(self, location: str | Path) -> None:
        def start(_: int) -> int:
            with JobStore.open(location) as own:
                return own.num_active()

        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(start, range(6))) == [0] * 6
