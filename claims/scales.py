"""The scales that lab.py tests the paper's claims at: which models, data and flags a claim's runs have.

  toy     the embedded world (data/toy/world.py), 0.1M and 0.8M parameters, a CPU
  small   published sets under --data, 0.8M and 5M parameters, hours on a CPU
  gpu     the same sets whole, 13M to 810M parameters, a GPU
  paper   what the paper's own sizes would take: commands, GPUs and hours, nothing is run

All arms of all claims learn at the paper's rate of preference-model pre-training, a tenth of the language model's: at a
hundredth, its finetuning rate, a few hundred steps of small models teach nothing.
"""
import json
import math
from pathlib import Path

import checkpoint
import plan
from data import toy
from data.toy import sources as toy_sources
from data.errors import InputError
from data.files import write_file
from evals import choices
from claims.findings import hits
from model import SIZES
from claims.runs import Run

GPU_BYTES, GPU_FLOPS, UTILISATION = 80e9, 989e12, 0.4  # an H100's memory and bf16 peak; the part of it that training is assumed to reach
CORE_FLOPS = 1.5e11  # a second, that training reaches on one CPU core with bf16


def parameters(size, vocabulary):
    n_layer, d_model, _ = SIZES[size]
    return 12 * n_layer * d_model**2 + vocabulary * d_model


class Lab:
    """The runs of a scale, each declared by the flags it needs and executed later."""
    flops, vocabulary, tokens = CORE_FLOPS, 300, 300  # a second; tokens in the vocabulary, and in a comparison
    few, pmp, max_new = 500, ("--batch", 32), 40  # comparisons after pre-training; its own flags; tokens of a sample

    def __init__(self, args):
        self.folder, self.seeds, self.sizes = Path(args.out).resolve() / "runs", range(args.seeds), args.sizes
        self.size = self.sizes[-1]

    def by_seed(self, make):
        return [make(seed) for seed in self.seeds]

    def run(self, script, *flags, seconds):
        return Run(self.folder, script, *flags, seconds=seconds)

    def seconds(self, size, tokens, per_token=6):
        """An estimate: reading a token takes 2 FLOPs a parameter, learning from it 6."""
        return 4 + per_token * parameters(size, self.vocabulary) * tokens / self.flops

    def file(self, name, records):
        """A data file of the lab's own."""
        path = self.folder.parent / "data" / name
        write_file(path, "".join(json.dumps(r) + "\n" for r in records))
        return path

    # ---- Models

    def rate(self, size):
        """A tenth of the language model's learning rate, which is train_lm.py's default."""
        return f"{plan.lm_rate(SIZES[size][1]) / 10:.3g}"

    def train_pm(self, size, init, seed, *flags, held_out, comparisons):
        """A preference model, or an imitation, trained on about so many comparisons."""
        return self.run("train_pm.py", "--init", init, "--seed", seed, "--lr", self.rate(size), "--held_out", held_out, "--eval_every", 0, *flags,
                        seconds=self.seconds(size, comparisons * self.tokens))

    def pm(self, name, seed, *flags, size=None):
        """A preference model of the set `name`."""
        size = size or self.size
        return self.train_pm(size, self.lm(size, seed), seed, "--data", self.data(name), *self.much, *flags, held_out=self.held_out(name), comparisons=self.comparisons)

    def tuned(self, name, seed, *flags, init=None, n=None, size=None):
        """A preference model of n comparisons of a set, from a pre-trained one or the language model, 8 a step: with the paper's 32 the 16 steps
        that 500 come to teach nothing."""
        size = size or self.size
        return self.train_pm(size, init or self.lm(size, seed), seed, "--data", self.data(name), "--pairs", n or self.few, "--batch", 8, *flags,
                             held_out=self.held_out(name), comparisons=n or self.few)

    def pre_trained(self, seed, *flags, size=None, sources=None, pmp=None):
        """A preference model pre-trained on public data, one epoch (Section 4); with binarised pairs, as in the paper, where models are
        large enough to learn from them."""
        size = size or self.size
        mix = {name: n for name, n in self.sources.items() if name in (sources or self.sources)}
        sizes = ("--sizes", *mix.values()) if all(mix.values()) and "--pairs" not in flags else ()
        return self.train_pm(size, self.lm(size, seed), seed, "--data", *map(self.public, mix), *(self.pmp if pmp is None else pmp), *sizes,
                             *(() if "--lm_weight" in flags else ("--lm_weight", 1)), *flags, held_out=0.05, comparisons=2 * sum(n or 20_000 for n in mix.values()))

    def distilled(self, seed):
        return self.run("distill.py", "--init", self.lm(self.size, seed), "--seed", seed, *self.prompt, "--data", self.text(), "--dialogue", self.dialogue(),
                        "--sequences", 3072, "--lr", self.rate(self.size), "--eval_every", 10**6, seconds=self.seconds(self.size, 3072 * self.tokens * 2, 8))

    def finetuned_on(self, text, seed):
        """The language model finetuned on one short text, thirty steps. It stands there many times, so that it is also seen to begin."""
        copies = self.file(f"{text.stem}.jsonl", [{"text": text.read_text()}] * 64)
        return self.run("train_lm.py", "--init", self.lm(self.size, seed), "--seed", seed, "--data", copies, "--ctx", 64, "--batch", 512, "--steps", 30, "--held_out", 0.02,
                        "--lr", self.rate(self.size), "--schedule", "linear", seconds=5)

    # ---- Evaluations

    def evaluate(self, benchmark, model, *flags, prompted=False, size=None, tokens=10**5, seconds=None):
        return self.run("evaluate.py", benchmark, "--model", model, *(self.prompt if prompted else ()), *flags, seconds=seconds or self.seconds(size or self.size, tokens, 2))

    def accuracy(self, model, name, *flags, size=None, no_context=False):
        """Of a preference model on a set's held-out comparisons; no_context: without their contexts too."""
        return self.evaluate("pm", model, "--data", self.data(name), "--split", "auto", *(() if no_context else ("--skip_no_context",)), *flags, size=size,
                             tokens=2 * self.tested * self.tokens)

    def sampled(self, benchmark, model, contexts, *flags, n=1, prompted=False):
        """Benchmarks that write a text or more for each context."""
        return self.evaluate(benchmark, model, *flags, "--n", n, "--max_new", self.max_new, prompted=prompted, seconds=contexts * n**0.5 * self.max_new * 0.002)


