"""Drawing text from a model: several prompts at a time, several samples of each, token by token.

`stream` is the one loop. chat.py shows what it yields as it comes; evaluations keep the finished samples.
"""
import codecs
from collections import deque

import torch

from kv_cache import Cache

LIKELIEST = 256  # tokens that are tried first with top_p


class TokenSample:
    """A sample as token ids, which ends with the first of `end_ids`."""

    def __init__(self, end_ids=()):
        self.end_ids, self.tokens, self.ended = end_ids, [], False

    def add(self, token):
        self.tokens.append(token)
        self.ended |= token in self.end_ids


class TextSample(TokenSample):
    """A sample as text, which ends before the first of `stops`, which are texts, or with a token that ends a
    document, a completion or a chat model's answer.

    text: what was sampled so far, without the stop. n_settled: how many of its characters are certain to
    remain; the others may turn out to be the beginning of a stop.
    """

    def __init__(self, tokenizer, stops=()):
        super().__init__(end_ids=tokenizer.ends)
        self.tokenizer, self.stops, self.text, self.n_settled = tokenizer, stops, "", 0
        self.stop_beginnings = tuple(stop[:n] for stop in stops for n in range(1, len(stop)))
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens

    def add(self, token):
        """Append a token. Returns the piece of text that is settled by it, which may be empty."""
        super().add(token)
        if self.ended:
            return ""
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        stop_places = [self.text.index(stop) for stop in self.stops if stop in self.text]
        if stop_places:
            self.text, self.ended = self.text[:min(stop_places)], True
        n_open = 0
        if not self.ended and self.text.endswith(self.stop_beginnings):
            n_open = max(len(start) for start in self.stop_beginnings if self.text.endswith(start))
        n_before, self.n_settled = self.n_settled, len(self.text) - n_open
        return self.text[n_before:self.n_settled]


@torch.no_grad()
def stream(model, prompts, samples, max_new=256, temperature=1.0, top_p=1.0, n_vocab=None, generators=None,
           prefix=None, cache=None):
    """Sample token by token. Each token is added to its sample; then (sample, what `add` returned) is
    yielded: of a TextSample the next piece of its text.

    A sample is done when it has `ended`, has got max_new tokens here, or has filled the model's context.
    Between two tokens the caller may leave the loop, or set `ended` to stop one sample alone.

    prompts: lists of token ids. samples: for each prompt a list of n samples.
    n_vocab: ids from there on are padding of the embedding table and are never sampled.
    generators: for each prompt the torch.Generator of its random numbers (default: torch's global one).
    prefix: a cache of what stands before every prompt.
    cache: instead of a prefix, and for a single sample: a cache that it goes on in, with all that is read.

    Nothing is padded: the prompts are read as far as the shortest goes, and then all go on token by token,
    the longer ones with their own. So prompts of about one length belong together. Raises ValueError if a
    prompt is empty or leaves no room in the model's context.
    """
    cache, hidden, sequences = begin(model, prompts, samples, max_new, generators, prefix, cache)
    while True:
        u = torch.tensor([numbers[0] for _, _, numbers in sequences], dtype=torch.float64)
        drawn = next_tokens(model.logits(hidden)[:, :n_vocab], temperature, top_p, u).tolist()
        tokens, unfinished = [], []  # the next tokens, and the places of the sequences that go on with them
        for place, ((sample, unread, numbers), token) in enumerate(zip(sequences, drawn)):
            if unread:
                token = unread.popleft()
            else:
                numbers.popleft()
                yield sample, sample.add(token)
                if sample.ended or not numbers:
                    continue
            tokens.append(token)
            unfinished.append(place)
        if not tokens:
            return
        if len(tokens) < len(sequences):  # finished sequences cost nothing more
            sequences = [sequences[place] for place in unfinished]
            cache.select(torch.tensor(unfinished, device=hidden.device))
        hidden = model(torch.tensor(tokens, device=hidden.device)[:, None], cache=cache)[:, -1]


