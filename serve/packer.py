"""Makes variants' packed forms, each once, and keeps them beside the variant.

Packing is work for processors, minutes of it for large models, so the deployment that cuts does it,
one variant at a time and stepping back for everything else. A form appears by one rename; a file
lock sees to it that each is made once, whoever asks whichever replica, and a killed packer's lock
goes with it. What this module does not know: the container's layout, HTTP (and a replica that cuts
starts sooner without).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from serve.catalogue import Catalogue, ModelId, UnknownModelError
from serve.priority import step_back
from unicuco.errors import UnicucoError
from unicuco.files import alone_in

_MOST_FORMS: Final = 3  # of one variant; the one made first goes first

# An error as a value: it crosses processes.
Packed = Path | UnicucoError


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

    with alone_in(place.parent):
        if not place.is_file():
            folder = place.parent.parent
            for left in place.parent.glob(".*.tmp"):  # by a packer that was killed
                left.unlink(missing_ok=True)
            pack(PackOptions(model=str(folder), out=place, link_mbps=link_mbps))
            forms = sorted(place.parent.glob("*.pack"), key=lambda form: form.stat().st_mtime_ns)
            for form in forms[:-_MOST_FORMS]:
                form.unlink(missing_ok=True)
    return place
