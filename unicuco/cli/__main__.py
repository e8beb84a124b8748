"""Run the command line as ``python -m unicuco.cli``."""

from __future__ import annotations

import sys

from unicuco.cli.app import main

sys.exit(main())
