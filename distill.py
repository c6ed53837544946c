"""Context distillation: train a model without a prompt to be what it is behind one (Section 2.3 of the paper).

  python distill.py --init out/lm --out out/distilled                          the toy world and its prompt
  python distill.py --init out/lm --prompt hhh --data texts/ --dialogue stackexchange.jsonl --out out/distilled
  python distill.py --init out/lm --online --out out/distilled                 the teacher's whole distribution, computed at each step

    L(theta) = KL( p0(X | C) || p_theta(X) )

C is the prompt, p0 the teacher, which is the initial model unless --teacher names another, and X a text: half of them are
windows of language-model text set after "Human:", half dialogues. The teacher's 50 likeliest next tokens and the sum of all
others are a distribution over 51 classes for each token of X; these are computed once, behind the prompt's keys and values,
and stored. The gradient by the logits differs from the full KL's by at most twice the probability of the others.
"""
import argparse
import hashlib
import math

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import trainer
from data import toy
from data.errors import InputError, run_main
from data.files import build_once, content_key
from data.packing import balance, pack, step_examples
from data.text import lm_windows, load_text
from evals.subject import read_prompt
from model import Layout, linear_loss

TOP = 50  # the teacher's likeliest tokens that are stored; all others are the 51st class
SHARD = 512  # sequences in a folder of the teacher's cache: what a killed run has to do again at most
SHORTEST = 16  # tokens: shorter windows of text teach nothing


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", required=True, help="checkpoint folder of the language model to train")
    parser.add_argument("--teacher", help="checkpoint folder of another teacher with the same tokenizer (default: the initial model)")
    parser.add_argument("--prompt", metavar="FILE", help="the prompt: a text file in the paper's format, or hhh, code, toy (default: toy for toy data, else hhh)")
    parser.add_argument("--prompt_tokens", type=trainer.positive(int), metavar="N", help="keep the prompt's preamble and the last conversations that fit in N tokens")
    parser.add_argument("--data", nargs="+", default=["toy"], help="files or folders of text, for the first half of X; or toy (default: toy)")
    parser.add_argument("--dialogue", nargs="+", help="files of {\"text\": \"Human: …\\n\\nAssistant: …\"} lines, for the other half, such as data.prepare "
                        "stackexchange --dialogue makes (default: the toy world's, for toy data)")
    parser.add_argument("--ctx", type=trainer.positive(int), help="tokens of X at most (default: what the prompt leaves of the teacher's context)")
    parser.add_argument("--sequences", type=trainer.between(int, 64, 2**31), default=8192, help="different X in all, half of each kind (default: %(default)s)")
    parser.add_argument("--online", action="store_true", help="compute the teacher's whole distribution at each step; store nothing")
    trainer.add_training_flags(parser, batch=32, batch_unit="sequences", lr="0.05 x the language model's", schedule="linear", warmup=0.0)
    return parser.parse_args()


