from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.browser import open_page
from tests.serve.conftest import wait_until
from tests.serve.talking.conftest import NUM_VARIANTS, Talking, num_at_work

# Under pytest-xdist these share the one service of one worker.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("talking"), pytest.mark.timeout(1200)]

HOT = {"temperature": 2.0, "seed": 1}
PROMPTS = ["def main(argv):\n    ", "import os\n\n", "class Reader:\n    def ", "    return self."]


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Let the engines of these processes do nothing."""
    for pid in pids:
        os.killpg(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # taken for dead meanwhile, and started anew
                os.killpg(pid, signal.SIGCONT)


def test_the_official_client_gets_transformers_tokens_whole_and_streamed(talking: Talking) -> None:
    client = talking.client()
    assert {model.id for model in client.models.list()} >= set(talking.folders)
    for name in ("python", "python:v2", "python:v6"):
        asked = {"model": name, "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0}
        more = {"return_token_ids": True}
        whole = client.completions.create(**asked, extra_body=more)
        (choice,) = whole.choices
        assert (whole.model, whole.object, choice.finish_reason) == (
            name,
            "text_completion",
            "length",
        )
        tokens = choice.token_ids  # type: ignore[attr-defined]
        talking.check(name, PROMPTS[0], tokens)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(tokens) == 16
        chunks = list(
            client.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}, extra_body=more
            )
        )
        assert "".join(c.choices[0].text for c in chunks[:-1]) == choice.text
        assert {c.model for c in chunks} == {name}
        assert {c.system_fingerprint for c in chunks} == {whole.system_fingerprint}
        assert chunks[-1].usage == whole.usage
        assert len(chunks) > 2  # streamed, not sent at once


def test_the_official_client_chats(talking: Talking) -> None:
    client = talking.client()
    messages = [
        {"role": "system", "content": "You write Python."},
        {"role": "user", "content": [{"type": "text", "text": "Read a file."}]},
    ]
    asked = {"model": "python:v1", "messages": messages, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_completion_tokens=12)  # type: ignore[call-overload]
    (choice,) = whole.choices
    assert (whole.object, choice.message.role) == ("chat.completion", "assistant")
    chunks = list(
        client.chat.completions.create(**asked, max_completion_tokens=12, stream=True)  # type: ignore[call-overload]
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    # The plain form of a conversation, for a model without a template: the same tokens by hand.
    prompt = "System: You write Python.\nUser: Read a file.\nAssistant:"
    plain = client.completions.create(
        model="python:v1", prompt=prompt, max_tokens=12, temperature=0, stop="\nUser:"
    )
    assert plain.choices[0].text == choice.message.content


def test_many_prompts_and_copies_stand_in_their_order_and_seeds_repeat(talking: Talking) -> None:
    client = talking.client()
    asked = {"model": "python:v3", "prompt": PROMPTS[:2], "n": 2, "max_tokens": 8, "seed": 5}
    first, again = (client.completions.create(**asked) for _ in range(2))  # type: ignore[call-overload]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert first.choices[0].text != first.choices[1].text  # copies draw with seeds of their own
    greedy = client.completions.create(
        model="python:v3", prompt=PROMPTS[:2], max_tokens=8, temperature=0
    )
    alone = [
        client.completions.create(model="python:v3", prompt=p, max_tokens=8, temperature=0)
        for p in PROMPTS[:2]
    ]
    assert [c.text for c in greedy.choices] == [a.choices[0].text for a in alone]


def test_a_variant_that_was_sent_packed_talks_where_it_lies_packed_only(talking: Talking) -> None:
    file = Path(talking.config.data) / "variants" / "python" / "moved.pack"
    with talking.http() as http:
        file.write_bytes(http.get("/v1/models/python:v2/packed").content)
        asked = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
        texts = [
            http.post("/v1/completions", json={"model": model, **asked}).json()["choices"]
            for model in ("python:v2", "python:moved")
        ]
        assert texts[0] == texts[1]
        assert wait_until(lambda: http.delete("/v1/models/python:moved").status_code == 204, 30)
        answer = http.post("/v1/completions", json={"model": "python:moved", **asked})
        assert (answer.status_code, file.exists()) == (404, False)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"model": "python:nothing"}, 404, "model_not_found"),
        ({"model": "nothing"}, 404, "model_not_found"),
        ({"model": "../../etc"}, 404, "model_not_found"),
        ({"prompt": "x " * 600}, 400, "context_length_exceeded"),
        ({"prompt": ""}, 400, "invalid_request"),
        ({"prompt": [4096]}, 400, "invalid_request"),
        ({"max_tokens": 100_000}, 400, "max_tokens_too_large"),
        ({"max_tokens": 0}, 422, "invalid_request"),
        ({"temperature": -1}, 422, "invalid_request"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 422, "invalid_request"),
        ({"stop": ""}, 422, "invalid_request"),
        ({"prompt": []}, 422, "invalid_request"),
        ({"logit_bias": {"1": 2}}, 422, "invalid_request"),
        ({"n": 32, "prompt": ["a", "b"]}, 413, "list_too_long"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_can_not_be_answered_has_its_status_and_the_envelope(
    talking: Talking, changes: dict[str, object], status: int, code: str, stream: bool
) -> None:
    body = {"model": "python:v0", "prompt": "import", "max_tokens": 4, "stream": stream, **changes}
    with talking.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code


def test_the_official_client_raises_its_own_errors(talking: Talking) -> None:
    client = talking.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="python:nothing", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="python:v0", prompt="x " * 600)
    with pytest.raises(openai.UnprocessableEntityError, match="extra_thing"):
        client.completions.create(model="python:v0", prompt="x", extra_body={"extra_thing": 1})


def test_no_engine_works_on_for_a_client_that_went_away(talking: Talking) -> None:
    body = {"model": "python:v4", "prompt": "x = [1, ", "max_tokens": 480, "n": 32, **HOT}
    seen: list[dict[str, Any]] = []  # Any: JSON

    def at_work() -> int:
        seen.append(talking.status())
        return num_at_work(seen[-1])

    async def leave() -> list[int]:
        """Send three, wait until all are at work, and go; return how those that ended did."""
        async with httpx.AsyncClient(base_url=talking.url, timeout=240) as http:
            calls = [
                asyncio.create_task(http.post("/v1/completions", json={**body, "stream": stream}))
                for stream in (True, False, False)
            ]

            def all_came_or_one_went() -> bool:
                return at_work() == 96 or any(call.done() for call in calls)

            # At least one of them waits, however many engines are well just now.
            assert await asyncio.to_thread(wait_until, all_came_or_one_went, 60), seen[-5:]
            ended = [call.result().status_code for call in calls if call.done()]
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            return ended

    assert wait_until(lambda: at_work() == 0, 60), seen[-1]
    began = time.monotonic()
    with talking.http() as http:
        http.post("/v1/completions", json=body).raise_for_status()
    whole_s = time.monotonic() - began
    for _ in range(3):  # calls may end before all three are seen where an engine is lost meanwhile
        if not (ended := asyncio.run(leave())):
            break
    assert not ended, (ended, whole_s, seen[-20:])
    # Worked on, the three would need at least twice as long, for one begins when another ends.
    assert wait_until(lambda: at_work() == 0, whole_s), seen[-1]


def test_a_variant_is_not_deleted_while_it_is_served_and_gone_afterwards(
    talking: Talking, engine_pids: list[int]
) -> None:
    body = {"model": "python:gone", "prompt": "x = [1, ", "max_tokens": 480, "n": 8, "stream": True}
    with talking.http() as http, ThreadPoolExecutor(1) as caller:
        job = http.post(
            "/v1/compression/jobs",
            json={"model": "python", "request": {"sparsity": 0.35}, "suffix": "gone"},
        ).json()
        path = f"/v1/compression/jobs/{job['id']}"
        assert wait_until(lambda: http.get(path).json()["status"] == "succeeded", 60)
        # Whatever else the machine does: no answer is over before the deletion is asked for. An
        # engine that is taken for dead meanwhile has said nothing yet, so the call is tried again.
        with stopped(engine_pids):
            answer = caller.submit(http.post, "/v1/completions", json={**body, **HOT})
            assert wait_until(lambda: num_at_work(talking.status()) == 8, 60)
            refused = http.delete("/v1/models/python:gone")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "variant_in_use"
        assert answer.result().text.endswith("data: [DONE]\n\n")
        assert wait_until(lambda: http.delete("/v1/models/python:gone").status_code == 204, 30)
        again = http.post("/v1/completions", json=body)
        assert (again.status_code, again.json()["error"]["code"]) == (404, "model_not_found")


def test_a_name_that_was_freed_and_taken_again_answers_with_the_new_weights(
    talking: Talking,
) -> None:
    fingerprints = []
    name = "python:twice"
    with talking.http() as http:
        for sparsity in (0.2, 0.85):
            job = http.post(
                "/v1/compression/jobs",
                json={"model": "python", "request": {"sparsity": sparsity}, "suffix": "twice"},
            ).json()
            path = f"/v1/compression/jobs/{job['id']}"
            assert wait_until(lambda p=path: http.get(p).json()["status"] == "succeeded", 60)
            talking.folders[name] = Path(talking.config.data) / "variants" / "python" / "twice"
            talking._models.pop(name, None)
            answer = http.post(
                "/v1/completions",
                json={
                    "model": name, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0,
                    "return_token_ids": True,
                },
            ).json()  # fmt: skip
            talking.check(name, PROMPTS[0], answer["choices"][0]["token_ids"])
            fingerprints.append(answer["system_fingerprint"])
            assert wait_until(lambda: http.delete(f"/v1/models/{name}").status_code == 204, 30)
    assert fingerprints[0] != fingerprints[1]


def test_the_page_is_used_like_a_person_would(talking: Talking, tmp_path: Path) -> None:
    with open_page(f"{talking.url}/", tmp_path, width=1280, height=1150) as page:
        page.wait("document.querySelector('#kl').textContent !== '–'")
        before = page.evaluate("document.querySelector('#kl').textContent")
        page.press("#slider", "ArrowLeft", 60)
        page.wait(f"document.querySelector('#kl').textContent !== {before!r}")
        assert "between" in page.evaluate("document.querySelector('#kl-interval').textContent")
        assert page.evaluate("document.querySelectorAll('#strategy rect').length") == 8 * 7
        assert page.evaluate("document.querySelectorAll('#point circle').length") == 1
        for target, word in (("max_params", "M"), ("max_kl", "."), ("sparsity", "%")):
            page.click(f"input[value={target}] + span")
            page.wait(f"document.querySelector('#target-value').textContent.includes({word!r})")
        page.type_into("#suffix", "from-the-page")
        page.click("#make-button")
        page.wait("document.querySelector('#job-text').textContent.endsWith('succeeded')")
        page.wait("document.querySelector('#variant').value === 'python:from-the-page'")
        page.type_into("#prompt", 'def main(argv):\n    """')
        page.click("#talk-button")
        for place in ("dense", "pruned"):
            page.wait(f"document.querySelector('#{place}').dataset.state === 'done'", timeout_s=60)
        dense, pruned = (
            page.evaluate(f"document.querySelector('#{place}').textContent")
            for place in ("dense", "pruned")
        )
        assert dense.startswith("def main(argv):")
        assert dense != pruned
        page.evaluate("scrollTo(0, 0)")
        # UNICUCO_SCREENSHOT=docs/page.png renews the picture that is shown to readers.
        picture = Path(os.environ.get("UNICUCO_SCREENSHOT", tmp_path / "page.png"))
        page.screenshot(picture)
        assert picture.stat().st_size > 50_000  # an empty page takes a tenth
        assert page.problems == []
        assert all(url.startswith(talking.url) for url in page.requested)


