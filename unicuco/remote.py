"""Folders at a URL, wherever fsspec reaches (s3://, gs://, https://, memory:// …): states, ranges.

Reading never lists: whoever reads knows the names, so a plain web server will do. Credentials come
from the environment or fsspec's own configuration, never from the URL, which is written into runs
and messages. What this module does not know: what the files mean.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from unicuco.errors import StorageError

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LOCAL: Final = ("file", "local")
# What stores call a state of a file, the surest first.
_VERSIONS: Final = (
    "ETag", "etag", "md5Hash", "Content-MD5", "generation", "version_id",
    "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created",
)  # fmt: skip
_CHUNK_BYTES: Final = 1 << 24
_ATTEMPTS: Final = 3
_PAUSE_S: Final = 0.5
_CALLS: Final = 8  # at a time
_ABSENT: Final = (403, 404)  # answers of web servers; 403 as below


def is_url(name: str) -> bool:
    """Say whether a name is a URL and no path."""
    return _URL.match(name) is not None


def local_path(name: str) -> Path | None:
    """Return the path that a name stands for, also as ``file://``; none: it lies elsewhere."""
    if not is_url(name):
        return Path(name)
    parts = urlsplit(name)
    return Path(unquote(parts.netloc + parts.path)) if parts.scheme in _LOCAL else None


