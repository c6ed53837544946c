"""Context distillation: train a model without a prompt to be what it is behind one (Section 2 of the
paper).

  python distill.py --init out/lm --out out/distilled                  the toy world and its prompt
  python distill.py --init out/lm --out out/distilled --prompt hhh --data texts/ --dialogue talks.jsonl
  python distill.py --init out/lm --online --out out/distilled         with the teacher's whole distribution

    L(theta) = KL( p0(X | C) || p_theta(X) )

C is the prompt. p0 is the teacher: the initial model, unless --teacher names another. X is a text. Half of
the texts are pieces of language-model text set after "Human:", and half are dialogues.

For every token of X, the teacher's 50 likeliest next tokens and the sum of all others form a distribution
over 51 classes. It is computed once and stored; the prompt's keys and values are computed once for all texts.
What is lost is how the teacher divides the 51st class among its tokens. So the gradient with
respect to the student's logits differs little from that of the KL over the whole vocabulary: the absolute
differences sum to at most twice the teacher's probability of the 51st class (top_kl_of has the gradient).
"""
import argparse
import hashlib
import itertools
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import plan
import trainer
from data import toy
from data.errors import InputError, Parser, run_main
from data.files import build_once, content_key
from data.packing import Layout, TensorBatch, pack, pack_for_rank, step_examples
from data.text import lm_windows, load_text
from evals.subject import read_prompt
from losses import at_least_fp32, linear_loss
from ranks import fill, pick_dtype, start

TOP = 50  # the teacher's likeliest tokens; all others together are the 51st class
CHUNK = 512  # sequences in one folder of the stored teacher: a killed run does at most so many again
SHORTEST = 16  # tokens of the shortest piece of text worth a sequence
HUMAN = "\n\nHuman: "  # stands before a piece of text
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*")
HELD_OUT = 0.01  # part of the documents that load_text keeps apart; nothing here reads them


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init", required=True,
        help="language model to train: a checkpoint folder, a Hugging Face folder or a .gguf file")
    add("--teacher", help="another teacher with the same tokenizer (default: the initial model)")
    add("--prompt", metavar="FILE",
        help="the prompt: a text file in the paper's format, or hhh, code, toy, toy:SEED (default: the toy "
        "world's for toy data, else hhh)")
    add("--prompt_tokens", type=plan.positive(int), metavar="N",
        help="keep the prompt's preamble and as many of its last conversations as fit in N tokens")
    add("--data", nargs="+", default=["toy"],
        help="files or folders of text for the first half of X, toy, or toy:SEED (default: toy)")
    add("--dialogue", nargs="+",
        help='files of {"text": "Human: …\\n\\nAssistant: …"} lines for the other half, as data.prepare '
        "stackexchange --dialogue makes them (default: the toy world's, for toy data)")
    add("--ctx", type=plan.positive(int),
        help="tokens of X at most (default: what the prompt leaves of the teacher's context, 1024 at most)")
    add("--sequences", type=plan.between(int, 64, 2**31), default=8192,
        help="different X in all, half of each kind, 64 at least (default: %(default)s)")
    add("--online", action="store_true",
        help="compute the teacher's whole distribution at each step, and store nothing")
    plan.add_training_flags(
        parser, batch=32, batch_unit="sequences", batch_default="32", schedule="linear", warmup=0.0,
        lr_default="0.05 x the language model's, as in the paper; below 100M parameters 0.1 x")
    return parser.parse_args()