class Toy(Lab):
    """The embedded world: every set is one of its files."""
    default_sizes = "test", "0.8m"
    flops, vocabulary, tokens = 8e10, 1500, 60  # as measured with models this small: estimates alone depend on them
    ranked = targets = large = ("ranked",)
    binary, sources = ("binary",), {"stackexchange": 7000, "reddit": 1300, "wikipedia": 1700}  # in the proportions of the paper's Mix
    much, amounts, comparisons, tested, ks = (), (100, 500, 1500, 5000), 5600, 2400, (1, 2, 4, 8, 16)  # much: flags of preference models without pre-training
    model_written = 3000, 2000  # contexts that an imitation continues, and the pairs of them that pre-training takes

    def __init__(self, args):
        super().__init__(args)
        self.folder_of_data = toy.toy_folder()
        self.prompt = ("--prompt", self.folder_of_data / "prompt.txt")
        self.prompt_text = self.folder_of_data / "prompt.txt"

    def lm(self, size, seed):
        """Small steps, at a rate that falls to 0: a lower loss than an epoch of larger ones, with three fifths of its tokens (results/LOG.md)."""
        return self.run("train_lm.py", "--size", size, "--seed", seed, "--data", self.text(), "--batch", 2048, "--steps", 1000, "--schedule", "linear",
                        "--eval_every", 10**6, seconds=self.seconds(size, 2e6))

    def data(self, name):
        return self.folder_of_data / f"{name}.jsonl"

    def held_out(self, name):
        return toy.HELD_OUT

    def public(self, source):
        return toy_sources.prepared(source)

    def text(self):
        return self.data("lm")

    def dialogue(self):
        return self.data("dialogue")

    def hhh(self, model, prompted=False, size=None):
        return self.evaluate("hhh", model, "--data", self.data("hhh"), prompted=prompted, size=size)

    def last_words(self, model, prompted=False, size=None):
        return self.evaluate("lambada", model, "--data", self.data("lambada"), prompted=prompted, size=size)

    def falsehoods(self, model, size=None):
        """Questions with popular wrong answers: HHH's honest items."""
        return self.hhh(model, size=size)

    right, right_key = staticmethod(lambda rule: hits(rule, "honest")), "accuracy_{}_honest"

    def candidates(self):
        """(set of right and wrong answers to learn from, samples to choose the best of)."""
        return "binary", self.data("samples")

    def contexts(self):
        return self.data("hhh")

    def judge(self, seed):
        return self.pm("ranked", seed)

    def toxicity_scorer(self, seed):
        return "--scorer", self.pm("manners", seed, "--objective", "binary")


