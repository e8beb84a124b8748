#!/bin/sh
# Write constraints.txt anew from what is installed in .venv (after changing dependencies and trying them).
# Left out: torch's build suffix (+cpu), so that the file serves GPU machines too; the three packages that
# the set-up removes on CPU-only machines; this project itself.
set -eu
cd "$(dirname "$0")/.."
{
    echo "# Every version that was installed together and tested. Made by tools/freeze_constraints.sh."
    .venv/bin/python -m pip freeze --exclude-editable |
        grep -v -i -E '^(torchvision|torchaudio|torchcodec|unicuco)[ =]' |
        sed -E 's/^(torch==[^+]*)\+.*/\1/'
} >constraints.txt.new
mv constraints.txt.new constraints.txt
