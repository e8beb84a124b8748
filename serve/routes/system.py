"""Whether the service lives and whether it can answer."""

from fastapi import APIRouter

router = APIRouter(tags=["system"])


@router.get("/health", summary="Whether the process lives; asks nothing of anybody")
async def health() -> dict[str, str]:
    """Answer at once."""
    return {"status": "ok"}
