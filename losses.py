"""Losses of the next tokens' logits, which are never held for all tokens at once.

With a vocabulary of 50,000 the logits of 8,192 tokens take 800 MB in bf16, and their gradient as much again.
So hidden states are turned into losses chunk by chunk: cross-entropy here, the losses of distillation in
distill.py.
"""
import torch


def cross_entropy(hidden, unembedding, targets, weight=None):
    """-log p(target) of each row, in nats: targets (N,). For all else see linear_loss.

    The gradient by the logits is the softmax p, minus 1 at the target. The softmax has the logits' precision.
    The losses are computed in fp32, and so is p - 1 at the target, as expm1(-loss): where p is near 1, bf16
    would leave no digits of it.
    """
    def row_loss(logits, rows, need_gradient):
        target = targets[rows, None]
        parts = logits.split(rows_at_a_time(logits.device, logits.shape[1]))
        log_sum = torch.cat([at_least_fp32(part).logsumexp(-1, keepdim=True) for part in parts])
        loss = log_sum - logits.gather(1, target)
        if not need_gradient:
            return loss.squeeze(1), None
        gradient = torch.softmax(logits, -1, out=logits)
        return loss.squeeze(1), gradient.scatter_(1, target, torch.expm1(-loss).to(logits.dtype))
    return linear_loss(hidden, unembedding, row_loss, weight)


def linear_loss(hidden, unembedding, row_loss, weight=None):
    """Any loss that is a function of logits, without ever holding the logits of all rows at once.

    hidden (N, d_model); unembedding (V, d_model); weight (N,), the factor of each row's loss, or None for 1.
    row_loss(logits, rows, need_gradient): the loss itself, for the rows of one chunk, a slice of 0 to N. It
    gets their logits (n, V), which it may overwrite, and returns (losses (n,), their gradient by the logits
    (n, V), which may be None if none is needed).

    Returns (weighted sum, a scalar with a gradient; losses (N,), without one), in fp32.
    """
    if not torch.is_grad_enabled():
        hidden, unembedding = hidden.detach(), unembedding.detach()
    precise = torch.promote_types(hidden.dtype, torch.float32)
    if weight is None:
        weight = torch.ones(len(hidden), dtype=precise, device=hidden.device)
    return _LinearLoss.apply(hidden, unembedding, weight.to(precise), row_loss)


class _LinearLoss(torch.autograd.Function):
    """linear_loss, chunk by chunk. A chunk's gradient is computed in the forward pass, while its logits are
    at hand, and the backward pass only scales it. On a CPU in bf16 this is several times faster than torch's
    own F.linear_cross_entropy."""

    @staticmethod
    def forward(ctx, hidden, unembedding, weight, row_loss):
        matrix = unembedding.to(hidden.dtype)
        need_gradient = any(ctx.needs_input_grad[:2])
        losses = torch.empty_like(weight)
        d_hidden = torch.empty_like(hidden) if need_gradient else None
        d_matrix = torch.zeros_like(unembedding) if need_gradient else None
        chunk = max(1024, rows_at_a_time(hidden.device, len(matrix)))
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(matrix))  # for every chunk's logits
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows]
            logits = torch.mm(h, matrix.T, out=buffer[:len(h)])
            losses[rows], d_logits = row_loss(logits, rows, need_gradient)
            if need_gradient:
                factor = weight[rows, None].to(h.dtype)
                d_logits = d_logits.to(h.dtype)
                d_hidden[rows] = (d_logits @ matrix) * factor
                d_matrix += d_logits.T @ (h * factor)
        ctx.save_for_backward(d_hidden, d_matrix)
        ctx.mark_non_differentiable(losses)
        return (losses * weight).sum(), losses

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_matrix = ctx.saved_tensors
        return d_hidden * d_loss, d_matrix * d_loss, None, None


def rows_at_a_time(device, vocab_size):
    """How many rows of logits to work on at a time: as many as stay in a CPU's cache, or 256 MiB on a GPU."""
    return max(1, (2**22 if device.type == "cpu" else 2**27) // vocab_size)


def at_least_fp32(x):
    """x in fp32, or as it is if it is fp64, as in tests of exactness."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