def main():
    args = parse_args()
    ranks = start(args.device)
    text_files, dialogue_files, prompt_name = find_sources(args)
    resumed = trainer.resumed(args, ranks, "lm", text_files + dialogue_files)
    model, tokenizer, meta = checkpoint.load_lm(args.init, lazily=True)
    if tokenizer.chat:
        raise InputError(f"{args.init}: was trained with --chat; distillation needs a model of plain dialogues")
    teacher_folder = checkpoint.find(args.teacher or args.init)
    teacher, teacher_tokenizer, _ = checkpoint.load_lm(teacher_folder)
    if teacher_tokenizer.key != tokenizer.key:
        raise InputError(f"{args.teacher}: the teacher has another tokenizer than {args.init}; their tokens "
                         "must be the same")
    if resumed:
        model = resumed[0]
    plan.fit_shard(args, ranks, model)
    model.dtype = pick_dtype(args.dtype, ranks.device)
    teacher = teacher.to(ranks.device).freeze(model.dtype)
    # The prompt's text, and a cache that has read it.
    prompt, prefix = read_prompt(teacher, tokenizer, teacher.config.ctx, prompt_name, args.prompt_tokens)
    ctx = min(args.ctx or 1024, teacher.config.ctx - prefix.prefix_tokens, model.config.ctx)
    if ctx < 2 * SHORTEST:
        raise InputError(f"--prompt {prompt_name}: of the teacher's context of {teacher.config.ctx} tokens "
                         f"it leaves {ctx} for X; give --prompt_tokens, or a larger --ctx")
    sequences = make_sequences(args, text_files, dialogue_files, tokenizer, ctx, ranks)
    micro_tokens = plan.micro_tokens(args, model, ranks)
    stored = None
    if not args.online:
        stored = store_teacher(teacher, teacher_folder, prefix, prompt, sequences, model.config.vocab_size,
                               micro_tokens, ranks)

    held_out, train = split(sequences)
    lm_lr = meta.get("lm_lr") or plan.lm_rate(model.config.d_model)
    lr = args.lr or plan.stage_rate(model, lm_lr, 0.05)
    steps_per_epoch = math.ceil(len(train) / args.batch)
    n_steps = args.steps or math.ceil(args.epochs * steps_per_epoch)

    def micro_batches(step, rank=ranks.rank):
        numbers = train[step_examples(len(train), args.batch, args.seed, step)[1]]
        lengths = [len(sequences[i]) for i in numbers]
        rows = pack_for_rank(lengths, micro_tokens, rank, ranks.world)
        return [SequenceRow(numbers[row], sequences, stored) for row in rows]

    def loss(model, row):
        hidden = model(row.tokens, row.layout)
        if args.online:
            with torch.no_grad():
                teacher_hidden = teacher(row.tokens, row.layout, prefix)
            total, _ = full_kl(model, hidden, teacher, teacher_hidden)
        else:
            total, _ = top_kl(model, hidden, row.ids, row.log_p)
        return total, len(row.tokens), {}

    def student_loss(model, row):
        """The plan simulates the memory of the student alone. With --online `loss` also runs the teacher, so
        here the student's own hidden states take the teacher's place."""
        hidden = model(row.tokens, row.layout)
        return full_kl(model, hidden, model, hidden.detach())

    def evaluate(model):
        total, n_tokens = 0.0, 0
        rows = pack([len(sequences[i]) for i in held_out], micro_tokens)
        for row, is_counted in ranks.share(rows):  # not counted: one that another rank counts
            row_loss, count, _ = loss(model, SequenceRow(held_out[row], sequences, stored).to(ranks.device))
            total, n_tokens = total + is_counted * row_loss.item(), n_tokens + is_counted * count
        total, n_tokens = ranks.sum([total, n_tokens])
        return {"loss": total / n_tokens, "tokens": round(n_tokens)}

    def where(row):
        return "sequences " + ", ".join(map(str, row.numbers))

    if resumed:
        kl_before = resumed[2]["kl_before"]
    else:
        student = teacher  # their weights are the same at first, but for the rounding of the teacher's to bf16
        if args.teacher:
            student = model
            fill(student, ranks.device)
        kl_before = trainer.evaluated(student, evaluate)["loss"]
    n_tokens = sum(map(len, sequences))
    plan.print_plan(args, ranks, model, n_steps, lr, micro_tokens, [
        f"data: {len(train):,} training sequences, {len(held_out):,} held out, {n_tokens:,} tokens; a step: "
        f"{args.batch} sequences, about {args.batch * n_tokens / len(sequences):,.0f} tokens; an epoch: "
        f"{steps_per_epoch:,} steps",
        f"teacher: {teacher_folder} behind {prompt_name}, {prefix.prefix_tokens} tokens; held-out KL at "
        f"the start: {kl_before:.4f} nats a token"],
        student_loss if args.online else loss, micro_batches(0, rank=0))
    trainer.train(
        args, ranks, model, tokenizer, n_steps=n_steps, lr=lr, micro_batches=micro_batches, loss=loss,
        evaluate=evaluate, where=where, unit="tokens", resumed_from=resumed[2] if resumed else None,
        meta={"kind": "lm", "objective": "distillation", "lm_lr": lm_lr, "prompt": prompt_name,
              "kl_before": kl_before, "data": content_key(text_files + dialogue_files),
              "trained_on": trainer.trained_on(meta, [text_files, dialogue_files], HELD_OUT)})


