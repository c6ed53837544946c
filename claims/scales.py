"""The scales at which lab.py tests the paper's claims: the models, the data and the flags of a claim's runs.

  toy     the embedded world (data/toy/world.py), 0.1M and 0.8M parameters, on a CPU
  own     comparisons of one's own and a model to start from: the claims of Section 3, and pre-training
  small   published sets under --data, on a CPU in hours: 0.8M and 5M parameters, or a given model (--lm)
  gpu     the published sets whole, 13M to 810M parameters, on a GPU

published.py has the last two.

All arms of all claims learn at one rate. For small models it is the paper's for preference-model
pre-training, a tenth of the language model's: at a hundredth, the paper's rate for finetuning, a few hundred
steps teach them nothing.
"""
import copy
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import checkpoint
import plan
from claims.runs import ROOT, Run
from data import toy
from data.comparisons import hash64, parse
from data.errors import InputError
from data.files import content_key, read_records, write_file
from data.prompts import load_prompt
from data.toy import sources as toy_sources
from data.toy.world import build_world
from model import SIZES

# The rate at which all arms learn, as a part of the language model's: of small models, and of those with 100M
# parameters and more. Of 0.01, 0.03 and 0.1 the second was the best for a model of 135M, with both objectives
# (results/LOG.md).
SMALL_RATE, LARGE_RATE = 0.1, 0.03
NEVER = 10**6  # --eval_every: no evaluation before the end


def parameters(size, vocabulary=0):
    n_layer, d_model, _ = SIZES[size]
    return 12 * n_layer * d_model**2 + vocabulary * d_model


def size_label(size):
    """A size by the parameters of its blocks, such as 0.8M. A given model's size is such a label already."""
    return count_label(parameters(size)) if size in SIZES else size


def count_label(n):
    n /= 1e6
    return f"{n:.1f}M" if n < 10 else f"{n:.0f}M" if n < 1000 else f"{n / 1000:.3g}B"


def rate_of(n_blocks, d_model):
    """The rate at which models with so many parameters in their blocks learn, as a flag has it."""
    return f"{(SMALL_RATE if n_blocks < plan.SMALL else LARGE_RATE) * plan.lm_rate(d_model):.3g}"


