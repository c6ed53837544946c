"""What the tests share: a cache folder of their own, small data, tiny models, and `run`, which runs a script.

A script runs in a process of its own, as from the command line. The process is forked from one that has
imported torch already, which takes a tenth of a second; starting Python anew takes three.
"""
import argparse
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode

from data.comparisons import load_comparisons, parse
from data.sources.count import Count
from data.tokenizer import get_tokenizer
from model import GPT, Config

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"  # published data sets; tests that need one are skipped without it
BYTES = get_tokenizer("bytes")

# ------------------------------------------------------------------------------------------------------------
# Running scripts

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([
    "torch", "torch._dynamo", "pytest", "safetensors.torch", "tiktoken", "tokenizers",
    "train_lm", "train_pm", "distill", "evaluate", "chat", "arena"])


def _script(name, flags, env, folder, before):
    """What the process of a script does. Its output goes into two files in `folder`."""
    os.environ.update(env)
    os.chdir(ROOT)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(ROOT / name), *flags]
    if before:
        before()
    runpy.run_path(sys.argv[0], run_name="__main__")


class Running:
    """A script under way.

    before: a function of a test module, which is called in the script's process before the script starts.
    env: variables of its environment.
    """

    def __init__(self, name, *flags, before=None, **env):
        self.args = [name, *map(str, flags)]
        self.folder = Path(tempfile.mkdtemp(dir=os.environ["HHH_LAB_CACHE"]))
        env = {"HHH_LAB_CACHE": os.environ["HHH_LAB_CACHE"], "OMP_NUM_THREADS": "1", **env}
        self.process = processes.Process(target=_script, args=(name, self.args[1:], env, self.folder, before))
        self.process.start()

    def output(self, stream="stdout"):
        path = self.folder / stream
        return path.read_text() if path.exists() else ""

    def wait_for(self, text, seconds=60):
        """Wait until `text` stands in the output."""
        end = time.time() + seconds
        while True:
            is_alive = self.process.is_alive()  # asked first, as the text may be the last that it prints
            if text in self.output():
                return
            if not is_alive or time.time() > end:
                pytest.fail(f"{text!r} is not in: {self.output()} {self.output('stderr')}")
            time.sleep(0.002)

    def result(self, seconds=120):
        """Wait for its end. Returns a CompletedProcess with args, returncode, stdout and stderr."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"{' '.join(self.args)} has not ended in {seconds} s: "
                        f"{self.output()} {self.output('stderr')}")
        return subprocess.CompletedProcess(
            self.args, self.process.exitcode, self.output(), self.output("stderr"))


def run(name, *flags, **settings):
    """Run a script to its end. Settings are those of Running; returns a CompletedProcess."""
    return Running(name, *flags, **settings).result()


def run_well(name, *flags, **settings):
    """Run a script that must succeed. Returns what it printed."""
    done = run(name, *flags, **settings)
    assert done.returncode == 0, done
    return done.stdout


def run_refused(name, *flags, exit_code=2, **settings):
    """Run a script that must end with one line on stderr and this exit code. Returns the line."""
    done = run(name, *flags, **settings)
    assert done.returncode == exit_code and done.stderr.count("\n") == 1, done
    return done.stderr


def strict_output():
    """`before` a script: print as where the locale is UTF-8. Without a locale, Python prints any name."""
    sys.stdout.reconfigure(errors="strict")


def run_ranks(name, *flags, n=2, before=None):
    """Run n processes that train together, as torchrun does. Returns what the first one printed."""
    done = [rank.result() for rank in start_ranks(name, *flags, before=[before] * n)]
    assert [d.returncode for d in done] == [0] * n, "\n".join(d.stderr for d in done)
    return done[0].stdout


def start_ranks(name, *flags, before):
    """Start a process for each of `before`, which is as for Running: together they train. Returns them. The
    store through which they find each other is ours, as it is torchrun's, and outlives them."""
    store, n = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), str(len(before))
    ranks = [Running(name, *flags, before=its_before, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=n,
                     LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                     TORCHELASTIC_USE_AGENT_STORE="True")
             for rank, its_before in enumerate(before)]
    ranks[0].store = store
    return ranks


