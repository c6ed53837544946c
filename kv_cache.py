"""The keys and values of tokens that were read, so that what follows is computed without reading them again.

A prompt is read once and becomes a prefix that everything after it shares. Sampled tokens are appended one by
one.
"""
import torch


class Cache:
    """Keys and values of all layers: of prefixes that all sequences share, each stored once, and of n
    sequences that go on behind them.

    A new cache is n empty sequences with room for `room` tokens each. Every forward pass with it appends
    tokens. `fork` gives a cache of new sequences behind what this one has read, without a copy of it.
    `as_prefix` gives one for packed rows, to which nothing is appended.
    """

    def __init__(self, room, n=1, prefixes=()):
        self.n, self.room = n, room
        self.length = 0  # tokens appended to each sequence; the model counts them after its last layer
        self.stored = []  # for each layer (2, n, G, room, D), keys and values of G key heads
        self.prefixes = list(prefixes)  # in reading order; each has for each layer (keys, values), (P, G, D)
        self.prefix_tokens = sum(len(of_layers[0][0]) for of_layers in self.prefixes)

    def fork(self, n, room):
        """n empty sequences, with room for `room` tokens each, behind what this cache's one sequence has
        read.
        """
        if self.n != 1:
            raise ValueError(f"only one sequence can become a shared prefix, and this cache has {self.n}")
        if self.length == 0:
            return Cache(room, n, self.prefixes)
        read = [[x[0, :, :self.length].transpose(0, 1) for x in of_layer] for of_layer in self.stored]
        return Cache(room, n, [*self.prefixes, read])

    def as_prefix(self):
        """What was read, as a prefix to read packed rows behind."""
        return self.fork(1, 0)

    def select(self, rows):
        """Keep the sequences of these numbers (a tensor), in this order. A number may occur several times."""
        self.stored, self.n = [x.index_select(1, rows) for x in self.stored], len(rows)

    def append(self, layer, k, v):
        """Store a layer's keys and values (n, t, G, D) of new tokens. Returns those of all tokens so far,
        views (n, T, G, D)."""
        n, t, n_key_head, d_head = k.shape
        if layer == len(self.stored):
            self.stored.append(k.new_empty(2, n, n_key_head, self.room, d_head))
        end = self.length + t
        for stored, new in zip(self.stored[layer], (k, v)):
            stored[:, :, self.length:end] = new.transpose(1, 2)
        return [stored[:, :, :end].transpose(1, 2) for stored in self.stored[layer]]


@torch.no_grad()
def read(model, tokens, before=None):
    """Read token ids (P,) into a new cache, behind what the cache `before` has read, if one is given.

    Returns (the cache, the hidden state (1, d_model) at the last token).
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.unembedding.device)
    cache = Cache(len(tokens)) if before is None else before.fork(1, len(tokens))
    return cache, model(tokens[None], cache=cache)[:, -1]