class Scale:
    """The models and evaluations of a scale: a method for each kind returns the Run that makes it.

    An object stands for one model size and one seed; arm and by_size ask for a run at all of them.
    """
    flops, vocabulary, tokens = plan.CORE_FLOPS, 300, 300  # for estimates of time; tokens: in a comparison
    world = None  # the toy world of all seeds; None: each seed has its own
    pmp_flags = "--batch", 32  # of pre-training
    finetune_pairs = 500  # comparisons of a set that models learn from after pre-training
    pairs, pm_flags = None, ()  # of other trainings on a set: their comparisons, if not all; their flags
    max_new, default_seeds = 40, 3  # max_new: tokens of a sample
    ctx = 256  # tokens of the language model's context
    distillation = ("--sequences", 3072)
    given = None  # a language model to start from, in place of those that are trained here
    claims_tested, claims_left_out = (), ()  # those that are tested, if not all; those that cannot be

    def __init__(self, args):
        self.folder, self.sizes = Path(args.out).resolve() / "runs", args.sizes
        if args.lm:
            self.measure_given_model(args)
        self.pairs = args.pairs or self.pairs
        if self.pairs:
            self.comparisons, self.pm_flags = self.pairs, ("--pairs", self.pairs, *self.pm_flags)
        self.seeds, self.many_seeds = range(args.seeds), range(args.many_seeds)
        self.size, self.seed = self.sizes[-1], 0

    def measure_given_model(self, args):
        """Set what depends on --lm. Its size is the number of all its parameters, tables included, as such
        models' names have it."""
        self.given = Path(args.lm).resolve()
        model = checkpoint.load_lm(self.given, lazily=True)[0]
        n_blocks, self.n_given = model.n_params()
        self.ctx = min(model.config.ctx, model.config.window or model.config.ctx)
        self.sizes = args.sizes = [count_label(self.n_given)]
        self.given_rate = rate_of(n_blocks, model.config.d_model)

    def arm(self, make, names=None, size=None):
        """For each set the runs that make(scale, set) returns, one for each seed: {set: [run, …]}. The scale is
        at that seed and at `size`, by default the main size. Without names there is one set, called "", and
        the runs are those of make(scale)."""
        scales = [self.changed(size=size or self.size, seed=seed) for seed in self.seeds]
        if names is None:
            return {"": [make(one) for one in scales]}
        return {name: [make(one, name) for one in scales] for name in names}

    def changed(self, **attributes):
        """A copy of this scale with other attributes."""
        scale = copy.copy(self)
        vars(scale).update(attributes)
        return scale

    def by_size(self, make, names=None):
        return {size: self.arm(make, names, size) for size in self.sizes}

    def run(self, script, *flags, seconds):
        return Run(self.folder, script, *flags, seconds=seconds)

    def n_parameters(self):
        return self.n_given if self.given else parameters(self.size, self.vocabulary)

    def seconds(self, tokens, per_token=6):
        """An estimate: learning from a token takes 6 FLOPs a parameter, and reading it 2."""
        return 2 + per_token * self.n_parameters() * tokens / self.flops

    def file(self, name, records):
        """A data file of the lab's own."""
        path = self.folder.parent / "data" / name
        write_file(path, "".join(json.dumps(record) + "\n" for record in records))
        return path

    def kinds(self):
        """{group of a comparison: its kind of question}, where kinds are known."""
        return {}

    def has_contexts(self, name):
        """Whether the comparisons of a set have contexts. Those of ETHICS utilitarianism are two texts
        alone."""
        data = self.data(name)
        path = data.out if isinstance(data, Run) else data
        first = itertools.islice(read_records(path), 100)
        return any(parse(record, f"{path}:{number}")[0] for number, record in first)

    # ---- Models

    def rate(self):
        """The learning rate of all arms: a part of the language model's, which is train_lm.py's default."""
        return self.given_rate if self.given else rate_of(parameters(self.size), SIZES[self.size][1])

    def train_pm(self, init, *flags, held_out, comparisons):
        """A preference model, or an imitation, that sees about so many comparisons. A binarised one is
        evaluated at its end, as nothing else tells whether it has learned anything."""
        evaluations = NEVER if "--binarise" in flags else 0
        return self.run(
            "train_pm.py", "--init", init, "--seed", self.seed, "--lr", self.rate(), "--held_out", held_out,
            "--eval_every", evaluations, *flags, seconds=self.seconds(comparisons * self.tokens))

    def pm(self, name, *flags, init=None):
        """A preference model of a set."""
        return self.train_pm(init or self.lm(), "--data", self.data(name), *self.pm_flags, *flags,
                             held_out=self.held_out(name), comparisons=self.comparisons)

    def imitation(self, name):
        return self.pm(name, "--objective", "imitation")

    def pre_trained(self, *flags, sources=None, pmp_flags=None):
        """A preference model pre-trained for an epoch on public data (Section 4), by default on all sources
        and with the scale's flags: binarised, as in the paper, where models are large enough to learn
        that."""
        mix = {name: n for name, n in self.sources.items() if name in (sources or self.sources)}
        flags = (self.pmp_flags if pmp_flags is None else pmp_flags) + flags
        if all(mix.values()) and "--pairs" not in flags:
            flags += "--sizes", *mix.values()
        if "--lm_weight" not in flags:
            flags += "--lm_weight", 1
        return self.train_pm(self.lm(), "--data", *map(self.data, mix), *flags, held_out=0.05,
                             comparisons=2 * sum(n or 20_000 for n in mix.values()))

    def distilled(self):
        return self.run(
            "distill.py", "--init", self.lm(), "--seed", self.seed, *self.prompt, "--data", self.data("lm"),
            "--dialogue", self.data("dialogue"), *self.distillation, "--lr", self.rate(),
            "--eval_every", NEVER, seconds=self.seconds(self.distillation[1] * self.tokens * 2, 8))

    def prompt_text(self):
        return load_prompt(self.prompt[1])

    def finetuned_on(self, text):
        """The language model after thirty steps on one short text. The file repeats the text, so that
        windows of training also show its beginning."""
        copies = self.file(f"{content_key([], text)}.jsonl", [{"text": text}] * 64)
        return self.run(
            "train_lm.py", "--init", self.lm(), "--seed", self.seed, "--data", copies, "--ctx", 64,
            "--batch", 512, "--steps", 30, "--held_out", 0.02, "--lr", self.rate(), "--schedule", "linear",
            seconds=5)

    # ---- Evaluations

    def evaluate(self, benchmark, model, *flags, prompted=False, tokens=10**5, seconds=None):
        prompt = self.prompt if prompted else ()
        return self.run("evaluate.py", benchmark, "--model", model, *prompt, *flags,
                        seconds=seconds or self.seconds(tokens, 2))

    def accuracy(self, model, name, *flags, no_context=False):
        """A preference model, or an imitation, on the held-out comparisons of a set. no_context: also without
        their contexts, which tells how much of the accuracy needs them."""
        skip = () if no_context else ("--skip_no_context",)
        return self.evaluate("pm", model, "--data", self.data(name), "--split", "auto", *skip, *flags,
                             tokens=2 * self.n_tested * self.tokens)

    def transfer(self, name, init=None, *flags, n=None):
        """What is right after finetuning on n comparisons of a set, from a pre-trained model or the language
        model. A step has 8 comparisons: with the paper's 32, 500 comparisons make 16 steps, which teach
        nothing."""
        n = n or self.finetune_pairs
        tuned = self.train_pm(init or self.lm(), "--data", self.data(name), "--pairs", n, "--batch", 8,
                              *flags, held_out=self.held_out(name), comparisons=n)
        return self.accuracy(tuned, name)

    def sampling_seconds(self, contexts, n, max_new):
        """An estimate. For a small model each step of sampling takes 2 ms. For a larger one the tokens count,
        and a token takes four times as long as one of a long row."""
        steps = 0.002 * contexts * n**0.5 * max_new
        return max(steps, self.seconds(contexts * (n * max_new + self.tokens / 2), 8))

    def sampled(self, benchmark, model, contexts, *flags, n=1, prompted=False):
        """A benchmark that writes n texts for each context."""
        return self.evaluate(
            benchmark, model, *flags, "--n", n, "--max_new", self.max_new, "--seed", self.seed,
            prompted=prompted, seconds=self.sampling_seconds(contexts, n, self.max_new))

    def hhh(self, model, *flags, prompted=False):
        return self.evaluate("hhh", model, "--data", self.data("hhh"), *flags, prompted=prompted)

    def last_words(self, model, prompted=False):
        data = self.data("lambada")
        return self.evaluate("lambada", model, "--data", data, prompted=prompted, tokens=4e5)