# ------------------------------------------------------------------------------------------------------------
# The texts X


def find_sources(args):
    """(text files, dialogue files, name of the prompt)."""
    is_toy = toy.is_toy(args.data)
    if not args.dialogue and not is_toy:
        raise InputError("--dialogue is missing: half of X are dialogues; python -m data.prepare "
                         "stackexchange --dialogue makes them")
    return (toy.find_data(args.data, "lm.jsonl"), toy.find_data(args.dialogue or args.data, "dialogue.jsonl"),
            args.prompt or (args.data[0] if is_toy else "hhh"))


def make_sequences(args, text_files, dialogue_files, tokenizer, ctx, ranks):
    """--sequences arrays of at most ctx token ids, in a random order: half pieces of text, half dialogues.

    Each is a string that begins with the blank line before its first speaker, and is tokenised whole, just as
    an evaluation tokenises what it reads behind a prompt. The parts of a string, tokenised one by one, would
    often have other tokens where they meet.
    """
    n_dialogues = args.sequences // 2
    n_pieces = args.sequences - n_dialogues
    text = load_text(text_files, tokenizer, HELD_OUT)[0]
    pieces = list(itertools.islice(text_pieces(text, tokenizer, ctx, args.seed), n_pieces))
    if not pieces:
        raise InputError(f"{text_files[0]}: no document has a piece of {SHORTEST} tokens")
    dialogues = list(documents(load_text(dialogue_files, tokenizer, HELD_OUT)[0], tokenizer))
    if not dialogues:
        raise InputError(f"{dialogue_files[0]}: no dialogue in this file")
    for name, found, wanted in (("pieces of text", pieces, n_pieces), ("dialogues", dialogues, n_dialogues)):
        if len(found) < wanted:
            ranks.say(f"note: the data has {len(found):,} {name}, so each comes {wanted / len(found):.1f} "
                      "times")
    order = np.random.default_rng([args.seed, 2]).permutation(len(dialogues))
    chosen = [pieces[i % len(pieces)] for i in range(n_pieces)]
    for i in range(n_dialogues):
        chosen.append(tokenizer.encode("\n\n" + dialogues[order[i % len(dialogues)]])[:ctx])
    shuffled = np.random.default_rng([args.seed, 3]).permutation(len(chosen))
    return [chosen[i].astype(np.int64) for i in shuffled]


