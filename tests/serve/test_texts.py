from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from serve.openai import MessageBody
from serve.texts import ROLES, ChatMessage, Texts, plain_chat
from unicuco.errors import RequestError
from unicuco.models import load_tokenizer
from unicuco.testing.tiny import tiny_model_folder

TALK = (
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content=" hi "),
    ChatMessage(role="assistant", content="ho"),
    ChatMessage(role="user", content="and?"),
)


def test_a_model_without_a_template_gets_a_line_per_message(tiny_llama: Path) -> None:
    plain, stop = plain_chat(TALK)
    assert plain == "System: Be brief.\nUser: hi\nAssistant: ho\nUser: and?\nAssistant:"
    written = Texts(tiny_llama).write_chat(TALK)
    assert written.tokens == tuple(load_tokenizer(tiny_llama)(plain)["input_ids"])
    assert written.stop == stop == ("\nUser:",)


def test_a_models_own_template_is_used_and_may_refuse(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    tokenizer.save_pretrained(folder)
    texts = Texts(folder)
    written = texts.write_chat(TALK[1:2])
    assert written.tokens == tuple(tokenizer("<user> hi <assistant>")["input_ids"])
    assert written.stop == ()
    with pytest.raises(RequestError, match="no tools"):
        texts.write_chat((ChatMessage(role="tool", content="x"),))


def test_token_ids_must_be_the_models(tiny_llama: Path) -> None:
    texts = Texts(tiny_llama)
    assert texts.take((0, 5)).tokens == (0, 5)
    with pytest.raises(RequestError, match="token ids must lie in"):
        texts.take((texts.vocabulary_size,))


def test_every_role_of_a_message_has_a_name() -> None:
    assert set(get_args(MessageBody.model_fields["role"].annotation)) == set(ROLES)
