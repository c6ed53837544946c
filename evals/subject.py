"""The model under test: a checkpoint, behind a prompt if one is given; its scores and its samples."""
import argparse
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import plan
from data.errors import InputError
from data.files import file_digest
from data.packing import RowFormat
from data.prompts import NAMES, STOPS, fit_prompt, load_prompt
from data.tokenizer import Tokenizer
from evals import pm
from kv_cache import Cache, read
from model import GPT
from ranks import pick_dtype, start
from sampling import TextSample, stream


@dataclass
class Subject:
    name: str
    model: GPT
    tokenizer: Tokenizer
    meta: dict  # what the checkpoint tells about its training
    prompt: str  # its text, "" for none
    prefix: Cache  # its keys and values, computed once for all that is read behind it
    micro_tokens: int  # tokens in a micro-batch

    @property
    def is_pm(self):
        return self.meta["kind"] == "pm"

    @property
    def ctx(self):
        """Tokens that the prompt leaves for a context and a completion."""
        return self.model.config.ctx - self.prefix.prefix_tokens

    @property
    def device(self):
        return self.model.unembedding.device

    def held_out_part(self, path):
        """The part of a file's groups that no training of this model has seen; None for a file that none has
        seen at all."""
        digest = file_digest(path).hex()
        parts = [entry["held_out"] for entry in self.meta["trained_on"] if entry["digest"] == digest]
        return min(parts, default=None)

    def trained_with(self, files):
        """{key of the files that were read together} for each training on one of these files."""
        digests = {file_digest(path).hex() for path in files}
        return {entry.get("data", self.meta["data"]) for entry in self.meta["trained_on"]
                if entry["digest"] in digests}

    def unseen(self, data, files, split):
        """Which comparisons to evaluate on, (C,) bool; what is taken of each file is printed.

        split: "auto" takes the held-out groups of files that the model was trained on and all groups of
        others, "held_out" and "all" insist on one of the two. Raises InputError if a file has no such groups.
        """
        keep = np.ones(len(data), bool)
        for number, path in enumerate(files):
            part = self.held_out_part(path)
            if split == "all" or (split == "auto" and part is None):
                trained = "as no file with this content was trained on"
                if part is not None:
                    trained = "though the model was trained on some of them"
                print(f"{path}: all groups, {trained}")
                continue
            if part is None:
                raise InputError(f"{path}: the model was not trained on this file, so it has no held-out "
                                 "groups; leave out --split held_out")
            if part == 0:
                raise InputError(f"{path}: the model was trained on all its groups; evaluate on another "
                                 "file, or say --split all")
            keep &= data.held_out(part) | (data.lines[:, 0] != number)
            print(f"{path}: held-out groups only, as {self.name} was trained on the others")
        return keep

    def score(self, data, examples, rule, **settings):
        """The scores of comparisons behind the prompt. Settings: see pm.score_all."""
        eoc = rule != "reward" or self.meta.get("eoc", True)
        row_format = RowFormat(self.ctx, self.tokenizer, eoc=eoc)
        return pm.score_all(self.model, data, examples, rule, row_format, self.micro_tokens,
                            prefix=self.prefix, **settings)


# ------------------------------------------------------------------------------------------------------------
# Loading


def add_model_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder, Hugging Face folder or .gguf file")
    add("--chat", action="store_true",
        help="write Human/Assistant dialogues by the model's chat template, as is always done for a model "
        "that was trained so (default: as they stand)")
    add("--prompt", metavar="FILE",
        help="prompt that stands before everything: a text file in the paper's format, or one of "
        f"{', '.join(NAMES)} (default: none)")
    add("--prompt_tokens", type=plan.positive(int), metavar="N",
        help="keep the prompt's preamble and as many of its last conversations as fit in N tokens")
    add("--ctx", type=plan.positive(int),
        help="tokens that the prompt, a context and one completion may take together; longer contexts are "
        "cut on the left (default: the model's)")
    plan.add_device_flags(parser)


def load_subject(args, load=checkpoint.load):
    """The Subject that the flags of add_model_flags name, for reading only. load: checkpoint.load_lm where
    only a language model will do. Raises InputError if the prompt leaves no room in the context."""
    ranks = start(args.device)
    device = ranks.device
    model, tokenizer, meta = load(args.model)
    model.to(device).freeze(pick_dtype(args.dtype, device))
    if getattr(args, "chat", False):
        tokenizer.use_chat()
    ctx = plan.set_ctx(model, getattr(args, "ctx", None) or model.config.ctx)
    prompt, prefix = read_prompt(model, tokenizer, ctx, args.prompt, args.prompt_tokens)
    micro_tokens = plan.micro_tokens(args, model, ranks)
    return Subject(args.model, model, tokenizer, meta, prompt, prefix, micro_tokens)


