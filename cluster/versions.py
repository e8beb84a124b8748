"""`SameVersions`: a builder that refuses where other versions are installed than at the driver.

Numbers of different libraries are not those of one run. Ray itself compares Python and Ray when a
node or a driver joins. What this module does not know: what is built.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from unicuco.errors import ClusterError

_NAMES: Final = ("unicuco", "torch", "transformers", "gpytorch", "numpy")


def installed_versions() -> dict[str, str]:
    """Return the versions of what numbers depend on; without what is not installed.

    What follows a plus sign says which accelerator a build is for: nodes may differ in that.
    """
    found: dict[str, str] = {}
    for name in _NAMES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:  # this project, where a job brings its files along
            continue
    return found


@dataclass(frozen=True, slots=True)
class SameVersions:
    """Calls ``build`` where versions are those of where this object was made.

    Raises, when it is called:
        ClusterError: they are not; the line names the node and what differs.
    """

    # Any: whatever is built, of whatever it is built of.
    build: Callable[..., Any]
    versions: dict[str, str] = field(default_factory=installed_versions)

    # Any: as ``build``
    def __call__(self, *arguments: Any) -> Any:
        """Compare, then build."""
        own = installed_versions()
        other = [
            f"{name} {own[name]} and not {expected}"
            for name, expected in self.versions.items()
            if own.get(name, expected) != expected
        ]
        if other:
            raise ClusterError(
                f"node {platform.node()} has {', '.join(other)} as the driver has: install the same"
                " versions on every node"
            )
        return self.build(*arguments)
