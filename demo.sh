#!/bin/sh
# Makes .venv, installs, and tests the core claims of the paper on three toy worlds: after the install about
# eight minutes on two cores, with the first verdict after three.
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
[ -d .venv ] || "$PYTHON" -m venv .venv
. .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
python lab.py toy core --sizes 0.8m --seeds 3
