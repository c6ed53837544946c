"""Loss of a language model on text, in nats a token and bits a byte, after a prompt if one is given."""
import math

import numpy as np
import torch
from tqdm import tqdm

from data.errors import InputError
from data.files import content_key
from data.packing import Layout
from data.text import load_text
from evals import pm

MAX_TOKENS = 2_000_000  # of longer text evenly spread windows are scored


@torch.no_grad()
def text_loss(files, subject):
    """Print the loss on the documents in `files`; of files that the model was trained on, on the held-out
    ones. Returns (figures for JSON, a dict for each window).

    The documents, each followed by <eot>, are one stream, which is cut into windows of the length that there
    is room for; a window's first token is not scored. A prompt takes room, so losses with and without one
    are comparable only if --ctx makes the room equal. Standard errors are taken over windows.
    """
    fractions = {subject.held_out_part(path) or 0.0 for path in files}
    if len(fractions) > 1:
        raise InputError(f"{files[0]}: the model was trained on some of these files and not, or with another "
                         "held-out part, on others; evaluate them apart")
    held_out = fractions.pop()
    sides = load_text(files, subject.tokenizer, held_out or 0.01)  # if all is scored, any part will do
    if held_out and not sides[0].by_document and subject.trained_with(files) != {content_key(files)}:
        raise InputError(f"{files[0]}: with too few documents to hold out whole ones, the end of all text that "
                         "the model was trained on was held out; evaluate on the same files together, or on "
                         "others")
    which = "held-out documents only, as the model was trained on the others" if held_out else "all documents"
    print(f"{', '.join(map(str, files))}: {which}")
    stream = np.concatenate([side.tokens for side in (sides[1:] if held_out else sides)])
    ctx = min(subject.ctx, len(stream))
    if ctx < 2 or len(stream) < 3:  # a token to begin with, one of text, and <eot>
        raise InputError(f"{files[0]}: the text to score has {len(stream)} tokens, in windows of {ctx}; give "
                         "more")
    n_windows = len(stream) // ctx
    step = math.ceil(n_windows * ctx / MAX_TOKENS)
    windows = stream[:n_windows * ctx].reshape(-1, ctx)[::step]
    nats = []  # of each window
    micro_batch = max(1, subject.micro_tokens // ctx)  # windows
    for i in tqdm(range(0, len(windows), micro_batch), desc="scoring", unit="row", disable=None, leave=False):
        tokens = torch.from_numpy(windows[i:i + micro_batch].astype(np.int64)).to(subject.device)
        layout = Layout([ctx] * len(tokens), range(len(tokens)))  # each window is a context by itself
        hidden = subject.model(tokens.flatten(), layout, subject.prefix).view(*tokens.shape, -1)
        _, losses = subject.model.token_losses(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        nats += losses.view(len(tokens), -1).sum(1).tolist()
    if not np.isfinite(nats).all():
        raise InputError(f"{subject.name}: the loss is not a finite number; the weights may be damaged")
    items = [{"start": number * step * ctx, "nats": loss, "tokens": ctx - 1,
              "bytes": subject.tokenizer.count_bytes(window[1:])}
             for number, (window, loss) in enumerate(zip(windows, nats))]
    mean, error = pm.mean_and_error(np.array(nats) / (ctx - 1), np.ones(len(nats)), np.arange(len(nats)))
    bits_per_byte = sum(nats) / math.log(2) / sum(item["bytes"] for item in items)
    print(f"\n{len(items):,} windows of {ctx} tokens\n\n"
          f"  loss           {mean:.4f} nats a token ± {error:.4f}\n  bits per byte  {bits_per_byte:.4f}")
    return {"benchmark": "lm", "model": subject.name, **pm.figure("loss", mean, error),
            "bits_per_byte": bits_per_byte, "tokens": len(items) * (ctx - 1), "windows": len(items)}, items