def read_prompt(model, tokenizer, ctx, name, n_tokens=None):
    """(text, a cache that has read <eot> and the text) of a prompt: a file, one of NAMES, or none.

    n_tokens: shorten it to so many tokens. Raises InputError if it leaves no room in a context of `ctx`.
    """
    if name in (None, "none"):
        return "", Cache(0)
    text = load_prompt(name)
    if n_tokens:
        text = fit_prompt(text, tokenizer, n_tokens)
    ids = [tokenizer.eot, *tokenizer.encode(text).tolist()]
    if len(ids) > ctx - 8:
        raise InputError(f"{name}: a prompt of {len(ids):,} tokens would leave no room in a context of "
                         f"{ctx}; give --prompt_tokens {ctx * 3 // 4} to keep what fits, or a longer context")
    return text, read(model, ids)[0].as_prefix()


def reward_function(folder, args):
    """(a function of lists of contexts and texts that returns their rewards (N,) by the preference model in
    `folder`, what its checkpoint tells about its training)."""
    judge = load_subject(argparse.Namespace(
        model=folder, prompt=None, prompt_tokens=None, device=args.device, dtype=args.dtype,
        micro_tokens=args.micro_tokens))
    if not judge.is_pm:
        raise InputError(f"{folder}: a language model, but a preference model is needed here")

    def encode(text):
        return judge.tokenizer.encode(text.replace("<eot>", "").replace("<eoc>", ""))

    def rewards(contexts, texts):
        most = judge.ctx - 2  # tokens of a text
        texts = [t.removeprefix(judge.tokenizer.space_before(c)) for c, t in zip(contexts, texts)]
        data = pm.tokenised_comparisons([[encode(c), encode(t)[:most]] for c, t in zip(contexts, texts)])
        return np.concatenate(judge.score(data, np.arange(len(texts)), "reward", progress="judging"))
    return rewards, judge.meta


# ------------------------------------------------------------------------------------------------------------
# Sampling


def add_sampling_flags(parser, n, max_new, temperature, top_p):
    add = parser.add_argument
    add("--n", type=plan.positive(int), default=n, help="samples for each prompt (default: %(default)s)")
    add("--max_new", type=plan.positive(int), default=max_new,
        help="tokens of a sample at most (default: %(default)s)")
    add("--temperature", type=plan.between(float, 0, 100), default=temperature,
        help="0 takes the likeliest token (default: %(default)s)")
    add("--top_p", type=plan.between(float, 0, 1), default=top_p,
        help="sample from the likeliest tokens that together have this probability (default: %(default)s)")
    add("--seed", type=plan.between(int, 0, 2**32), default=0,
        help="decides the samples (default: %(default)s)")


def samples(subject, texts, args, stops=None, unit="prompt"):
    """Continue each of `texts` behind the prompt, with a progress bar: for each a list of args.n texts.

    A continuation ends before the first of its stops, at <eot> or after --max_new tokens. stops: for each
    text a tuple of texts (default: STOPS for all). A long text is cut on the left. The random numbers of a
    text's samples depend on --seed and its place in `texts` alone. Texts of about one length are continued
    together, the longest first.
    """
    tokenizer, half = subject.tokenizer, subject.ctx // 2
    if args.max_new > half:
        args.max_new = half
        print(f"note: samples end after {half} tokens, half of what there is room for")
    most = max(1, subject.ctx - args.max_new)
    prompts = [(tokenizer.encode(text).tolist() or [tokenizer.eot])[-most:] for text in texts]
    drawn = [[TextSample(tokenizer, stop) for _ in range(args.n)] for stop in stops or [STOPS] * len(texts)]
    waiting = sorted(range(len(texts)), key=lambda i: len(prompts[i]), reverse=True)
    with tqdm(total=len(texts), desc="sampling", unit=unit, disable=None, leave=False) as bar:
        while waiting:
            tokens_each = args.n * (len(prompts[waiting[0]]) + args.max_new)
            n_prompts = max(1, subject.micro_tokens // tokens_each)
            batch, waiting = waiting[:n_prompts], waiting[n_prompts:]
            for _ in stream(
                    subject.model, [prompts[i] for i in batch], [drawn[i] for i in batch], args.max_new,
                    args.temperature, args.top_p, tokenizer.n_vocab,
                    [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in batch],
                    subject.prefix):
                pass
            bar.update(len(batch))
    spaces = [tokenizer.space_before(text) for text in texts]
    return [[space + sample.text for sample in group] for space, group in zip(spaces, drawn)]