@functools.cache
def make_worlds(seeds, with_sources):
    """Make the files of toy worlds side by side, as each takes some seconds."""
    code = "import sys\nfrom data.toy import sources, toy_folder\nseed = int(sys.argv[1])\ntoy_folder(seed)\n"
    if with_sources:
        code += "for name in sources.READERS:\n    sources.prepared(name, seed)"
    command = [sys.executable, "-c", code]
    for process in [subprocess.Popen([*command, str(seed)], cwd=ROOT, stdout=sys.stderr) for seed in seeds]:
        process.wait()


class Toy(Scale):
    """The embedded world: every set is one of its files. Each seed is a world of its own, with other facts,
    other pages and other comparisons, so that an interval over seeds is one over worlds. The worlds from 10
    on are for choosing settings, and the lab does not look at them."""
    default_sizes, default_seeds = ("test", "0.8m"), 6
    claims_left_out = "code-tax", "truthfulqa-needs-mutual-information"  # no programs; only stock phrases
    flops, vocabulary, tokens = 1.1e11, 1500, 60  # as measured with models this small
    ranked = targets = curve_sets = ("ranked",)
    binary = ("binary",)
    sources = {"stackexchange": 7000, "reddit": 1300, "wikipedia": 1700}  # in the paper's proportions
    comparisons, n_tested = 5600, 2400
    amounts, ks = (100, 500, 1500, 5000), (1, 2, 4, 8, 16)
    model_written = 3000, 2000  # contexts that an imitation continues; pairs of them for pre-training
    contexts, judged, chosen_for = "hhh", "ranked", "binary"

    @property
    def prompt(self):
        return "--prompt", f"toy:{self.seed}"

    def kinds(self):
        """As evaluations write groups; in all worlds the same."""
        questions = build_world(0).asked.values()
        return {f"{hash64(question.group):016x}": question.kind for kind in questions for question in kind}

    def lm(self):
        """Small steps and a rate that falls to 0 reach a lower loss than an epoch of larger steps, in three
        fifths of its tokens (results/LOG.md)."""
        return self.run(
            "train_lm.py", "--size", self.size, "--seed", self.seed, "--data", self.data("lm"),
            "--batch", 2048, "--steps", 1000, "--schedule", "linear", "--eval_every", NEVER,
            seconds=self.seconds(2e6))

    def data(self, name):
        seed = self.seed if self.world is None else self.world
        make_worlds(self.seeds, name in self.sources)
        if name in self.sources:
            return toy_sources.prepared(name, seed)
        return toy.toy_folder(seed) / f"{name}.jsonl"

    def held_out(self, name):
        return toy.HELD_OUT

    def candidates(self):
        return self.run(
            "-m data.prepare toy-answers", "--raw", f"toy:{self.seed}", "--model", self.imitation("binary"),
            "--n", max(self.ks), "--max_new", self.max_new, "--seed", self.seed, seconds=15)

    def toxicity_scorer(self):
        return "--scorer", self.pm("manners", "--objective", "binary")


