"""Frozen factors in autocast's dtype, made when the factors have changed instead of in every forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AutocastCopies:
    """Copies of a layer's ``U`` and ``Vh`` in the dtype of autocast.

    Autocast remembers its casts of what is trained, not of what is frozen: two kernels and 6 bytes a number in each
    forward pass. Copies hardly raise the peak of a step, since autograd keeps the casts of all layers until their
    backward pass anyway (not under activation checkpointing); between steps they add 2 bytes a number to the 4 of
    the factors. Those stay in fp32: stored in bf16 (``oialr.factor_dtype``) they would need no copies, but each
    rotation would round them anew.

    They are no part of a layer's state: not saved, not copied, not moved, but made again where they are needed.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self._made_of: tuple[Any, ...] = ()

    def of(self, U: Tensor, Vh: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The copies; the factors themselves while they train, or if a CUDA graph is being captured without copies."""
        # Autocast leaves float64 alone.
        if U.requires_grad or Vh.requires_grad or U.dtype in (dtype, torch.float64) or U.is_inference():
            return U, Vh
        made_of = (dtype, U.data_ptr(), Vh.data_ptr(), U._version, Vh._version)
        if made_of != self._made_of:
            if U.is_cuda and torch.cuda.is_current_stream_capturing():
                return U, Vh
            # Of an evaluation in inference mode they would be tensors that no training step can use.
            with torch.inference_mode(False), torch.no_grad():
                self.tensors = (U.detach().to(dtype), Vh.detach().to(dtype))
            self._made_of = made_of
        U, Vh = self.tensors
        return U, Vh

    def refresh(self, U: Tensor, Vh: Tensor) -> None:
        """Follow new values of the factors at once, in place: a captured CUDA graph reads copies where they are."""
        if not self.tensors:
            return
        with torch.inference_mode(False), torch.no_grad():
            for copy, factor in zip(self.tensors, (U, Vh), strict=True):
                copy.copy_(factor)
        dtype = self.tensors[0].dtype
        self._made_of = (dtype, U.data_ptr(), Vh.data_ptr(), U._version, Vh._version)

    def clear(self) -> None:
        """Let go of the copies."""
        self.tensors, self._made_of = (), ()

    def __deepcopy__(self, memo: Any) -> AutocastCopies:
        return AutocastCopies()

    def __reduce__(self) -> tuple[type[AutocastCopies], tuple[()]]:
        return AutocastCopies, ()