def begin(model, prompts, samples, max_new, generators, prefix, cache):
    """Read the prompts of `stream` as far as the shortest goes, each once for its n samples.

    Returns (cache of one sequence a sample, hidden states (sequences, d_model) at the last tokens read,
    [(sample, tokens of its prompt still to read, a random number for each token that it may get), …]).
    """
    before = cache or prefix or Cache(0)
    room = model.config.ctx - before.prefix_tokens - before.length
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if shortest == 0 or longest >= room:
        n_tokens = longest + model.config.ctx - room
        raise ValueError(f"a prompt of {n_tokens} tokens leaves no room in a context of {model.config.ctx}")
    n, device, longest_end = len(samples[0]), model.unembedding.device, min(longest + max_new, room)
    cache = cache or before.fork(len(prompts), longest_end)
    tokens = torch.tensor([list(prompt[:shortest]) for prompt in prompts], device=device)
    prompt_of_sample = torch.arange(len(prompts), device=device).repeat_interleave(n)
    hidden = model(tokens, cache=cache)[prompt_of_sample, -1]
    if n > 1 and len(prompts) == 1:  # the samples share what was read, without a copy
        cache = cache.fork(n, longest_end)
    elif n > 1:
        cache.select(prompt_of_sample)
    sequences = []
    for prompt, group, generator in zip(prompts, samples, generators or [None] * len(prompts)):
        numbers = torch.rand(max_new, n, dtype=torch.float64, generator=generator)
        numbers = numbers[:room - len(prompt)].T.tolist()
        sequences += [(sample, deque(prompt[shortest:]), deque(row)) for sample, row in zip(group, numbers)]
    return cache, hidden, sequences


def next_tokens(logits, temperature, top_p, u):
    """Draw one token (n,) for each row of logits (n, V), by random numbers u (n,) in [0, 1), in fp64 on the
    CPU.

    Temperature 0 takes the likeliest token. top_p leaves the smallest set of the likeliest tokens that
    together have this probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_p == 1:
        return draw(p, u)
    if p.device.type != "cpu":
        return draw_likely(*p.sort(-1, descending=True), top_p, u)
    # To sort a vocabulary of 50,000 takes a CPU twenty times as long as to find the likeliest few, which are
    # enough for most rows.
    tokens = torch.empty(len(p), dtype=torch.long)
    top, ids = p.topk(min(LIKELIEST, p.shape[1]))
    enough = top.sum(-1) >= top_p
    tokens[enough] = draw_likely(top[enough], ids[enough], top_p, u[enough])
    tokens[~enough] = draw_likely(*p[~enough].sort(-1, descending=True), top_p, u[~enough])
    return tokens


def draw_likely(p, ids, top_p, u):
    """Draw a token (n,) of the smallest set of the likeliest that together have the probability top_p: p and
    ids (n, k), the likeliest first; u as of next_tokens."""
    p_likelier = p.cumsum(-1) - p  # of all tokens that are likelier
    p[:, 1:].masked_fill_(p_likelier[:, 1:] >= top_p, 0)  # the likeliest one remains, whatever top_p
    return ids.gather(1, draw(p, u)[:, None]).squeeze(1)


def draw(p, u):
    """One index (n,) for each row of p (n, V), in proportion to p, by one random number a row: u (n,).

    torch.multinomial draws n * V random numbers, which on CPUs takes longer than the model. Sums are fp64 on
    CPUs alone, as not every other device has it.
    """
    precise = torch.float64 if p.device.type == "cpu" else torch.float32
    sums = p.to(precise).cumsum(-1)
    total = sums[:, -1:]
    place = u.to(precise).to(p.device)[:, None] * total
    place = torch.minimum(place, total.nextafter(torch.zeros_like(total)))  # it may have been rounded up
    return torch.searchsorted(sums, place, right=True).squeeze(1)


def generate(model, prompts, n=1, end_ids=(), **settings):
    """n samples of each prompt: for each a list of n lists of token ids. Settings: see `stream`."""
    samples = [[TokenSample(end_ids) for _ in range(n)] for _ in prompts]
    for _ in stream(model, prompts, samples, **settings):
        pass
    return [[sample.tokens for sample in group] for group in samples]