def test_the_page_says_what_went_wrong_and_runs_no_script_of_others(
    talking: Talking, tmp_path: Path
) -> None:
    with talking.http() as http:
        answer = http.get("/")
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert http.get("/static/nothing").status_code == 404
        assert http.get("/static/..%2Fconfig.py").status_code == 404
    with open_page(f"{talking.url}/", tmp_path) as page:
        page.wait("document.querySelector('#suffix').value !== ''")
        page.type_into("#suffix", "v0")
        page.click("#make-button")
        page.wait("document.querySelector('#note').textContent.includes('v0')")
        injected = (
            "(() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
            " document.head.append(s); return window.bad; })()"
        )
        assert page.evaluate(injected) is None


def test_eight_variants_under_load_with_an_engine_killed_are_never_mixed(
    talking: Talking, engine_pids: list[int]
) -> None:
    draw = random.Random(3)
    answers: list[tuple[str, str, list[int]]] = []
    cut_off: list[str] = []

    async def client(http: httpx.AsyncClient) -> None:
        for _ in range(5):
            name = f"python:v{draw.randrange(NUM_VARIANTS)}"
            prompt = draw.choice(PROMPTS)
            body = {
                "model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0,
                "stream": True, "return_token_ids": True,
            }  # fmt: skip
            tokens: list[int] = []
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                last = ""
                async for line in answer.aiter_lines():
                    if not line:
                        continue
                    last = line.removeprefix("data: ")
                    if last == "[DONE]":
                        break
                    chunk = json.loads(last)
                    if "error" in chunk:
                        assert "died in the middle" in chunk["error"]["message"]
                        break
                    assert chunk["model"] == name
                    tokens += chunk["choices"][0]["token_ids"]
            (answers if last == "[DONE]" else cut_off).append((name, prompt, tokens))  # type: ignore[arg-type]

    async def killer() -> None:
        await asyncio.sleep(1.5)
        os.killpg(engine_pids[0], signal.SIGKILL)

    async def load() -> None:
        async with httpx.AsyncClient(base_url=talking.url, timeout=240) as http:
            await asyncio.gather(killer(), *(client(http) for _ in range(16)))

    asyncio.run(load())
    assert len(answers) + len(cut_off) == 16 * 5  # nothing accepted is lost
    assert len(cut_off) <= 8  # what ran on the engine that was killed
    for name, prompt, tokens in answers:
        talking.check(name, prompt, tokens)
    assert wait_until(lambda: talking.status()["queued"] == 0, 30)
