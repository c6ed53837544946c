"""The guided tour, docs/afternoon.md: its code prints what it says, and what it points at is there."""
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TOUR = (ROOT / "docs" / "afternoon.md").read_text()
DETAIL = re.compile(r"`([\w/]+\.py): (\w+)`")
BREAKS = re.findall(r"^\| `([\w/]+\.py)` \| `(.+?)` \| `(.+?)` \| `(tests/\w+\.py) -k (\w+)` \|$", TOUR, re.MULTILINE)


def printed(code, names):
    """What a block of code prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def test_the_code_prints_what_the_tour_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, compared = {}, 0
    for code, text in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", TOUR, re.DOTALL):
        assert printed(code, names) == text
        compared += bool(text)
    assert compared >= 7


def test_what_the_tour_points_at_is_there():
    places = DETAIL.findall(TOUR)
    assert len(places) >= 22
    for file, name in places:
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}: {name}"
    for link in re.findall(r"\]\(\.\./(.+?)\)", TOUR):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("file, before, after, tests, name", BREAKS, ids=[b[-1] for b in BREAKS])
def test_each_break_turns_its_test_red(tmp_path, file, before, after, tests, name):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "cache", "results", "docs", "__pycache__"))
    text = (copy / file).read_text()
    assert text.count(before) == 1
    (copy / file).write_text(text.replace(before, after))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", name]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]


def test_the_breaks_were_found():
    assert len(BREAKS) == 4
