"""Linear layers whose weight is frozen, with a trained addition to it."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.svd import SVD


class AdaptedLinear(nn.Linear):
    """``y = (W + dW) x + b`` with W (m x n) and b of a dense layer, frozen; dW is zero at the start.

    ``weight`` and ``bias`` are the dense layer's own parameters, under the same names.
    """

    r: int

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight = dense.weight.requires_grad_(False)
        self.bias = dense.bias  # also None
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(dense.training)

    @abstractmethod
    def addition(self, *, mean: bool = False) -> Tensor:
        """dW (m x n) in float64; ModelError if it depends on the input, unless its ``mean`` will do."""

    @torch.no_grad()
    def merged(self, *, mean: bool = False) -> nn.Linear:
        """A dense layer with weight ``W + dW``; ``mean`` as in :meth:`addition`."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        merged = (self.weight.double() + self.addition(mean=mean)).to(self.weight.dtype)
        layer.weight = nn.Parameter(merged)
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and r."""
        return f"{super().extra_repr()}, r={self.r}"


class SaraLinear(AdaptedLinear):
    """SARA: ``dW = A diag(lambda) B`` with A (m x r), lambda (r), B (r x n) trained; ``r (m + n + 1)`` numbers.

    As in LoRA ``A = 0`` at the start and B is random, so that the first step moves all of A.
    """

    def __init__(self, dense: nn.Linear, r: int) -> None:
        super().__init__(dense)
        self.r = r
        like: Any = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.A = nn.Parameter(torch.zeros(self.out_features, r, **like))
        self.lambda_ = nn.Parameter(torch.ones(r, **like))
        self.B = nn.Parameter(torch.empty(r, self.in_features, **like))
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n), output (..., m)."""
        return F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.B) * self.lambda_, self.A)

    def addition(self, *, mean: bool = False) -> Tensor:
        """``A diag(lambda) B``, for any input."""
        return (self.A * self.lambda_).double() @ self.B.double()


class MoSaraLinear(AdaptedLinear):
    """Mo-SARA: ``dW(x) = U_r diag(sum_e g_e(x) lambda_e) Vh_r`` with W's leading bases frozen; ``2 E r`` numbers.

    The router ``g = softmax(R Vh_r x)`` sees a token through the frozen basis, so that R is E x r instead of E x n. It is
    random at the start: with equal gates all lambda_e would have the same gradient, and stay equal for good.

    Attributes
    ----------
    load
        Mean of ``g`` over all tokens of the training so far (E), padding included; of several ranks those of rank 0,
        whose buffers DDP sends to all.
    tokens
        How many these are.
    """

    load: Tensor
    tokens: Tensor

    def __init__(self, dense: nn.Linear, factors: SVD, experts: int) -> None:
        super().__init__(dense)
        self.r, self.experts = len(factors.s), experts
        like: Any = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.U, self.Vh = (
            nn.Parameter(basis.to(**like).contiguous(), requires_grad=False) for basis in (factors.U, factors.Vh)
        )
        self.lambda_ = nn.Parameter(torch.zeros(experts, self.r, **like))
        self.router = nn.Parameter(torch.empty(experts, self.r, **like))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self.register_buffer("load", torch.full((experts,), 1 / experts, **like))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64, device=dense.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n), output (..., m)."""
        z = F.linear(input, self.Vh)
        gates = F.linear(z, self.router).softmax(-1)
        if self.training:
            self._record(gates.detach().reshape(-1, self.experts))
        return F.linear(input, self.weight, self.bias) + F.linear(z * (gates @ self.lambda_), self.U)

    @torch.no_grad()
    def _record(self, gates: Tensor) -> None:
        self.tokens += len(gates)
        self.load += (gates.mean(0) - self.load) * (len(gates) / self.tokens)

    def addition(self, *, mean: bool = False) -> Tensor:
        """dW at the mean gates of the training, ``U_r diag(load lambda) Vh_r``; without ``mean`` a ModelError."""
        if not mean:
            raise ModelError(
                "a Mo-SARA layer cannot be merged: its router weighs the sets of singular values anew for every token, "
                "so no single weight gives its outputs. Keep the layers (oialr export --format pt2 or onnx), fine-tune "
                "with SARA, or merge an approximation: hpc_oialr.finetune.merge_adapters(model, by_mean_load=True)."
            )
        return (self.U.double() * (self.load.double() @ self.lambda_.double())) @ self.Vh.double()