def split(sequences):
    """(numbers of the held-out sequences, numbers of those to train on): the first 32nd, and all others. A
    sequence that is trained on as well, as the data is short and it comes more than once, is not evaluated."""
    n_held_out = max(1, len(sequences) // 32)
    train = np.arange(n_held_out, len(sequences))
    seen = {sequences[i].tobytes() for i in train}
    unseen = [i for i in range(n_held_out) if sequences[i].tobytes() not in seen]
    return np.array(unseen or range(n_held_out)), train


def text_pieces(text, tokenizer, ctx, seed):
    """Yield pieces of text after "Human:", at most ctx token ids each, that begin where a document or a
    sentence does.

    Each comes from a window of the stream of documents; the windows come in a random order, each once. If a
    document begins in the window, the piece is its beginning. Otherwise it begins with the window's first
    whole sentence.
    """
    for start in lm_windows(text, min(ctx, len(text.tokens) - 1), seed, epoch=0).tolist():
        # Twice as long as a piece, so that a document which begins in its first half can fill one.
        window = np.asarray(text.tokens[start:start + 2 * ctx])
        # Where the documents in the window end. The window's own end cuts off the last one.
        end, *later_ends = [*np.flatnonzero(window == tokenizer.eot).tolist(), len(window)]
        if end < min(ctx, len(window) - 1):  # another one begins behind it, early enough in the window
            string = tokenizer.decode(window[end + 1:later_ends[0]])
        else:
            string = tokenizer.decode(window[:end])
            sentence_end = SENTENCE_END.search(string)
            string = string[sentence_end.end():] if sentence_end else ""
        ids = tokenizer.encode(HUMAN + string.strip())[:ctx]
        if len(ids) >= SHORTEST:
            yield ids


def documents(text, tokenizer):
    """The documents of a Text, as strings. The end of the text is held out, so the last one may lack its own
    end."""
    begin = 0
    for end in [*np.flatnonzero(np.asarray(text.tokens) == tokenizer.eot).tolist(), len(text.tokens)]:
        if end > begin:
            yield tokenizer.decode(text.tokens[begin:end])
        begin = end + 1


class SequenceRow(TensorBatch):
    """Sequences end to end, each of which sees only itself.

    With a stored teacher it also has the teacher's distribution for every token's successor: `ids` (T, 50)
    and `log_p` (T, 51).
    """

    def __init__(self, numbers, sequences, stored=None):
        self.numbers = numbers
        parts = [sequences[i] for i in numbers]
        self.layout = Layout([len(x) for x in parts], range(len(parts)))  # contexts alone
        self.tokens = torch.from_numpy(np.concatenate(parts))  # (T,)
        self.ids = self.log_p = None
        if stored is not None:
            ids, log_p = (np.concatenate(arrays) for arrays in zip(*[stored(number) for number in numbers]))
            self.ids = torch.from_numpy(ids.astype(np.int64))
            # They were stored in half precision, so they no longer sum to 1 exactly.
            self.log_p = torch.from_numpy(log_p.astype(np.float32)).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------
# The teacher


def store_teacher(teacher, folder, prefix, prompt, sequences, n_rows, micro_tokens, ranks):
    """Compute the teacher's distributions once, or find them in the cache.

    Returns a function: number of a sequence of t tokens -> (ids (t, 50), log-probs (t, 51)). They take 202 or
    302 bytes a token (ids of 2 or 4 bytes, log-probs of 2). The ranks share the work: each begins with
    another chunk, and finds in the cache what others have made.
    """
    id_type = np.uint16 if teacher.config.vocab_size <= 2**16 else np.uint32
    tokens = hashlib.sha256(np.concatenate(sequences).tobytes()).hexdigest()
    files = checkpoint.content_files(folder)
    lengths = [len(x) for x in sequences]
    key = content_key(files, prompt, str(teacher.dtype), tokens, lengths, n_rows, TOP, CHUNK)
    chunks = [range(i, min(i + CHUNK, len(sequences))) for i in range(0, len(sequences), CHUNK)]
    first_chunk = ranks.rank * len(chunks) // ranks.world
    folders = {}
    is_silent = None if ranks.main() else True  # None: a bar on a terminal, and nothing elsewhere
    with tqdm(total=len(sequences), desc="teacher", unit="sequence", disable=is_silent) as progress:
        for i in range(len(chunks)):
            number = (first_chunk + i) % len(chunks)
            part = [sequences[j] for j in chunks[number]]
            folders[number] = build_once(
                f"teacher-{key}/{number}",
                lambda place: _store(place, teacher, prefix, part, n_rows, micro_tokens, id_type, ranks.device))
            progress.update(len(part))
    size = sum(file.stat().st_size for place in folders.values() for file in place.iterdir())
    ranks.say(f"teacher's cache: {folders[0].parent}, {size / 1e6:.1f} MB, {size / sum(lengths):.0f} bytes "
              "a token")
    ids, log_p = {}, {}
    for i, place in folders.items():
        ids[i] = np.memmap(place / "ids", id_type, "r").reshape(-1, TOP)
        log_p[i] = np.memmap(place / "log_p", np.float16, "r").reshape(-1, TOP + 1)
    bounds = np.cumsum([0, *lengths])  # sequence i has the tokens from bounds[i] to bounds[i + 1] of all

    def stored(number):
        chunk = number // CHUNK
        begin, end = bounds[number:number + 2] - bounds[chunk * CHUNK]  # of the chunk's tokens
        return ids[chunk][begin:end], log_p[chunk][begin:end]
    return stored


@torch.no_grad()
def _store(place, teacher, prefix, sequences, n_rows, micro_tokens, id_type, device):
    """Write the teacher's distributions of some sequences into a folder, in their order."""
    distributions = [None] * len(sequences)
    for numbers in pack([len(x) for x in sequences], micro_tokens):
        row = SequenceRow(numbers, sequences).to(device)
        hidden = teacher(row.tokens, row.layout, prefix)
        classes = [top_classes(fitted(teacher.logits(part), n_rows)) for part in hidden.split(1024)]
        ids, log_p = (torch.cat(x).cpu() for x in zip(*classes))
        sizes = [len(sequences[i]) for i in numbers]
        for i, *distribution in zip(numbers, ids.split(sizes), log_p.split(sizes)):
            distributions[i] = distribution
    np.concatenate([ids.numpy().astype(id_type) for ids, _ in distributions]).tofile(place / "ids")
    np.concatenate([log_p.numpy().astype(np.float16) for _, log_p in distributions]).tofile(place / "log_p")


def top_classes(logits):
    """The 50 likeliest tokens, and all others together: logits (N, V) -> (ids (N, 50), log-probs (N, 51))."""
    log_p = logits.float().log_softmax(-1)
    top, ids = log_p.topk(TOP)
    rest = rest_of(log_p, ids).clamp(min=-1e4)  # half precision ends at -65,504
    return ids, torch.cat([top, rest], 1)


def rest_of(log_p, ids):
    """The log of the probability that is not at `ids`: log_p (N, V), ids (N, k) -> (N, 1)."""
    return log_p.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# The losses. linear_loss computes the student's logits for some rows at a time, and calls `row_loss` for their
# losses and, where it is needed, the losses' gradient by the logits. The functions here always return both.


def top_kl(model, hidden, ids, log_p):
    """KL over 51 classes, in nats: hidden (N, d) of the student, ids (N, 50) and log_p (N, 51) of the
    teacher.

    Returns (sum, losses (N,)).
    """
    def row_loss(logits, rows, need_gradient):
        return top_kl_of(logits, ids[rows], log_p[rows])
    return linear_loss(hidden.to(model.dtype), model.unembedding, row_loss)


def full_kl(model, hidden, teacher, teacher_hidden):
    """KL over the whole vocabulary, in nats, of the student's and the teacher's final hidden states (N, d).
    Returns (sum, losses (N,))."""
    def row_loss(logits, rows, need_gradient):
        return full_kl_of(logits, fitted(teacher.logits(teacher_hidden[rows]), logits.shape[1]))
    return linear_loss(hidden.to(model.dtype), model.unembedding, row_loss)


def fitted(logits, n_rows):
    """A teacher's logits (N, V) for a student's table of n_rows. Tables of models that share a tokenizer may
    differ in how many rows behind its ids they have to spare."""
    return F.pad(logits, (0, n_rows - logits.shape[1]), value=-1e9)


def top_kl_of(logits, ids, log_p):
    """(KL (N,), its gradient by the logits (N, V)) over the 51 classes; logits (N, V) of the student.

    The loss is the sum of p_c (log p_c - log q_c) over the classes c. Here q is the student's softmax, and
    q_rest, its probability of the 51st class, the sum of q over all tokens but the 50. By the logit of token
    i,

        the derivative of -log q_c, where c is one of the 50, is   q_i - 1 if i is c, else q_i
        the derivative of -log q_rest is                           q_i if i is one of the 50,
                                                                   else q_i - q_i / q_rest

    The sum of these, weighted by the p, which sum to 1, is q_i - p_i for the 50, and
    q_i - p_rest q_i / q_rest for the others.
    """
    log_q = at_least_fp32(logits).log_softmax(-1)
    top, rest = log_q.gather(1, ids), rest_of(log_q, ids)
    p = log_p.exp()
    loss = (p * (log_p - torch.cat([top, rest], 1))).sum(1)
    q = log_q.exp_()  # in place, as log_q is not needed any more
    gradient = q * (1 - (log_p[:, -1:] - rest).exp())
    return loss, gradient.scatter_(1, ids, (top.exp() - p[:, :-1]).to(gradient.dtype))


def full_kl_of(logits, teacher_logits):
    """(KL (N,), its gradient by the logits (N, V)) over the whole vocabulary; logits and teacher_logits (N,
    V)."""
    log_q, log_p = at_least_fp32(logits).log_softmax(-1), at_least_fp32(teacher_logits).log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), log_q.exp() - p


if __name__ == "__main__":
    run_main(main)
