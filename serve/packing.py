"""Variants in their packed form: made once, when somebody first asks, and kept beside the variant.

Packing is work for processors, minutes of it for large models. So it is done by the deployment that
cuts (`Packer`), one variant at a time and stepping back for everything else, while the ingress
waits for it on behalf of all who want the same (`Packing`). A form appears by one rename; a file
lock sees to it that each is made once, whoever asks whichever replica, and a killed packer's lock
goes with it. What this module does not know: the container's layout, HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from serve.catalogue import Catalogue, ModelId, UnknownModelError
from serve.errors import overloaded
from serve.handles import Handle
from serve.priority import step_back
from unicuco.errors import StorageError, UnicucoError

_MOST_FORMS: Final = 3  # of one variant; the one made first goes first
_FASTEST: Final = 20  # as a power of two, in Mbit/s
_RETRY_AFTER_S: Final = 5

# An error as a value: it crosses processes.
Packed = Path | UnicucoError


def link_class(link_mbps: float) -> float:
    """Return the power of two that a link's speed is taken for, so that callers share forms.

    Args:
        link_mbps: megabits per second, > 0.
    """
    return 2.0 ** min(max(0, round(math.log2(link_mbps))), _FASTEST)


class Packing:
    """The ingress' side.

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


class Packer:
    """The side that works: one thread, which steps back for everything else.

    Args:
        catalogue: where variants are.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._pool = ThreadPoolExecutor(1, "unicuco-packing", initializer=step_back)

    async def pack(self, variant: ModelId, link_mbps: float | None) -> Packed:
        """Return the file of a variant's packed form, or why there is none."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._pack, variant, link_mbps)

    def close(self) -> None:
        """Begin nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pack(self, variant: ModelId, link_mbps: float | None) -> Packed:
        try:
            return make_form(self._catalogue, variant, link_mbps)
        except UnicucoError as error:
            if self._catalogue.has(variant):
                return error
            return UnknownModelError(f"{variant} was deleted while it was packed")


def make_form(catalogue: Catalogue, variant: ModelId, link_mbps: float | None) -> Path:
    """Make a variant's packed form if it is not there; it is there as a whole or not at all.

    Args:
        catalogue: where variants are.
        variant: that is there.
        link_mbps: megabits per second, > 0; none: the smallest form.

    Raises:
        UnknownModelError: the variant is not there.
        VariantError: it is damaged.
        StorageError: the disk refused.
    """
    place = catalogue.packed_form(variant, link_mbps)
    if place.is_file():
        return place
    from unicuco.pipeline import PackOptions, pack  # transformers, for those alone who need it

    with _alone_in(place.parent):
        if not place.is_file():
            folder = place.parent.parent
            for left in place.parent.glob(".*.tmp"):  # by a packer that was killed
                left.unlink(missing_ok=True)
            pack(PackOptions(model=str(folder), out=place, link_mbps=link_mbps))
            forms = sorted(place.parent.glob("*.pack"), key=lambda form: form.stat().st_mtime_ns)
            for form in forms[:-_MOST_FORMS]:
                form.unlink(missing_ok=True)
    return place


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and keep all others who ask here out of it, on any node."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StorageError(f"{folder} can't be made: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
