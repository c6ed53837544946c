"""What only a GPU can show: ./test.sh --gpu tests/test_gpu.py. Elsewhere these tests are skipped, unless
HHH_GPU_TESTS=cpu is set: then they run on a CPU, which shows that the tests themselves are right."""
import copy
import os

import pytest
import torch
import torch.distributed as dist
from conftest import GENTLE, evaluate, losses, make_model, run_well
from test_ranks import stop_after_three
from torch.nn.parallel import DistributedDataParallel

import trainer
from data.packing import Layout
from kv_cache import Cache, read
from ranks import Loss, Ranks, shard_model
from sampling import generate

DEVICE = torch.device(os.environ.get("HHH_GPU_TESTS", "cuda"))
TOLERANCE = {torch.bfloat16: 6e-2, torch.float32: 1e-4}  # of the largest number


@pytest.fixture(autouse=True)
def only_where_asked(request):
    if DEVICE.type == "cuda" and not request.config.getoption("--gpu"):
        pytest.skip("./test.sh --gpu runs these tests, on a machine with a GPU")


ROWS = {  # for each comparison the tokens of its context and of its completions
    "one": [(40, [17])], "no context": [(0, [1, 1]), (0, [9, 30])], "odd lengths": [(33, [1, 7]), (1, [65, 2, 19]), (130, [5, 255])],
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


def test_a_run_goes_on_where_it_was_stopped(lm, comparisons_file, tmp_path):
    """The same up to the order in which flash attention's backward pass adds."""
    args = ("train_pm.py", "--init", lm, "--data", comparisons_file, *GENTLE, "--device", DEVICE.type)
    run_well(*args, "--out", tmp_path / "whole")
    run_well(*args, "--out", tmp_path / "parts", before=stop_after_three)
    run_well(*args, "--out", tmp_path / "parts", "--resume")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_a_model_judges_as_on_a_cpu(pm, comparisons_file):
    flags = ("--model", pm, "--data", comparisons_file, "--device")
    expected, got = (evaluate("pm", *flags, name)[0] for name in ("cpu", DEVICE.type))
    assert got["accuracy"] == expected["accuracy"]


def test_the_likeliest_text_is_that_of_a_cpu():
    definition, tested = model_pair(torch.float32)
    prompts = [torch.arange(n) % 101 for n in (5, 40)]
    expected, got = ([generate(model, [p], 2, max_new=12, temperature=0) for p in prompts]
                     for model in (definition, tested))
    assert str(got) == str(expected)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone: NCCL's on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Ranks(0, 1, torch.device(DEVICE.type, 0) if DEVICE.type == "cuda" else DEVICE)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "FSDP"])
def test_gradients_by_a_process_group_of_one_are_the_same(one_rank, kind):
    if kind == "FSDP" and DEVICE.type == "cpu":
        pytest.skip("gloo cannot reduce and scatter among one")
    tokens, layout = row_of("odd lengths")
    tokens = tokens.to(DEVICE)

    def loss(model, batch):
        return model.rewards(model(batch, layout, only_ends=True)).sum(), 1, {}
    alone = model_pair(torch.bfloat16)[1]
    loss(alone, tokens)[0].backward()
    together = model_pair(torch.bfloat16)[1]
    compute = Loss(together, loss)
    if kind == "FSDP":
        shard_model(together, one_rank, shard=1)
    else:
        compute = DistributedDataParallel(compute)
    compute(tokens)[0].backward()
    del compute  # before its process group
    for p, expected in zip(together.parameters(), alone.parameters(), strict=True):
        got = p.grad.full_tensor() if kind == "FSDP" else p.grad
        assert_close(got, expected.grad.cpu(), torch.bfloat16)  # flash attention adds in any order
