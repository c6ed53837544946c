"""Loss of a language model on text, in nats a token and bits a byte; behind a prompt, if one is given."""
import math

import numpy as np
import torch
from tqdm import tqdm

from data.errors import InputError
from data.text import load_text
from evals import pm
from data.packing import Layout

MAX_TOKENS = 2_000_000  # scored at most, evenly spread windows


@torch.no_grad()
def text_loss(files, subject):
    """(figures, one dict per window) of documents in `files`; only the held-out ones of files that the model was trained on.

    The text is one stream of documents, each followed by <eot>, cut into windows of the context's length that do not
    overlap; a window's first token is not scored. Behind a prompt windows are shorter, so the losses with and without one are
    comparable only at the same room: give --ctx. Standard errors are by window.
    """
    fractions = {subject.held_out_part(path) or 0.0 for path in files}
    if len(fractions) > 1:
        raise InputError(f"{files[0]}: the model was trained on some of these files and not, or with another held-out part, on others; evaluate them apart")
    held_out = fractions.pop()
    sides = load_text(files, subject.tokenizer, held_out or 0.01)
    print(f"{', '.join(map(str, files))}: " + ("held-out documents only, as the model was trained on the others" if held_out else "all documents"))
    stream = np.asarray(sides[1].tokens if held_out else np.concatenate([side.tokens for side in sides]))
    ctx = min(subject.ctx, len(stream))
    if ctx < 2:
        raise InputError(f"{files[0]}: the text to score has {len(stream)} tokens; give more")
    starts = np.arange(0, len(stream) - ctx + 1, ctx)
    starts = starts[::-(-len(starts) * ctx // MAX_TOKENS)]
    at_once = max(1, subject.at_once // ctx)
    items = []
    for i in tqdm(range(0, len(starts), at_once), desc="scoring", unit="row", disable=None, leave=False):
        part = starts[i:i + at_once]
        tokens = torch.from_numpy(np.stack([stream[s:s + ctx] for s in part]).astype(np.int64)).to(subject.device)
        hidden = subject.model(tokens.flatten(), Layout([ctx] * len(part), range(len(part))), subject.prefix).view(len(part), ctx, -1)
        _, losses = subject.model.token_losses(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for s, loss in zip(part, losses.view(len(part), -1).sum(1).tolist()):
            items.append({"start": int(s), "nats": loss, "tokens": ctx - 1, "bytes": subject.tokenizer.count_bytes(stream[s + 1:s + ctx])})
    nats, tokens, n_bytes = (np.array([item[k] for item in items], float) for k in ("nats", "tokens", "bytes"))
    mean, error = pm.mean_and_error(nats / tokens, tokens, np.arange(len(items)))
    figures = {"benchmark": "lm", "model": subject.name, **pm.figure("loss", mean, error),
               "bits_per_byte": nats.sum() / math.log(2) / n_bytes.sum(), "tokens": int(tokens.sum()), "windows": len(items)}
    print(f"\n{len(items):,} windows of {ctx} tokens\n\n  loss           {mean:.4f} nats a token ± {error:.4f}\n  bits per byte  {figures['bits_per_byte']:.4f}")
    return figures, items