class Own(Scale):
    """Comparisons of one's own, and a model to start from (--lm). For pmp-curve also public comparisons to
    pre-train on (--public)."""
    default_sizes = ()
    claims_tested = "ranked-beats-imitation", "calibration", "pmp-curve", "ensembles"
    ranked = targets = ("own",)
    amounts = (100, 500, 1500, 5000)

    def __init__(self, args):
        if not (args.data and args.lm):
            raise InputError("own needs --data FILE, your comparisons, and --lm MODEL, to start from")
        super().__init__(args)
        self.files = {"own": Path(args.data).resolve()}
        self.files |= {f"public {i}": Path(path).resolve() for i, path in enumerate(args.public)}
        self.sources = {name: None for name in self.files if name != "own"}
        n = sum(1 for _ in read_records(self.files["own"]))
        self.n_tested = round(self.held_out("own") * n)
        left = n - self.n_tested
        self.comparisons = self.pairs or left
        # Groups are held out whole, so it is not known yet how many comparisons are left to train on.
        self.amounts = [amount for amount in self.amounts if amount <= 0.8 * left]
        self.finetune_pairs = max([amount for amount in self.amounts[:-1] if amount <= 500], default=None)
        self.curve_sets = self.targets if self.finetune_pairs else ()

    def pre_trained(self):
        if not self.sources:
            raise InputError("it needs --public, comparisons to pre-train on")
        return super().pre_trained()

    def lm(self):
        return self.given

    def data(self, name):
        return self.files[name]

    def held_out(self, name):
        return 0.3
