"""The model under test: a checkpoint, behind a prompt if one is given, and sampling from it."""
import codecs
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
from model import Cache, GPT, read
from ranks import pick_dtype, start
from sampling import stream


@dataclass
class Subject:
    name: str
    model: GPT
    tokenizer: Tokenizer
    meta: dict
    prefix: Cache | None  # the prompt's keys and values, computed once and shared by all that is read after it
    prompt: str  # its text, "" for none
    ctx: int  # tokens left for a context and its completion
    at_once: int  # tokens computed at once
    device: torch.device

    @property
    def is_pm(self):
        return self.meta["kind"] == "pm"

    def held_out_part(self, path):
        """The part of a file's groups that the model was not trained on, the smallest of all its trainings; None for a file it never saw."""
        digest = file_digest(path).hex()
        return min((entry["held_out"] for entry in self.meta["trained_on"] if entry["digest"] == digest), default=None)

    def unseen(self, data, files, split):
        """(C,) True for the comparisons to evaluate on: with split "auto" the held-out groups of files that the model was trained on
        and all of others, which is said. Raises InputError where a file has none."""
        keep = np.ones(len(data), bool)
        for number, path in enumerate(files):
            part = self.held_out_part(path)
            if split == "all" or (split == "auto" and part is None):
                print(f"{path}: all groups" + (" (the model was trained on some of them)" if part is not None else ""))
                continue
            if part is None:
                raise InputError(f"{path}: the model was not trained on this file, so it has no held-out groups; leave out --split held_out")
            if part == 0:
                raise InputError(f"{path}: the model was trained on all its groups; evaluate on another file, or say --split all")
            keep &= data.held_out(part) | (data.lines[:, 0] != number)
            print(f"{path}: held-out groups only, as {self.name} was trained on the others")
        return keep

    def score(self, data, examples, how, **more):
        """pm.score_all of this model behind its prompt."""
        row_format = RowFormat(self.ctx, self.tokenizer, eoc=how != "reward" or self.meta.get("eoc", True))
        return pm.score_all(self.model, data, examples, how, row_format, self.at_once, prefix=self.prefix, **more)


def add_model_flags(parser):
    parser.add_argument("--model", required=True, help="checkpoint folder, Hugging Face folder or .gguf file")
    parser.add_argument("--prompt", metavar="FILE", help=f"prompt to set before everything: a text file in the paper's format, or {', '.join(NAMES)} "
                        "(default: none)")
    parser.add_argument("--prompt_tokens", type=plan.positive(int), metavar="N", help="keep the prompt's preamble and the last conversations that fit in N tokens")
    parser.add_argument("--ctx", type=plan.positive(int), help="tokens the prompt, a context and one completion may take together; longer contexts are cut on "
                        "the left (default: the model's)")
    plan.add_device_flags(parser)


def load_frozen(args, folder, load=checkpoint.load):
    """(model, tokenizer, meta, device): the checkpoint in a folder, to be read only, on the device and in the precision that the flags say."""
    device = start(args.device).device
    model, tokenizer, meta = load(folder)
    return model.to(device).freeze(pick_dtype(args.dtype, device)), tokenizer, meta, device


def load_subject(args, load=checkpoint.load):
    """The Subject that --model, --prompt and the device flags name. load: checkpoint.load_lm where only a language model will do.

    Raises InputError where the prompt leaves no room in the context.
    """
    model, tokenizer, meta, device = load_frozen(args, args.model, load)
    ctx = plan.set_ctx(model, getattr(args, "ctx", None) or model.config.ctx)
    prompt, prefix = read_prompt(model, tokenizer, ctx, args.prompt, args.prompt_tokens)
    left = ctx - (prefix.prefix_tokens if prefix else 0)
    if getattr(args, "max_new", 0) > left // 2:
        args.max_new = left // 2
        print(f"note: samples end after {args.max_new} tokens, half of what there is room for")
    return Subject(args.model, model, tokenizer, meta, prefix, prompt, left, plan.micro_tokens(args, model, device), device)


def read_prompt(model, tokenizer, ctx, name, n_tokens=None):
    """(text, cache that has read it) of the prompt called `name`, or ("", None) for None."""
    if name is None:
        return "", None
    text = load_prompt(name)
    text = fit_prompt(text, tokenizer, n_tokens) if n_tokens else text
    ids = np.concatenate([[tokenizer.eot], tokenizer.encode(text)]).astype(np.int64)
    if len(ids) > ctx - 8:
        raise InputError(f"--prompt {name}: its {len(ids)} tokens leave no room in a context of {ctx}; "
                         "give --prompt_tokens N, or a model of a larger context")
    return text, read(model, ids)[0].as_prefix()