def stop_in_one_line(name, *flags, before, exit_code=2, seconds=60):
    """Start ranks as `start_ranks` does. Those that are not killed must end with this exit code, and one of
    them with a line on stderr, the others with none. Returns the line."""
    done = [rank.result(seconds) for rank in start_ranks(name, *flags, before=before)]
    assert {d.returncode for d in done} <= {exit_code, -signal.SIGKILL}, done
    lines = "".join(d.stderr for d in done)
    assert lines.count("\n") == 1, lines
    return lines


def evaluate(benchmark, *flags):
    """(figures, all that was printed) of evaluate.py in fp32. The last line has the figures, without NaN."""
    printed = run_well("evaluate.py", benchmark, *flags, "--dtype", "fp32")
    return json.loads(printed.splitlines()[-1], parse_constant=pytest.fail), printed


# ------------------------------------------------------------------------------------------------------------
# Files


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(out, drop=("seconds",)):
    """The records of a run's metrics.jsonl, without what the clock decides."""
    return [{name: value for name, value in record.items() if name not in drop}
            for record in read_jsonl(Path(out) / "metrics.jsonl")]


def losses(out):
    """A run's training loss at each step."""
    return [record["loss"] for record in metrics(out) if "loss" in record]


def read_meta(out):
    """What a checkpoint remembers of its run."""
    return json.loads((Path(out) / "meta.json").read_text())


# ------------------------------------------------------------------------------------------------------------
# Small data, the same every time

SUBJECTS = ("the cat", "a dog", "my friend", "the miller", "an owl")
VERBS = ("sleeps", "waits", "sings")
PLACES = ("at home", "by the river", "up there")


def sentence(rng):
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(PLACES)}."


def make_texts(n=150, seed=0):
    rng = random.Random(seed)
    return [{"text": " ".join(sentence(rng) for _ in range(rng.randint(2, 12)))} for _ in range(n)]


def make_comparisons(n=60, seed=0):
    """Yield comparisons of 2 to 4 completions. The better one has more of what was asked for. A group has
    about two comparisons."""
    rng = random.Random(seed)
    for _ in range(n):
        subject = rng.choice(SUBJECTS)
        completions = []
        for n_good in rng.sample(range(4), rng.randint(2, 4)):
            good = [f"{subject} {rng.choice(VERBS)}"] * n_good
            other = [sentence(rng)] * (3 - n_good)
            completions.append(" " + " ".join(good + other))
        yield {"context": f"{sentence(rng)} Now tell of {subject}:", "completions": completions,
               "scores": [text.count(subject) for text in completions],
               "group": f"group {rng.randrange(n // 2)}"}


def rankable_comparisons(n):
    """n comparisons that have something to rank."""
    return [record for record in make_comparisons() if len(set(record["scores"])) > 1][:n]


def load(folder, records, name="file.jsonl"):
    """Comparisons in bytes, written to a file in `folder` and read from there."""
    return load_comparisons([write_jsonl(folder / name, records)], BYTES, quiet=True)


def convert(source, paths, *flags, max_bad=0.0):
    """(records, Count) of what a module of data/sources makes of raw files, with flags as data.prepare takes
    them."""
    parser = argparse.ArgumentParser()
    source.add_flags(parser)
    args = parser.parse_args([str(flag) for flag in flags])
    args.out = paths[0].parent / "out.jsonl"
    count = Count(max_bad)
    found = list(source.records(paths, args, count))
    for record in found:
        assert "text" in record or parse(record, "comparison")
    return found, count


# ------------------------------------------------------------------------------------------------------------
# Models and what they compute


