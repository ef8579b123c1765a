"""Cross-entropy over a large vocabulary without all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.checkpoint import checkpoint

from hpc_oialr.data.base import Batch
from hpc_oialr.errors import ConfigError
from hpc_oialr.torch_compat import is_compiled

ChunkSetting = int | Literal["auto"] | None

# What their head returns are the logits; other models scale or cap it afterwards.
MODELS = ("GPT2LMHeadModel", "LlamaForCausalLM")
LARGE_VOCABULARY = 32_768
CHUNK_LOGITS = 2**26  # 256 MiB in fp32


def chunked_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Sum of the cross-entropies of ``head(hidden)``, ``chunk`` tokens at a time; a scalar with a graph.

    Backward computes the logits again, so that at most chunk x V of them exist, at the price of one more product with
    the head: V the vocabulary, N the tokens, D the width.

    Parameters
    ----------
    head
        From n x D to n x V, without random numbers.
    hidden
        N x D.
    targets
        N indices below V.
    chunk
        Tokens.
    """

    def loss(states: Tensor, labels: Tensor) -> Tensor:
        logits = head(states)
        # At least fp32.
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(loss, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.stack(losses).sum()


def aligned(head: nn.Module, logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``logits``, or the same by a weight padded with rows of zeros, where a GPU needs that for its fast kernels.

    With GPT-2's 50,257 tokens the head's products took 30 of 64 ms of a step in kernels for unaligned data on an H100.
    """
    own: Any = head
    if type(head) is not nn.Linear or own.bias is not None or not misaligned(own.weight):
        return logits
    vocabulary = own.weight.shape[0]
    weight = pad(own.weight, (0, 0, 0, -vocabulary % 64))
    return lambda hidden: linear(hidden, weight)[:, :vocabulary]


def misaligned(weight: Tensor) -> bool:
    """Whether rows of logits would not begin at multiples of 16 bytes, on a GPU."""
    return weight.is_cuda and weight.shape[0] * weight.element_size() % 16 != 0


def next_token_loss(model: nn.Module, batch: Batch, setting: ChunkSetting) -> Tensor | None:
    """Sum of the losses of ``batch`` by :func:`chunked_cross_entropy`; None where ``setting`` wants all logits at once.

    Computed in the place of the model's head, within its forward pass, as DDP and FSDP need it. Raises
    :class:`ConfigError` for a number of tokens and a model it cannot be used for.
    """
    inner: Any = getattr(model, "module", model)  # of DDP
    kinds = {kind.__name__ for kind in type(inner).__mro__}
    if setting is None or kinds.isdisjoint(MODELS) or is_compiled(inner):
        if isinstance(setting, int):
            rule = f"needs one of {', '.join(MODELS)}, not compiled; the model is {type(inner).__name__}"
            raise ConfigError("task.loss_chunk", setting, rule, fix='Set "auto".')
        return None
    vocabulary = inner.config.vocab_size
    if setting == "auto" and vocabulary < LARGE_VOCABULARY:
        return None
    chunk = max(1, CHUNK_LOGITS // vocabulary) if setting == "auto" else setting
    head, targets = inner.get_output_embeddings(), batch["labels"][:, 1:].flatten()
    logits = head.forward

    def forward(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy(aligned(head, logits), hidden[:, :-1].flatten(0, 1), targets, chunk)

    head.forward = forward
    try:
        loss: Tensor = model(input_ids=batch["input_ids"]).logits
    finally:
        del head.forward
    return loss
