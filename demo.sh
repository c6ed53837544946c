#!/bin/sh
# Makes .venv, installs, and tests the core claims of the paper on three toy worlds: after the install about
# 9 to 13 minutes on two cores, depending on how fast they are, with the first verdict after 3 to 5. There is one
# size of models, so of the three claims that say "more so for larger models" this part cannot be told.
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
[ -d .venv ] || "$PYTHON" -m venv .venv
. .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
python lab.py toy core --sizes 0.8m --seeds 3