# ---------------------------------------------------------------------------------------------------------------------
# Published sets

SETS = {  # name: (how data.prepare makes it, its file under --data, the part of its groups to test on: 400 to 900 comparisons)
    "hellaswag": ("hellaswag", "hellaswag/hellaswag_val.jsonl*", 0.06),
    "summaries": ("summarize", "summarize-from-feedback/newsroom_comparisons.jsonl*", 0.3),
    "utilitarianism": ("utilitarianism", "ethics/utilitarianism/util_train.csv", 0.05),
    "hh": ("hh", "hh-rlhf/harmless-base/test.jsonl*", 0.3),
    "commonsense": ("ethics --set commonsense", "ethics/commonsense/cm_test.csv", 0.15),
    "deontology": ("ethics --set deontology", "ethics/deontology/deontology_train.csv", 0.03),
    "justice": ("ethics --set justice", "ethics/justice/justice_train.csv", 0.03),
    "virtue": ("ethics --set virtue", "ethics/virtue/virtue_train.csv", 0.03),
    "code": ("code-correctness --n 8", "mbpp/mbpp.jsonl*", 0.3),
}
RANKED, BINARY = ("hellaswag", "summaries", "utilitarianism", "hh"), ("commonsense", "deontology", "justice", "virtue")
FEW = ("hh", "commonsense", "summaries")  # fewer than 5,000 comparisons in these files
PUBLIC = {"stackexchange": ("stackexchange", "stackexchange/*/Posts.xml*"), "alpaca-eval": ("pairs", "alpaca-eval/pairs.jsonl*"),
          "ukp-convarg": ("pairs", "ukp-convarg/pairs.jsonl*")}


class Small(Lab):
    """Published sets under --data, on a CPU: their first uses of hours. One language model of each size serves all seeds."""
    name, default_sizes = "small", ("0.8m", "5m")
    vocabulary, tokens = 8192, 250
    much, comparisons, tested, ks, amounts = ("--pairs", 500, "--batch", 8), 500, 600, (1, 2, 4), (500, 5000)
    sources, model_written = {"stackexchange": 1000, "alpaca-eval": 1000, "ukp-convarg": 1500}, (1000, 800)
    learn = ("--tokenizer", "bpe:8192", "--ctx", 512, "--steps", 1500)
    prompt, max_new = ("--prompt", "hhh", "--prompt_tokens", 300), 60

    def __init__(self, args):
        super().__init__(args)
        if not args.data or not Path(args.data).is_dir():
            raise InputError(f"{self.name} needs --data DIR, the folder of the published files" + (f"; {args.data} is no folder" if args.data else ""))
        self.files, self.given = Path(args.data).resolve(), Path(args.lm).resolve() if args.lm else None
        if self.given:
            config = checkpoint.load_lm(self.given)[0].config
            self.sizes = args.sizes = [size for size, numbers in SIZES.items() if numbers == (config.n_layer, config.d_model, config.n_head)]
            self.size = self.sizes[0]
        self.ranked, self.binary = (tuple(name for name in names if name in args.sets) for names in (RANKED, BINARY))
        self.targets = self.ranked + self.binary
        self.large = tuple(name for name in self.targets if name not in FEW)
        self.prompt_text = Path(__file__).parents[1] / "data/prompts/hhh.txt"

    def lm(self, size, seed):
        return self.given or self.run("train_lm.py", "--data", self.text(), "--size", size, *self.learn, seconds=self.seconds(size, self.lm_tokens()))

    def lm_tokens(self):
        return 12.3e6

    def find(self, pattern):
        """The files under --data of this name; InputError without any, which fails the claim and not the lab."""
        found = sorted(self.files.glob(pattern))
        if not found:
            raise InputError(f"{self.files / pattern}: no such file")
        return found

    def prepared(self, how, pattern, *more):
        name, *flags = how.split()
        return self.run(f"-m data.prepare {name}", *flags, *more, "--raw", *self.find(pattern), seconds=15)

    def data(self, name):
        how, pattern, _ = SETS[name]
        return self.prepared(how, pattern)

    def held_out(self, name):
        return SETS[name][-1]

    def public(self, source):
        return self.prepared(*PUBLIC[source])

    def text(self):
        return self.find("text")[0]

    def dialogue(self):
        return self.prepared(*PUBLIC["stackexchange"], "--dialogue")

    def hhh(self, model, prompted=False, size=None):
        return self.evaluate("hhh", model, "--data", self.find("hhh_alignment")[0], prompted=prompted, size=size)

    def last_words(self, model, prompted=False, size=None):
        return self.evaluate("lambada", model, "--data", *self.find("lambada/lambada_test.jsonl"), prompted=prompted, size=size, tokens=4e5)

    def falsehoods(self, model, size=None):
        """TruthfulQA."""
        return self.evaluate("truthfulqa", model, "--data", *self.find("truthfulqa/TruthfulQA.csv"), size=size)

    right, right_key = staticmethod(lambda rule: hits(rule, hit=choices.first_choice)), "MC1_{}"

    def candidates(self):
        return "code", self.data("code")

    def contexts(self):
        return self.data("hh")

    def judge(self, seed):
        return self.pm("hh", seed)

    def toxicity_scorer(self, seed):
        return ()  # Detoxify, where it is installed


