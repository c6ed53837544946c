"""The scales of published sets: small, on a CPU in hours, and gpu, the same sets whole."""
from pathlib import Path

import plan
from claims.scales import Scale
from data.errors import InputError

FILES = {  # name: (what data.prepare makes of it, or None; the file or folder under --data)
    "lm": (None, "text"), "hhh": (None, "hhh_alignment"), "lambada": (None, "lambada/lambada_test.jsonl*"),
    "truthfulqa": (None, "truthfulqa/TruthfulQA.csv*"), "mbpp": (None, "mbpp/mbpp.jsonl*"),
    "code": ("code-correctness --n 8", "mbpp/mbpp.jsonl*"),
    "hellaswag": ("hellaswag", "hellaswag/hellaswag_val.jsonl*"),
    "summaries": ("summarize", "summarize-from-feedback/newsroom_comparisons.jsonl*"),
    "utilitarianism": ("utilitarianism", "ethics/utilitarianism/util_train.csv*"),
    "hh": ("hh", "hh-rlhf/harmless-base/test.jsonl*"),
    "commonsense": ("ethics --set commonsense", "ethics/commonsense/cm_test.csv*"),
    "deontology": ("ethics --set deontology", "ethics/deontology/deontology_train.csv*"),
    "justice": ("ethics --set justice", "ethics/justice/justice_train.csv*"),
    "virtue": ("ethics --set virtue", "ethics/virtue/virtue_train.csv*"),
    "stackexchange": ("stackexchange", "stackexchange/*/Posts.xml*"),
    "dialogue": ("stackexchange --dialogue", "stackexchange/*/Posts.xml*"),
    "alpaca-eval": ("pairs", "alpaca-eval/pairs.jsonl*"),
    "ukp-convarg": ("pairs", "ukp-convarg/pairs.jsonl*")}
RANKED = ("hellaswag", "summaries", "utilitarianism", "hh")
BINARY = ("commonsense", "deontology", "justice", "virtue")
FEW = ("hh", "commonsense", "summaries")  # sets with fewer than 5,000 comparisons in these files
HELD_OUT = {  # the part of the groups to test on, 400 to 900 comparisons; of other sets 0.3
    "hellaswag": 0.06, "utilitarianism": 0.05, "commonsense": 0.15, "deontology": 0.03, "justice": 0.03,
    "virtue": 0.03}


class Small(Scale):
    """Published sets under --data, on a CPU: what can be done in hours. One language model of each size
    serves all seeds; --lm gives one that was trained elsewhere in their place."""
    name, default_sizes, claims_left_out = "small", ("0.8m", "5m"), ("synthetic-transfer",)
    vocabulary, tokens = 8192, 250
    pairs, n_tested, pm_flags = 500, 600, ("--batch", 8)
    amounts, ks = (100, 500, 5000), (1, 2, 4)
    sources, model_written = {"stackexchange": 1000, "alpaca-eval": 1000, "ukp-convarg": 1500}, (1000, 800)
    contexts, judged, chosen_for = "hh", "hh", "code"
    ctx, lm_tokens = 512, 12.3e6
    lm_flags = "--tokenizer", "bpe:8192", "--ctx", ctx, "--steps", 1500
    prompt, max_new = ("--prompt", "hhh", "--prompt_tokens", 300), 60

    def __init__(self, args):
        super().__init__(args)
        if not args.data or not Path(args.data).is_dir():
            why = f"; {args.data} is no folder" if args.data else ""
            raise InputError(f"{self.name} needs --data DIR, the folder of the published files{why}")
        self.files = Path(args.data).resolve()
        if self.given:  # it can read a longer prompt, and takes longer
            self.prompt = "--prompt", "hhh", "--prompt_tokens", 1500
            self.distillation = "--sequences", 512, "--ctx", 256
        self.ranked = tuple(name for name in RANKED if name in args.sets)
        self.binary = tuple(name for name in BINARY if name in args.sets)
        self.targets = self.ranked + self.binary
        self.curve_sets = tuple(name for name in self.targets if name not in FEW)

    def lm(self):
        return self.given or self.run("train_lm.py", "--data", self.data("lm"), "--size", self.size,
                                      *self.lm_flags, seconds=self.seconds(self.lm_tokens))

    def data(self, name):
        """The file of this name, as it is published or as data.prepare makes it. InputError where it is not
        under --data, which fails the claim and not the lab."""
        source, pattern = FILES[name]
        found = sorted(self.files.glob(pattern))
        if not found:
            raise InputError(f"{self.files / pattern}: no such file")
        if not source:
            return found[0]
        reader, *flags = source.split()
        return self.run(f"-m data.prepare {reader}", *flags, "--raw", *found, seconds=15)

    def held_out(self, name):
        return HELD_OUT.get(name, 0.3)

    def candidates(self):
        return self.data("code")

    def toxicity_scorer(self):
        return "--scorer", "hatesonar"  # its weights come with its package


class Gpu(Small):
    """The same sets, whole, on a GPU, and the text under --data once. Larger files may take their places:
    FILES has the names."""
    name, default_sizes = "gpu", ("13m", "42m", "197m", "810m")
    vocabulary, tokens, flops = 50_000, 300, plan.GPU_FLOPS * plan.UTILISATION / 2
    pairs, comparisons, n_tested, pm_flags = None, 20_000, 2000, ()
    pmp_flags = "--batch", 512, "--binarise"
    sources, model_written = {name: None for name in Small.sources}, (20_000, 15_000)  # all of each
    ctx = 2048
    lm_flags = "--tokenizer", "bpe:50000", "--ctx", ctx, "--batch", 2**18, "--compile"
    prompt, max_new = ("--prompt", "hhh", "--prompt_tokens", 1000), 200

    @property
    def lm_tokens(self):
        """About as many as DIR/text has bytes: it is packed to a quarter, and a token is four bytes."""
        return sum(path.stat().st_size for path in self.data("lm").rglob("*") if path.is_file())