def main():
    args = parse_args()
    ranks = trainer.start(args.device)
    text_files, dialogue_files, prompt_name = sources(args)
    earlier = trainer.resumed(args, "lm", text_files + dialogue_files)
    initial, tokenizer, meta = checkpoint.load_lm(args.init)
    teacher_folder = checkpoint.find(args.teacher or args.init)
    teacher, its_tokenizer, _ = checkpoint.load_lm(teacher_folder)
    if its_tokenizer.key != tokenizer.key:
        raise InputError(f"{args.teacher}: the teacher has another tokenizer than {args.init}; their tokens must be the same")
    model = earlier[0] if earlier else initial
    teacher.to(ranks.device).eval().requires_grad_(False)
    model.to(ranks.device)
    model.dtype = teacher.dtype = trainer.pick_dtype(args.dtype, ranks.device)
    prompt, prefix = read_prompt(teacher, tokenizer, teacher.config.ctx, prompt_name, args.prompt_tokens)
    ctx = min(args.ctx or math.inf, teacher.config.ctx - prefix.start, model.config.ctx)
    if ctx < 2 * SHORTEST:
        raise InputError(f"--prompt {prompt_name}: of the teacher's context of {teacher.config.ctx} tokens it leaves {ctx} for X; give --prompt_tokens, or a larger --ctx")
    sequences = make_sequences(args, text_files, dialogue_files, tokenizer, ctx, ranks)
    at_once = trainer.micro_tokens(args, model, ranks.device)
    stored = None if args.online else store_teacher(teacher, teacher_folder, prefix, prompt, sequences, at_once, ranks)

    n_held = max(1, len(sequences) // 32)
    held_out, train = np.arange(n_held), np.arange(n_held, len(sequences))
    lm_lr = meta.get("lm_lr") or trainer.lm_rate(model.config.d_model)
    lr = args.lr or 0.05 * lm_lr
    per_epoch = -(-len(train) // args.batch)
    n_steps = args.steps or math.ceil(args.epochs * per_epoch)

    def rows(numbers):
        lengths = [len(sequences[i]) for i in numbers]
        mine = balance(lengths, ranks.world)[ranks.rank]
        return [Row([sequences[numbers[mine[j]]] for j in part], [numbers[mine[j]] for j in part], stored, ranks.device)
                for part in pack([lengths[j] for j in mine], at_once)]

    def loss(net, row):
        hidden = net(row.tokens, row.layout)
        if args.online:
            with torch.no_grad():
                taught = teacher(row.tokens, row.layout, prefix)
            return *_sum(full_kl(model, hidden, teacher, taught)), {}
        return *_sum(top_kl(model, hidden, row.ids, row.log_p)), {}

    def evaluate(net):
        total = [0.0, 0]
        for row in rows(held_out):
            row_loss, count, _ = loss(net, row)
            total = [total[0] + row_loss.item(), total[1] + count]
        nats, tokens = ranks.sum(total)
        return {"loss": nats / tokens, "tokens": round(tokens)}

    kl_before = earlier[2]["kl_before"] if earlier else trainer.evaluated(model, evaluate)["loss"]
    tokens = sum(map(len, sequences))
    trainer.print_plan(args, ranks, model, n_steps, lr, at_once, [
        f"data: {len(train):,} training sequences, {len(held_out):,} held out, {tokens:,} tokens; a step: {args.batch} sequences, about "
        f"{args.batch * tokens / len(sequences):,.0f} tokens; an epoch: {per_epoch:,} steps",
        f"teacher: {teacher_folder} behind {prompt_name}, {prefix.start} tokens; held-out KL at the start: {kl_before:.4f} nats a token"])
    trainer.train(args, ranks, model, tokenizer, n_steps=n_steps, lr=lr,
                  micro_batches=lambda step: rows(train[step_examples(len(train), args.batch, args.seed, step)[1]]), loss=loss, evaluate=evaluate,
                  where=lambda row: "sequences " + ", ".join(map(str, row.numbers)), unit="tokens", resumed_from=earlier[2] if earlier else None,
                  meta={"kind": "lm", "objective": "distillation", "lm_lr": lm_lr, "prompt": prompt_name, "kl_before": kl_before,
                        "data": content_key(text_files + dialogue_files), "trained_on": trainer.trained_on(meta, text_files + dialogue_files, 0.01)})


def sources(args):
    """(text files, dialogue files, name of the prompt)."""
    is_toy = args.data == ["toy"]
    if not args.dialogue and not is_toy:
        raise InputError("--dialogue is missing: half of X are dialogues; python -m data.prepare stackexchange --dialogue makes them")
    return (toy.find_data(args.data, "lm.jsonl"), toy.find_data(args.dialogue or ["toy"], "dialogue.jsonl"),
            args.prompt or ("toy" if is_toy else "hhh"))


def make_sequences(args, text_files, dialogue_files, tokenizer, ctx, ranks):
    """--sequences arrays of at most ctx token ids, in a random order: half windows of text after "Human:", half dialogues."""
    half = args.sequences // 2
    human = tokenizer.encode("\n\nHuman: ")
    text = load_text(text_files, tokenizer)[0]
    windows, epoch = [], 0
    while len(windows) < args.sequences - half:
        before = len(windows)
        for start in lm_windows(text, ctx - len(human), args.seed, epoch).tolist():
            window = np.asarray(text.tokens[start:start + ctx - len(human)])
            ends = np.flatnonzero(window == tokenizer.eot)  # one document a sequence: the prompt reaches no further
            if (len(window) if not len(ends) else ends[0]) >= SHORTEST:
                windows.append(np.concatenate([human, window[:ends[0] if len(ends) else None]]))
            if len(windows) == args.sequences - half:
                break
        if len(windows) == before:
            raise InputError(f"{text_files[0]}: no document has a piece of {SHORTEST} tokens")
        epoch += 1
    talks = [np.concatenate([tokenizer.encode("\n\n"), talk])[:ctx] for talk in documents(load_text(dialogue_files, tokenizer)[0], tokenizer.eot)]
    if not talks:
        raise InputError(f"{dialogue_files[0]}: no dialogue in this file")
    order = np.random.default_rng([args.seed, 2]).permutation(len(talks))
    if len(talks) < half or epoch > 1:
        ranks.say(f"note: {args.sequences} sequences are more than the data has; {len(talks):,} dialogues come {half / len(talks):.1f} times each, the text {epoch} times")
    chosen = windows[:args.sequences - half] + [talks[order[i % len(talks)]] for i in range(half)]
    return [chosen[i].astype(np.int64) for i in np.random.default_rng([args.seed, 3]).permutation(len(chosen))]


def documents(text, eot):
    """The documents of a Text, without their <eot>."""
    ends = np.flatnonzero(np.asarray(text.tokens) == eot)
    return [np.asarray(text.tokens[a:b]) for a, b in zip([0, *(ends[:-1] + 1)], ends)]


class Row:
    """Sequences end to end, each seeing itself only, with the teacher's stored distribution for every token's successor."""

    def __init__(self, sequences, numbers, stored, device):
        self.numbers, self.layout = numbers, Layout([len(x) for x in sequences], range(len(sequences)))
        self.tokens = torch.from_numpy(np.concatenate(sequences)).to(device)  # (T,)
        if stored is not None:
            ids, log_p = zip(*(stored(i) for i in numbers))
            self.ids = torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device)  # (T, 50)
            self.log_p = torch.from_numpy(np.concatenate(log_p).astype(np.float32)).to(device).log_softmax(-1)  # (T, 51)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


def store_teacher(teacher, folder, prefix, prompt, sequences, at_once, ranks):
    """A function number -> (ids (t, 50), log-probs (t, 51)) that reads the teacher's cache, made here where it is missing.

    202 or 302 bytes a token (ids of 2 or 4 bytes, fp16 log-probs). Each rank begins with another shard, so they share the work.
    """
    id_type = np.uint16 if teacher.config.vocab_size <= 2**16 else np.uint32
    tokens = hashlib.sha256(np.concatenate(sequences).tobytes()).hexdigest()
    key = content_key([folder / "model.safetensors", folder / "config.json"], prompt, str(teacher.dtype), tokens, [len(x) for x in sequences], TOP, SHARD)
    shards = [range(i, min(i + SHARD, len(sequences))) for i in range(0, len(sequences), SHARD)]
    offsets = np.cumsum([0] + [len(x) for x in sequences])
    folders = {}
    with tqdm(total=len(sequences), desc="teacher", unit="sequence", disable=None if ranks.main() else True) as progress:
        for n in range(len(shards)):
            shard = (n + ranks.rank * len(shards) // ranks.world) % len(shards)
            folders[shard] = build_once(f"teacher-{key}/{shard}", lambda place: _store(
                place, teacher, prefix, [sequences[i] for i in shards[shard]], at_once, id_type, ranks.device))
            progress.update(len(shards[shard]))
    size = sum(file.stat().st_size for place in folders.values() for file in place.iterdir())
    ranks.say(f"teacher's cache: {folders[0].parent}, {size / 1e6:.1f} MB, {size / offsets[-1]:.0f} bytes a token")
    ids = {s: np.memmap(place / "ids", id_type, "r").reshape(-1, TOP) for s, place in folders.items()}
    log_p = {s: np.memmap(place / "log_p", np.float16, "r").reshape(-1, TOP + 1) for s, place in folders.items()}

    def stored(number):
        shard = number // SHARD
        a, b = offsets[number] - offsets[shard * SHARD], offsets[number + 1] - offsets[shard * SHARD]
        return ids[shard][a:b], log_p[shard][a:b]
    return stored


@torch.no_grad()
def _store(place, teacher, prefix, sequences, at_once, id_type, device):
    top, likely = [None] * len(sequences), [None] * len(sequences)
    for numbers in pack([len(x) for x in sequences], at_once):
        row = Row([sequences[i] for i in numbers], numbers, None, device)
        ids, log_p = zip(*(top_classes(teacher.logits(part)) for part in teacher(row.tokens, row.layout, prefix).split(1024)))
        sizes = [len(sequences[i]) for i in numbers]
        for i, own_ids, own_log_p in zip(numbers, torch.cat(ids).split(sizes), torch.cat(log_p).split(sizes)):
            top[i], likely[i] = own_ids.cpu().numpy().astype(id_type), own_log_p.cpu().numpy().astype(np.float16)
    np.concatenate(top).tofile(place / "ids")
    np.concatenate(likely).tofile(place / "log_p")


def top_classes(logits):
    """The 50 likeliest tokens and all others together: logits (N, V) -> (ids (N, 50), log-probs (N, 51))."""
    log_p = logits.float().log_softmax(-1)
    top, ids = log_p.topk(TOP)
    return ids, torch.cat([top, rest_of(log_p, ids).clamp(min=-1e4)], 1)  # finite in fp16


def rest_of(log_p, ids):
    """Log of the probability that is not at `ids`: log_p (N, V), ids (N, k) -> (N, 1)."""
    return log_p.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def top_kl(model, hidden, ids, log_p):
    """KL over 51 classes. hidden (N, d) of the student, ids (N, 50) and log_p (N, 51) of the teacher -> (sum, losses (N,)) in nats."""
    def row_loss(logits, rows, need_gradient):
        loss, gradient = top_kl_of(logits, ids[rows], log_p[rows])
        return loss, gradient.to(logits.dtype) if need_gradient else None
    return linear_loss(hidden.to(model.dtype), model.unembedding, row_loss)


def full_kl(model, hidden, teacher, taught):
    """KL over the whole vocabulary. hidden, taught (N, d): final hidden states of student and teacher -> as top_kl."""
    def row_loss(logits, rows, need_gradient):
        loss, gradient = full_kl_of(logits, teacher.logits(taught[rows]))
        return loss, gradient.to(logits.dtype) if need_gradient else None
    return linear_loss(hidden.to(model.dtype), model.unembedding, row_loss)


def top_kl_of(logits, ids, log_p):
    """(KL (N,), its gradient by the logits (N, V)) of the 51 classes; logits (N, V) of the student.

    A class's share of the gradient goes to its tokens by their probability: q - p at the 50, q (1 - p_rest / q_rest) elsewhere.
    """
    log_q = exact(logits).log_softmax(-1)
    top, rest = log_q.gather(1, ids), rest_of(log_q, ids)
    p = log_p.exp()
    loss = (p * (log_p - torch.cat([top, rest], 1))).sum(1)
    gradient = log_q.exp_() * (1 - (log_p[:, -1:] - rest).exp())
    return loss, gradient.scatter_(1, ids, (top.exp() - p[:, :-1]).to(gradient.dtype))


def full_kl_of(logits, teacher_logits):
    """(KL (N,), its gradient by the logits (N, V)) of the whole vocabulary; logits and teacher_logits (N, V)."""
    log_q, log_p = exact(logits).log_softmax(-1), exact(teacher_logits).log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), log_q.exp_().sub_(p)


def exact(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def _sum(loss):
    total, losses = loss
    return total, len(losses)


if __name__ == "__main__":
    run_main(main)
