"""Loss of a language model on text, in nats a token and bits a byte, after a prompt if one is given."""
import math

import numpy as np
import torch
from tqdm import tqdm

from data.errors import InputError
from data.packing import Layout
from data.text import load_text
from evals import pm

MAX_TOKENS = 2_000_000  # longer text is scored in part, in windows that are evenly spread over it


@torch.no_grad()
def text_loss(files, subject):
    """Print the loss on the documents in `files`; of files that the model was trained on, on the held-out
    ones. Returns (figures for JSON, a dict for each window).

    The documents, each followed by <eot>, are one stream, which is cut into windows that do not overlap. A
    window is as long as the context has room for, and its first token is not scored. After a prompt there is
    less room, so losses with and without a prompt are comparable only if --ctx makes the room equal. Standard
    errors are taken over windows.
    """
    stream = load_stream(files, subject)
    ctx = min(subject.ctx, len(stream))
    if ctx < 2:
        raise InputError(f"{files[0]}: the text to score has {len(stream)} tokens; give more")
    starts = np.arange(0, len(stream) - ctx + 1, ctx)
    starts = starts[::math.ceil(len(starts) * ctx / MAX_TOKENS)]
    micro_batch = max(1, subject.at_once // ctx)  # windows that are computed together
    items = []
    for i in tqdm(range(0, len(starts), micro_batch), desc="scoring", unit="row", disable=None, leave=False):
        windows = [stream[start:start + ctx] for start in starts[i:i + micro_batch]]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64)).to(subject.device)
        layout = Layout([ctx] * len(windows), range(len(windows)))  # each window is a context of its own
        hidden = subject.model(tokens.flatten(), layout, subject.prefix).view(*tokens.shape, -1)
        _, losses = subject.model.token_losses(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for window, nats in zip(windows, losses.view(len(windows), -1).sum(1).tolist()):
            if not math.isfinite(nats):
                raise InputError(f"{subject.name}: the loss is not a finite number; the model's weights may "
                                 "be damaged")
            items.append({"start": int(starts[len(items)]), "nats": nats, "tokens": ctx - 1,
                          "bytes": subject.tokenizer.count_bytes(window[1:])})
    nats, tokens, n_bytes = (np.array([item[key] for item in items], float)
                             for key in ("nats", "tokens", "bytes"))
    mean, error = pm.mean_and_error(nats / tokens, tokens, np.arange(len(items)))
    figures = {"benchmark": "lm", "model": subject.name, **pm.figure("loss", mean, error),
               "bits_per_byte": nats.sum() / math.log(2) / n_bytes.sum(), "tokens": int(tokens.sum()),
               "windows": len(items)}
    print(f"\n{len(items):,} windows of {ctx} tokens\n\n"
          f"  loss           {mean:.4f} nats a token ± {error:.4f}\n"
          f"  bits per byte  {figures['bits_per_byte']:.4f}")
    return figures, items


def load_stream(files, subject):
    """The token ids of the documents to score. Raises InputError if the model was trained on some of the
    files only."""
    fractions = {subject.held_out_part(path) or 0.0 for path in files}
    if len(fractions) > 1:
        raise InputError(f"{files[0]}: the model was trained on some of these files and not, or with another "
                         "held-out part, on others; evaluate them apart")
    held_out = fractions.pop()
    train, rest = load_text(files, subject.tokenizer, held_out or 0.01)  # any part will do if all is scored
    names = ", ".join(map(str, files))
    if held_out:
        print(f"{names}: held-out documents only, as the model was trained on the others")
        return np.asarray(rest.tokens)
    print(f"{names}: all documents")
    return np.concatenate([train.tokens, rest.tokens])