# ---------------------------------------------------------------------------------------------------------------------
# Rewards of texts in memory


def reward_function(folder, args):
    """(a function contexts, texts -> rewards (N,) of the preference model in `folder`, what its checkpoint remembers)."""
    model, tokenizer, meta, device = load_frozen(args, folder)
    if meta["kind"] != "pm":
        raise InputError(f"{folder}: a language model, but a preference model is needed here")
    ctx, at_once = model.config.ctx, plan.micro_tokens(args, model, device)

    def rewards(contexts, texts):
        clean = lambda text: tokenizer.encode(text.replace("<eot>", "").replace("<eoc>", ""))
        data = pm.tokenised_comparisons([[clean(c), clean(t)[:ctx - 2]] for c, t in zip(contexts, texts)])  # cut where they exceed ctx
        row_format = RowFormat(ctx, tokenizer, eoc=meta.get("eoc", True))
        return np.concatenate(pm.score_all(model, data, np.arange(len(texts)), "reward", row_format, at_once, progress="judging"))
    return rewards, meta


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def add_sampling_flags(parser, n, max_new, temperature, top_p):
    parser.add_argument("--n", type=plan.positive(int), default=n, help="samples for each prompt (default: %(default)s)")
    parser.add_argument("--max_new", type=plan.positive(int), default=max_new, help="tokens a sample has at most (default: %(default)s)")
    parser.add_argument("--temperature", type=plan.between(float, 0, 100), default=temperature, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top_p", type=plan.between(float, 0, 1), default=top_p, help="sample from the likeliest tokens of this probability together "
                        "(default: %(default)s)")
    parser.add_argument("--seed", type=plan.between(int, 0, 2**32), default=0, help="of the samples (default: %(default)s)")


def samples(subject, texts, args, stops=None, unit="prompt"):
    """For each of `texts` args.n texts that continue it behind the prompt, each ending before the first of its stops, at <eot> or at
    --max_new; with a bar. stops: a tuple for each text (default: STOPS for all).

    A long text is cut on the left. The random numbers of a text's samples depend on --seed and its place in `texts` alone.
    Texts of about one length are continued together, the longest first.
    """
    tokenizer, most = subject.tokenizer, max(1, subject.ctx - args.max_new)
    prompts = [(tokenizer.encode(text).tolist() or [tokenizer.eot])[-most:] for text in texts]
    answers = [[Answer(tokenizer, stop) for _ in range(args.n)] for stop in stops or [STOPS] * len(texts)]
    order, first = sorted(range(len(texts)), key=lambda i: len(prompts[i]), reverse=True), 0
    with tqdm(total=len(texts), desc="sampling", unit=unit, disable=None, leave=False) as bar:
        while first < len(order):
            at_once = max(1, subject.at_once // (args.n * (len(prompts[order[first]]) + args.max_new)))
            batch = order[first:first + at_once]
            rows = [answer for i in batch for answer in answers[i]]
            for _ in stream(subject.model, [prompts[i] for i in batch], args.n, seeds=[args.seed * 1_000_003 + i for i in batch], max_new=args.max_new,
                            temperature=args.temperature, top_p=args.top_p, stop=(tokenizer.eot, tokenizer.eoc), n_vocab=tokenizer.n_vocab,
                            prefix=subject.prefix, done=lambda at, tokens: torch.tensor([rows[i].add(t) for i, t in zip(at.tolist(), tokens.tolist())])):
                pass
            first += len(batch)
            bar.update(len(batch))
    return [[answer.text for answer in row] for row in answers]


class Answer:
    """A text that grows token by token until a stop text stands in it, which is cut off."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.text = tokenizer, stops, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens

    def add(self, token):
        """Append a token; returns whether the text has ended."""
        if token in (self.tokenizer.eot, self.tokenizer.eoc):
            return True
        before = max(0, len(self.text) - max(map(len, self.stops), default=0))
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        ends = [at for at in (self.text.find(stop, before) for stop in self.stops) if at >= 0]
        if ends:
            self.text = self.text[:min(ends)]
        return bool(ends)