def cache_folder(kind: str) -> Path:
    """Return the private folder for copies of a kind, made if missing.

    It lies in ``UNICUCO_CACHE``, or in the user's cache folder.

    Raises:
        StorageError: it can't be made.
    """
    given = os.environ.get("UNICUCO_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = (Path(given) if given else Path(user) / "unicuco") / kind
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(
            f"{folder} can't be made ({error.strerror}); set UNICUCO_CACHE to a folder with room"
        ) from error
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteState:
    """A file as its store describes it; ``version`` changes with its contents, empty: unknown."""

    num_bytes: int
    version: str


class RemoteFolder:
    """A folder at a URL. Pickles: other processes open their own connections.

    Args:
        url: of the folder.

    Raises:
        StorageError: the URL is of no known kind, carries credentials or a query, or the package
            that reads such URLs is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise StorageError(
                f"a {parts.scheme}:// URL must carry no credentials: they would be written into "
                "runs; give them by the environment or fsspec's configuration"
            )
        if parts.query or parts.fragment:
            raise StorageError(f"{self.url.partition('?')[0]}: give a folder's URL without a query")
        self._files, self._root = _opened(self.url)

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str]]:
        """Pickle as the URL alone."""
        return RemoteFolder, (self.url,)

    def states(self, names: Iterable[str]) -> dict[str, RemoteState]:
        """Return the states of those files that exist and may be read.

        Raises:
            StorageError: the store can't be reached or refuses.
        """
        asked = list(names)
        self._files.invalidate_cache()
        with ThreadPoolExecutor(_CALLS) as pool:
            found = pool.map(self._state, asked)
            return {name: state for name, state in zip(asked, found, strict=True) if state}

    def read_into(self, name: str, begin: int, target: memoryview, num_bytes: int) -> None:
        """Fill ``target`` with a file's bytes from ``begin`` on, by range requests.

        Args:
            name: of the file.
            begin: the first byte.
            target: writable bytes.
            num_bytes: of the whole file.

        Raises:
            StorageError: the store can't be reached, has no such file, or gives fewer bytes.
        """
        for start in range(0, len(target), _CHUNK_BYTES):
            part = target[start : start + _CHUNK_BYTES]
            self._read_range(name, begin + start, part, num_bytes)

    def read(self, name: str, state: RemoteState, limit_bytes: int) -> bytes:
        """Return a small file's contents.

        Raises:
            StorageError: it is larger than ``limit_bytes``, or can't be read.
        """
        if state.num_bytes > limit_bytes:
            raise StorageError(
                f"{self.url}/{name} has {state.num_bytes} bytes, more than such a file may have "
                f"({limit_bytes})"
            )
        data = bytearray(state.num_bytes)
        self.read_into(name, 0, memoryview(data), state.num_bytes)
        return bytes(data)

    def fetch(self, name: str, state: RemoteState, target: Path) -> None:
        """Write a file's contents into ``target``, some megabytes of them in memory at a time.

        Raises:
            StorageError: it can't be read.
            OSError: the disk refused.
        """
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, state.num_bytes)))
        with target.open("wb") as file:
            for begin in range(0, state.num_bytes, _CHUNK_BYTES):
                part = buffer[: min(_CHUNK_BYTES, state.num_bytes - begin)]
                self._read_range(name, begin, part, state.num_bytes)
                file.write(part)

    def put(self, name: str, source: Path) -> None:
        """Write a file, over what stands there.

        Raises:
            StorageError: the store can't be reached or refuses.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._files.put_file(str(source), self._path(name))
                return
            except (NotImplementedError, PermissionError) as error:
                raise self._refused(name, error, "written") from error
            except Exception as error:  # every store raises its own
                if attempt == _ATTEMPTS:
                    raise self._refused(name, error, "written") from error
                time.sleep(_PAUSE_S * attempt)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no matter.

        Raises:
            StorageError: the store can't be reached or refuses.
        """
        for name in names:
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                continue
            except Exception as error:  # every store raises its own
                raise self._refused(name, error, "removed") from error

    def check_writable(self, name: str) -> None:
        """Write an empty file under a name and remove it.

        Raises:
            StorageError: nothing can be written here.
        """
        with tempfile.NamedTemporaryFile() as empty:
            self.put(name, Path(empty.name))
        self.remove([name])

    def _state(self, name: str) -> RemoteState | None:
        try:
            info = self._files.info(self._path(name))
        except PermissionError:  # a store that may not be listed says so of what is not there
            return None
        except FileNotFoundError as error:
            # fsspec says so too where a web server refuses or can't be reached.
            cause = error.__cause__
            if cause is None or getattr(cause, "status", None) in _ABSENT:
                return None
            raise self._refused(name, cause) from error
        except Exception as error:  # every store raises its own
            raise self._refused(name, error) from error
        if info.get("type") == "directory":
            return None
        if info.get("size") is None:
            raise StorageError(f"{self.url}/{name}: the server does not tell its size")
        version = next((f"{word} {info[word]}" for word in _VERSIONS if info.get(word)), "")
        return RemoteState(num_bytes=int(info["size"]), version=version)

    def _read_range(self, name: str, begin: int, target: memoryview, num_bytes: int) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._files.open(
                    self._path(name), "rb", cache_type="none", size=num_bytes
                ) as file:
                    file.seek(begin)
                    data = file.read(len(target))
                if len(data) == len(target):
                    target[:] = data
                    return
                reason: Exception = EOFError(f"{len(data)} bytes came of {len(target)} at {begin}")
            except (FileNotFoundError, PermissionError, ValueError) as error:
                raise self._refused(name, error) from error
            except Exception as error:  # every store raises its own
                reason = error
            if attempt < _ATTEMPTS:
                time.sleep(_PAUSE_S * attempt)
        raise self._refused(name, reason) from reason

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _refused(self, name: str, error: BaseException, what: str = "read") -> StorageError:
        if isinstance(error, FileNotFoundError):
            return StorageError(f"there is no {self.url}/{name}")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = type(error).__name__
        return StorageError(
            f"{self.url}/{name} can't be {what}: {f'{kind}: {lines[0]}' if lines else kind}"
        )


# Any: fsspec has no types.
def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    # What is compressed on the way has another length than the file.
    plain = {"headers": {"Accept-Encoding": "identity"}} if url.startswith("http") else {}
    try:
        files, root = fsspec.url_to_fs(url, **plain)
    except ImportError as error:
        raise StorageError(f"{url}: {error}; pip install what reads such URLs") from error
    except Exception as error:  # an unknown protocol, a configuration that makes no sense
        raise StorageError(f"{url} can't be used: {' '.join(str(error).split())}") from error
    return files, str(root).rstrip("/")
