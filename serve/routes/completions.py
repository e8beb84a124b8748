"""Text from variants, in OpenAI's shapes: ``/v1/completions`` and ``/v1/chat/completions``."""

from fastapi import APIRouter

router = APIRouter(prefix="/v1", tags=["text"])
