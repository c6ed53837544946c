"""What only a GPU can show: ./test.sh --gpu tests/test_gpu.py. Elsewhere these tests are skipped, unless
HHH_GPU_TESTS=cpu is set: then they run on a CPU, which shows that the tests themselves are right."""
import copy
import os

import pytest
import torch
from conftest import GENTLE, losses, make_model, run_well

import trainer
from data.packing import Layout
from model import Cache, read

DEVICE = torch.device(os.environ.get("HHH_GPU_TESTS", "cuda"))
TOLERANCE = {torch.bfloat16: 6e-2, torch.float32: 1e-4}  # of the largest number


@pytest.fixture(autouse=True)
def only_where_asked(request):
    if DEVICE.type == "cuda" and not request.config.getoption("--gpu"):
        pytest.skip("./test.sh --gpu runs these tests, on a machine with a GPU")


ROWS = {  # for each comparison the tokens of its context and of its completions
    "one": [(40, [17])], "odd lengths": [(33, [1, 7]), (1, [65, 2, 19]), (130, [5, 255])],
    "64 completions": [(50, [3 + i % 5 for i in range(64)])], "a long context": [(1500, [100, 300])]}


def row_of(name):
    lengths, parents = [], []
    for context, completions in ROWS[name]:
        parents += [len(lengths)] * (1 + len(completions))
        lengths += [context, *completions]
    tokens = torch.randint(101, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return tokens, Layout(lengths, parents)


def model_pair(dtype, **changes):
    """A model that computes attention by its definition, on the CPU in fp32, and its copy under test. Flash
    attention wants heads whose width is a multiple of 8."""
    definition = make_model(plain=True, d_model=64, value_head=True, **changes).float()
    definition.dtype = torch.float32
    tested = copy.deepcopy(definition).to(DEVICE)
    tested.dtype, tested.plain = dtype, False
    return definition, tested


def assert_close(got, expected, dtype):
    error = (got.detach().float().cpu() - expected.detach()).abs().max()
    assert error < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [{}, {"n_head": 4, "n_key_head": 2, "d_head": 16}], ids=["", "fewer key heads"])
@pytest.mark.parametrize("only_ends", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_packed_rows_equal_the_definition(name, only_ends, heads, dtype):
    tokens, layout = row_of(name)
    results = []
    for model in model_pair(dtype, **heads):
        hidden = model(tokens.to(model.unembedding.device), layout, only_ends=only_ends)
        hidden = hidden if only_ends else hidden[layout.ends.to(hidden.device)]
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.device)
        parameters = [p for name, p in model.named_parameters() if name != "score.weight"]
        results.append((hidden, *torch.autograd.grad((hidden * weight).sum(), parameters)))
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_text_and_its_continuation_equal_the_definition(dtype):
    tokens = torch.randint(101, (3, 77), generator=torch.Generator().manual_seed(1))
    definition, tested = model_pair(dtype)
    with torch.no_grad():
        expected = definition(tokens)
        assert_close(tested(tokens.to(DEVICE)), expected, dtype)
        cache, pieces = Cache(77, n=3), []
        for piece in tokens.to(DEVICE).split([50, 1, 1, 25], 1):
            pieces.append(tested(piece, cache=cache))
    assert_close(torch.cat(pieces, 1), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ROWS)
def test_rows_behind_a_prompt_equal_the_definition(name, dtype):
    (tokens, layout), prompt = row_of(name), torch.arange(150) % 101
    results = []
    for model in model_pair(dtype):
        with torch.no_grad():
            prefix = read(model, prompt)[0].as_prefix()
            results.append(model(tokens.to(model.unembedding.device), layout, prefix))
    assert_close(results[1], results[0], dtype)


def test_a_step_never_waits_for_the_device():
    """From the row to the optimizer step nothing is fetched. Layouts make their tables in the first pass."""
    tokens, layout = row_of("odd lengths")
    model, tokens = model_pair(torch.bfloat16)[1], tokens.to(DEVICE)
    optimizer = trainer.make_optimizer(model, 1e-4, 0.1)
    for mode in ("default", "error"):
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            model.rewards(model(tokens, layout, only_ends=True)).sum().backward()
            trainer.scale_and_clip(optimizer, 1.0, 1.0)
            optimizer.step()
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flags", [(), ("--recompute",), ("--compile",)])
def test_training_is_that_of_a_cpu(lm, comparisons_file, tmp_path, flags):
    args = ("train_pm.py", "--init", lm, "--data", comparisons_file, *GENTLE, "--eval_every", 0)
    run_well(*args, "--device", "cpu", "--out", tmp_path / "cpu")
    run_well(*args, "--device", DEVICE.type, *flags, "--out", tmp_path / "gpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