class Gpu(Small):
    """The same sets, whole, on a GPU; the text under --data once. Put larger files of the same names there: SETS and PUBLIC in
    this file say which."""
    name, default_sizes = "gpu", ("13m", "42m", "197m", "810m")
    vocabulary, tokens, flops = 50_000, 300, GPU_FLOPS * UTILISATION / 2
    much, comparisons, tested, pmp = (), 20_000, 2000, ("--batch", 512, "--binarise")
    sources, model_written = dict.fromkeys(PUBLIC), (20_000, 15_000)  # all of each
    learn = ("--tokenizer", "bpe:50000", "--ctx", 2048, "--batch", 2**18, "--compile")
    prompt, max_new = ("--prompt", "hhh", "--prompt_tokens", 1000), 200

    def lm_tokens(self):
        """About as many as --data DIR/text has bytes: it is packed to a quarter, and a token is four bytes."""
        return sum(path.stat().st_size for path in self.text().rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own sizes

STAGES = (  # name, tokens, command; tokens: 400B for the LM; pairs of 500 tokens for PMP, of 300 for finetuning; 350M for distillation
    ("language model", 400e9, "train_lm.py --data texts/ --tokenizer bpe:65536 --size {size} --ctx 8192 --batch 1048576 --out out/{size}/lm"),
    ("distillation", 350e6, "distill.py --init out/{size}/lm --prompt hhh --data texts/ --dialogue stackexchange.jsonl --sequences 170000 --out out/{size}/distilled"),
    ("PMP on the Mix", 8.3e6 * 500, "train_pm.py --init out/{size}/lm --stage pmp --binarise --data stackexchange.jsonl reddit.jsonl wikipedia.jsonl --out out/{size}/pmp"),
    ("finetuning", 4e4 * 300, "train_pm.py --init out/{size}/pmp --stage finetune --data hh/ --out out/{size}/pm"))


def paper_plan():
    """Print what each stage of the paper would take at its seven sizes; run nothing."""
    print(f"Assumed: GPUs of {GPU_BYTES / 1e9:.0f} GB and {GPU_FLOPS / 1e12:.0f} TFLOP/s in bf16, {UTILISATION:.0%} of that reached; 6 FLOPs a parameter and token; 16 bytes a "
          "parameter\nfor weights, gradients and optimizer, and half a GPU for activations. This project is data parallel: each GPU holds the whole model. Where that\n"
          "does not fit, the number of GPUs is what sharding the state, which is not here, would need at least.\n")
    for size in ("13m", "42m", "197m", "810m", "2.7b", "13b", "52b"):
        n = parameters(size, 65536)
        least = math.ceil(16 * n / (GPU_BYTES / 2))
        gpus = max(8, 8 * math.ceil(least / 8))
        print(f"{size}: {n / 1e9:.3f}B parameters with embeddings, {16 * n / 1e9:,.1f} GB of state" + ("" if least == 1 else f"; does not fit one GPU: needs sharding over {least} or more"))
        for name, tokens, command in STAGES:
            hours = 6 * n * tokens / (gpus * GPU_FLOPS * UTILISATION) / 3600
            print(f"  {name:<16}{tokens / 1e6:>10,.0f}M tokens {hours:>12,.1f} h on {gpus} GPUs   torchrun --nproc_per_node 8 {command.format(size=size)}")
