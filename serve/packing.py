"""Variants in their packed form: the ingress' side, which waits for all who want the same.

What this module does not know: how forms are made (`serve.packer`), HTTP's headers.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from pathlib import Path
from typing import Final

from serve.catalogue import Catalogue, ModelId
from serve.errors import overloaded
from serve.handles import Handle
from serve.packer import Packed
from unicuco.errors import UnicucoError

_FASTEST: Final = 20  # as a power of two, in Mbit/s
_RETRY_AFTER_S: Final = 5


def link_class(link_mbps: float) -> float:
    """Return the power of two that a link's speed is taken for, so that callers share forms.

    Args:
        link_mbps: megabits per second, > 0.
    """
    return 2.0 ** min(max(0, round(math.log2(link_mbps))), _FASTEST)


class Packing:
    """Asks for forms.

    Args:
        handle: of the deployment that packs.
        catalogue: where variants are.
        max_waiting: forms that are waited for at once; who wants another one is refused.
    """

    def __init__(self, handle: Handle, catalogue: Catalogue, *, max_waiting: int) -> None:
        self._handle = handle
        self._catalogue = catalogue
        self._max_waiting = max_waiting
        self._tasks: dict[Path, asyncio.Task[Packed]] = {}

    async def form(self, variant: ModelId, link_mbps: float | None) -> Path:
        """Return the file of a variant's packed form, made if there is none yet.

        Args:
            variant: that is there.
            link_mbps: megabits per second of the caller's link, > 0; none: the smallest form.

        Raises:
            ApiError: too many others are waited for.
            UnknownModelError: the variant is not there, or was deleted meanwhile.
            UnicucoError: it can't be packed; one line.
        """
        link_mbps = None if link_mbps is None else link_class(link_mbps)
        place = await asyncio.to_thread(self._catalogue.packed_form, variant, link_mbps)
        if await asyncio.to_thread(place.is_file):
            return place
        if place not in self._tasks and len(self._tasks) >= self._max_waiting:
            raise overloaded("other variants are being packed", retry_after_s=_RETRY_AFTER_S)
        if place not in self._tasks:
            task = asyncio.create_task(self._made(variant, link_mbps))
            self._tasks[place] = task
            task.add_done_callback(partial(self._forget, place))
        # Whoever goes away leaves the work to those who stay, and to those who come later.
        packed = await asyncio.shield(self._tasks[place])
        if isinstance(packed, UnicucoError):
            raise packed
        return packed

    async def _made(self, variant: ModelId, link_mbps: float | None) -> Packed:
        packed: Packed = await self._handle.pack.remote(variant, link_mbps)
        return packed

    def _forget(self, place: Path, task: asyncio.Task[Packed]) -> None:
        del self._tasks[place]
        if not task.cancelled():
            task.exception()  # asked for here too: all who waited may have gone away
