"""Sampling from a model: several prompts at a time, several samples of each, and each from random numbers of its own."""
import torch

from model import Cache, read


def sample(logits, temperature, top_p, u):
    """One token per row of logits (n, V), by the random numbers u (n,) in [0, 1). Temperature 0 takes the likeliest; top_p keeps the
    smallest set of the likeliest tokens whose probability reaches it."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p[:, 1:][(p.cumsum(-1) - p)[:, 1:] >= top_p] = 0  # the likeliest one stays, whatever top_p
        return order.gather(1, draw(p, u)).squeeze(1)
    return draw(p, u).squeeze(1)


def draw(p, u):
    """One index (n, 1) per row of p (n, V), in proportion to it, by one random number a row: torch.multinomial draws one for each
    of the n * V, which on CPUs takes longer than the model."""
    total = p.double().cumsum(-1)
    u = u.to(p.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, torch.minimum(u, total[:, -1:].nextafter(torch.zeros_like(u))), right=True)


@torch.no_grad()
def stream(model, prompts, n=1, seeds=None, max_new=256, temperature=1.0, top_p=1.0, stop=(), n_vocab=None, prefix=None, done=None):
    """Yield (rows (m,), tokens (m,)) step by step for the samples still running; row i * n + j is sample j of prompt i. A stop token is
    yielded, then ends. `done(rows, tokens)`, if given, tells after each step which of them (m,) have ended for another reason.

    prompts: lists of token ids. seeds: a number for each, from which all its random numbers come (default: others each time).
    prefix: a cache of what stands before every prompt, if anything. n_vocab: ids from there on are padding of the table and are
    never sampled. Raises ValueError if a prompt leaves no room in the model's ctx.

    Nothing is padded: the prompts are read as far as the shortest goes, and then all go on token by token, the longer ones
    with their own. So prompts of about one length belong together.
    """
    device, before = model.unembedding.device, prefix.prefix_tokens + prefix.length if prefix else 0
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    room = (model.config.ctx - before - lengths).clamp(max=max_new)
    if lengths.min() == 0 or room.min() <= 0:
        raise ValueError(f"a prompt of {before + lengths.max()} tokens leaves no room in a context of {model.config.ctx}")
    cache, last, at = begin(model, prompts, n, int((lengths + room).max()), prefix)
    prompt_of = torch.arange(len(prompts)).repeat_interleave(n)
    starts, ends, rows = lengths[prompt_of].to(device), (lengths + room)[prompt_of].to(device), torch.arange(len(prompt_of), device=device)
    longest, stop, u = lengths.max(), torch.tensor(list(stop), dtype=torch.long, device=device), random_numbers(seeds, len(prompts), n, max_new).to(device)
    texts = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(prompt) for prompt in prompts], batch_first=True)[prompt_of].to(device)
    while True:
        new = at >= starts[rows]  # beyond its prompt
        tokens = sample(model.logits(last)[:, :n_vocab], temperature, top_p, u[rows, (at - starts[rows]).clamp(min=0)])
        if at < longest:
            tokens = torch.where(new, tokens, texts[rows, at])
        at += 1
        running = ~new | (torch.isin(tokens, stop, invert=True) & (at < ends[rows]))
        if new.any():
            yield rows[new], tokens[new]
            if done is not None:
                running[new] &= ~done(rows[new], tokens[new]).to(device)
        if not running.any():
            return
        if not running.all():  # finished samples cost nothing more
            alive = running.nonzero().squeeze(1)
            rows, tokens = rows[alive], tokens[alive]
            cache.select(alive)
        last = model(tokens[:, None], cache=cache)[:, -1]


def begin(model, prompts, n, room, prefix):
    """(cache of len(prompts) * n continuations, with room for so many tokens after the prefix; the hidden state of the last token
    read of each; how many tokens were read of each prompt)."""
    if len(prompts) == 1:  # its samples share what was read of it, without a copy
        cache, last = read(model, prompts[0], prefix)
        return cache.fork(n, room - len(prompts[0])), last.expand(n, -1), len(prompts[0])
    shortest = min(map(len, prompts))
    first = torch.stack([torch.as_tensor(prompt[:shortest]) for prompt in prompts]).to(model.unembedding.device)
    cache = prefix.fork(len(prompts), room) if prefix else Cache(room, len(prompts))
    last = model(first, cache=cache)[:, -1]
    rows = torch.arange(len(prompts), device=first.device).repeat_interleave(n)
    cache.select(rows)
    return cache, last[rows], shortest


def random_numbers(seeds, n_prompts, n, max_new):
    """(n_prompts * n, max_new) numbers in [0, 1): those of a prompt depend on its seed alone."""
    generators = [torch.Generator() for _ in range(n_prompts)]
    for i, generator in enumerate(generators):
        generator.seed() if seeds is None else generator.manual_seed(seeds[i])
    return torch.cat([torch.rand(max_new, n, dtype=torch.float64, generator=generator).T for generator in generators])


def generate(model, prompts, n=1, **settings):
    """n samples of each of `prompts`: for each a list of n lists of token ids. Settings: see `stream`."""
    samples = [[[] for _ in range(n)] for _ in prompts]
    for rows, tokens in stream(model, prompts, n, **settings):
        for row, token in zip(rows.tolist(), tokens.tolist()):
            samples[row // n][row % n].append(token)
    return samples
