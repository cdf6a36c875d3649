"""The next-token loss, from hidden states and a frozen output matrix, without the logits of a whole window.

Shape suffixes: T = tokens, D = hidden size, V = vocabulary size, C = tokens of one chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of a position that is not scored
CHUNK_LOGITS = 2**24  # logits held at once: 64 MiB in float32


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens may have their logits in memory at once."""
    return max(16, CHUNK_LOGITS // vocabulary)


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over the scored tokens of -log p(label), in nats and float32, a chunk of tokens at a time."""
    total = logits_TV.new_zeros((), dtype=torch.float32)
    size = chunk_tokens(logits_TV.shape[-1])
    for logits_CV, labels_C in zip(logits_TV.split(size), labels_T.split(size), strict=True):
        # Recomputed for its gradient, or every chunk would keep its float32 log-probabilities until then.
        total = total + checkpoint(_chunk_loss, logits_CV, labels_C, use_reentrant=False)
    return total


def _chunk_loss(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return F.cross_entropy(logits_CV.float(), labels_C, ignore_index=IGNORED, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy(hidden_TD @ W_VD.T + bias_V, labels_T)` for a W that does not train.

    The gradient of the hidden states is formed beside the loss, chunk by chunk, so that the backward pass neither
    keeps nor computes any logits again: as many FLOPs as the plain way, and memory for one chunk in place of T x V.
    """

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, W_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient_TD = torch.empty_like(hidden_TD) if wanted else None
        size = chunk_tokens(W_VD.shape[0])
        for start in range(0, len(hidden_TD), size):
            labels_C = labels_T[start : start + size]
            logits_CV = F.linear(hidden_TD[start : start + size], W_VD, bias_V).float()
            log_p_CV = F.log_softmax(logits_CV, dim=-1)
            total += F.nll_loss(log_p_CV, labels_C, ignore_index=IGNORED, reduction="sum")
            if wanted:
                # Nothing here asks a GPU how many tokens are scored: that would wait for all before it.
                labels_C1 = labels_C[:, None]
                error_CV = log_p_CV.exp_()
                error_CV.scatter_add_(1, labels_C1.clamp(min=0), error_CV.new_full(labels_C1.shape, -1))
                part_CD = error_CV.to(W_VD.dtype) @ W_VD
                gradient_TD[start : start + size] = part_CD.masked_fill_(labels_C1 == IGNORED, 0)
                del error_CV, part_CD
            del logits_CV, log_p_CV  # before the next chunk forms its own
        ctx.save_for_backward(gradient_TD)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient_TD,) = ctx.saved_tensors
        return gradient_TD * grad.to(gradient_TD.dtype), None, None, None


def linear_cross_entropy(hidden_TD: Tensor, W_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
    """Sum over the scored tokens of -log p(label), in nats; computes in the autocast dtype where autocast is on.

    Raises if the output matrix trains: its gradient is not formed here.
    """
    if torch.is_grad_enabled() and W_VD.requires_grad:
        raise ValueError("the output matrix trains, and this loss gives it no gradient: use cross_entropy on logits")
    kind = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_TD.dtype
    with torch.autocast(kind, enabled=False):
        bias_V = None if bias_V is None else bias_V.to(dtype)
        return LinearCrossEntropy.apply(hidden_TD.to(dtype), W_VD.to(dtype), bias_V, labels_T)