def make_model(plain=False, **changes):
    """A tiny model in fp64. Its norms are not 1 and its weights are larger than fresh ones, so that nothing
    is equal just because it is near zero.

    plain: compute attention by its definition. changes: fields of the Config that are to differ.
    """
    fields = {"n_layer": 2, "d_model": 32, "n_head": 2, "vocab_size": 101, "ctx": 2048, **changes}
    model = GPT(Config(**fields)).init_weights(seed=1).double()
    model.dtype, model.plain = torch.float64, plain
    with torch.no_grad():
        for p in model.parameters():
            generator = torch.Generator().manual_seed(p.numel())
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def alone(model, tokenizer, context, completion):
    """(reward or None, log-probs of the completion's tokens and its <eoc>), by a forward pass of this one
    sequence."""
    before = tokenizer.encode(context) if context else [tokenizer.eot]
    ids = np.concatenate([before, tokenizer.encode(completion), [tokenizer.eoc]])
    ids = torch.from_numpy(ids.astype(np.int64))
    hidden = model(ids[None])[0]
    log_p = model.logits(hidden)[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    reward = model.rewards(hidden[-1]).item() if model.config.value_head else None
    return reward, log_p[len(before) - 1:].tolist()


class Operators(TorchDispatchMode):
    """Collects all that torch computes: `calls`, a list of (operator, tensors that go in, tensors that come
    out)."""

    # On a GPU each of these makes the program wait for the device, and so does an index of booleans.
    WAITING = {"aten.nonzero.default", "aten._local_scalar_dense.default", "aten.masked_select.default",
               "aten.repeat_interleave.Tensor", "aten.bincount.default", "aten.unique.default"}

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        self.calls.append((operator, tensors_in((args, kwargs)), tensors_in(result)))
        return result

    def waiting(self):
        """Names of the operators that a GPU would wait for."""
        return {str(operator) for operator, tensors, _ in self.calls if str(operator) in self.WAITING
                or str(operator) == "aten.index.Tensor" and any(x.dtype == torch.bool for x in tensors[1:])}

    def making_float64(self):
        """Names of the operators that make 64-bit floats."""
        return {str(operator) for operator, _, results in self.calls
                if any(x.dtype == torch.float64 for x in results)}


def tensors_in(nested):
    return [x for x in torch.utils._pytree.tree_leaves(nested) if isinstance(x, torch.Tensor)]


# ------------------------------------------------------------------------------------------------------------
# Fixtures: each is made once for all tests

LM_STEPS = ("--ctx", 192, "--batch", 768, "--steps", 10, "--held_out", 0.1, "--dtype", "fp32")
LM_FLAGS = ("--size", "test", "--tokenizer", "bytes", *LM_STEPS)  # of a fresh model
PM_FLAGS = ("--steps", 8, "--batch", 8, "--held_out", 0.3, "--dtype", "fp32", "--lr", 0.003)
# For runs that are equal to rounding only: Adam makes much of rounding, more so the larger its steps.
GENTLE_LM = (*LM_STEPS, "--lr", 3e-4, "--steps", 5)
GENTLE = (*PM_FLAGS, "--lr", 3e-4, "--steps", 5)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="also run tests/test_gpu.py, which needs a GPU")
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked as slow")
    parser.addoption("--fuzz", type=int, default=100, metavar="N",
                     help="mutations of each kind of file in tests/test_fuzz.py")


slow = pytest.mark.slow  # many seconds, for what others show in part: ./test.sh --slow runs them


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="./test.sh --slow runs it"))


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """Caches lie in a temporary folder. A test may set another."""
    os.environ["HHH_LAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", make_texts())


@pytest.fixture(scope="session")
def comparisons_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("comparisons") / "comparisons.jsonl", make_comparisons())


@pytest.fixture(scope="session")
def lm(text_file, tmp_path_factory):
    """A tiny language model's checkpoint."""
    out = tmp_path_factory.mktemp("lm") / "lm"
    run_well("train_lm.py", "--data", text_file, "--out", out, *LM_FLAGS)
    return out


@pytest.fixture(scope="session")
def pm(lm, comparisons_file, tmp_path_factory):
    """A tiny preference model's checkpoint, trained on part of the comparisons' groups."""
    out = tmp_path_factory.mktemp("pm") / "pm"
    run_well("train_pm.py", "--init", lm, "--data", comparisons_file, "--out", out, *PM_FLAGS)
    return out
