#!/usr/bin/env bash
# Make .venv, install what is needed, run all tests.
# Arguments go to pytest: ./test.sh tests/test_model.py -k cache. With --gpu it also runs what needs a GPU, with --slow
# also the tests of many seconds.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "test.sh: error: $python is older than 3.11; name a newer one: PYTHON=python3.12 ./test.sh" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
if ! cmp -s requirements.txt .venv/requirements.installed; then
    # A module is compiled when it is first used. To compile all of torch's modules now takes ten seconds more.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
    cp requirements.txt .venv/requirements.installed
fi
unset PYTHONDONTWRITEBYTECODE  # the many processes that the tests start share what one of them compiled
# One test process for each core, each with one thread. A file's tests stay together, as they share what is
# slow to make.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n auto --dist loadfile "$@"
