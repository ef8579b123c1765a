"""The base of all low-rank layers: the parameters ``U``, ``S``, ``Vh`` from conversion to merging."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic, full_precision
from hpc_oialr.linalg.basis_change import orthogonality_error
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.lowrank.attachment import controller_of
from hpc_oialr.lowrank.built_weight import BuiltWeight, read_only, refuse_assignment
from hpc_oialr.lowrank.execution import prefer_factored
from hpc_oialr.lowrank.kernel_modes import Inner, times
from hpc_oialr.lowrank.marks import is_in_optimizer, pass_on_attributes, pass_on_hooks
from hpc_oialr.torch_compat import is_transformed

if TYPE_CHECKING:
    from hpc_oialr.lowrank.shared_input import SharedInput

Crossover = float | Mapping[torch.dtype, float]


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, also while ZeRO-3 has partitioned it and ``parameter.shape`` is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def rounding_bound(dtype: torch.dtype) -> float:
    """The largest ``||U^T U - I||_F / sqrt(r)`` of a basis in this dtype that nobody has written into.

    Storage in bf16 alone gives 0.004; in fp32 an update adds 1e-6, and bases are made orthonormal again at 1e-4.
    """
    return 1e-3 if dtype.itemsize >= 4 else 0.05


class AutocastCopies:
    """Copies of a layer's frozen ``U`` and ``Vh`` in the dtype of autocast, made when the factors have changed.

    Autocast caches its casts of trained weights only: frozen ones cost two kernels and 6 bytes a number in each forward
    pass. Copies add 2 bytes a number between steps, and hardly anything to the peak, as autograd keeps the casts of all
    layers until their backward pass anyway. They are not saved, copied or moved with a layer.
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
        self._made_of = (self.tensors[0].dtype, U.data_ptr(), Vh.data_ptr(), U._version, Vh._version)

    def __deepcopy__(self, memo: Any) -> AutocastCopies:
        return AutocastCopies()

    def __reduce__(self) -> tuple[type[AutocastCopies], tuple[()]]:
        return AutocastCopies, ()


class LowRankWeight(nn.Module):
    """A layer whose weight is ``U S Vh``: ``S`` (r x r) trained, ``U`` (m x r) and ``Vh`` (r x n) in some phases only.

    :meth:`adopt` changes the class of a dense layer *in place*, so that hooks, names, references held elsewhere and
    every attribute survive the conversion, and :func:`hpc_oialr.merge` turns it back.
    """

    U: nn.Parameter
    S: nn.Parameter
    Vh: nn.Parameter
    bias: nn.Parameter | None
    dense_class: type[nn.Module]  # the layer's class before the conversion, and after merging
    dense_shape: torch.Size  # m x n is (leading axis) x (all the rest)
    crossover: Crossover  # see prefer_factored; a number, or one for each dtype of the products
    # Whether U and Vh may have gradients; while False, requires_grad_(True) is undone at the next forward pass.
    bases_trained: bool = False
    # Rows of the input of the last training pass that was not compiled.
    tokens: int = 0
    # Where, and after how many writes, U and Vh were last found orthonormal.
    known_bases: tuple[int, ...] = ()
    # None where an engine shards the factors.
    autocast_copies: AutocastCopies | None = None
    # Of a linear layer that is called with the same tensor as others.
    shared_input: SharedInput | None = None

    @classmethod
    def adopt(cls, layer: nn.Module, U: Tensor, S: Tensor, Vh: Tensor, *, crossover: Crossover = 1.0) -> LowRankWeight:
        """Turn the dense ``layer`` into this class, with the given factors; its weight is dropped."""
        dense_class = type(layer)
        weight = cast(Tensor, layer._parameters.pop("weight"))
        layer.__class__ = cls
        self = cast(LowRankWeight, layer)
        self.dense_class, self.dense_shape = dense_class, weight.shape
        self.crossover = crossover
        self._register(U, S, Vh, like=weight)
        return self

    def _register(self, U: Tensor, S: Tensor, Vh: Tensor, *, like: Tensor) -> None:
        """New parameters; the core gets attributes and ``requires_grad`` of ``like``."""
        for name, factor in (("U", U), ("S", S), ("Vh", Vh)):
            factor = factor.contiguous()
            # A view would keep a whole message, or several layers' results, in memory.
            if type(factor) is Tensor and factor.untyped_storage().nbytes() > factor.nbytes:
                factor = factor.clone()
            trained = like.requires_grad and (name == "S" or self.bases_trained)
            self.register_parameter(name, nn.Parameter(factor, requires_grad=trained))
        pass_on_attributes(like, self.S)
        self.known_bases = self._stamp_of_bases()

    def set_factors(self, U: Tensor, S: Tensor, Vh: Tensor) -> bool:
        """Take new factors; returns whether r changed, in which case the parameters are new objects.

        Autograd's accumulation node and the autocast cache would keep the old shape of an old one.
        """
        if S.shape == self.S.shape:
            with torch.no_grad():
                for mine, new in zip(self.factors, (U, S, Vh), strict=True):
                    mine.copy_(new)
            self._accept_bases()
            return False
        before = self.S
        U, S, Vh = (new.to(old.dtype) for new, old in zip((U, S, Vh), self.factors, strict=True))
        self._register(U, S, Vh, like=before)
        pass_on_hooks(before, self.S)
        self._clear_copies()
        return True

    def _accept_bases(self) -> None:
        self.known_bases = self._stamp_of_bases()
        if self.autocast_copies is not None:
            self.autocast_copies.refresh(self.U, self.Vh)

    def _clear_copies(self) -> None:
        if self.autocast_copies is not None:
            self.autocast_copies = AutocastCopies()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankWeight:
        """Move or cast; copies for autocast are made from the result when needed."""
        self._clear_copies()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.known_bases = self._stamp_of_bases()
        return self

    def keep_bases_frozen(self) -> None:
        """Undo what ``requires_grad_(True)`` of a whole model did to ``U`` and ``Vh``, unless they are trained."""
        if self.bases_trained or torch.compiler.is_compiling():
            return
        for basis in (self.U, self.Vh):
            if basis.requires_grad and isinstance(basis, nn.Parameter):
                basis.requires_grad_(False)

    def train_bases(self, trained: bool) -> None:
        """Train ``U`` and ``Vh`` from now on, unless the core is frozen by the user; or freeze them."""
        self.bases_trained = trained
        for basis in (self.U, self.Vh):
            basis.requires_grad_(trained and self.S.requires_grad)
            if not trained:
                basis.grad = None

    def check_use(self) -> None:
        """Called first in every forward pass: frozen bases must be frozen and orthonormal."""
        self.keep_bases_frozen()
        if not (self.bases_trained or is_transformed()) and self.known_bases != self._stamp_of_bases():
            self._check_bases()

    def _stamp_of_bases(self) -> tuple[int, ...]:
        """Changes with every write to ``U`` or ``Vh`` but one through ``.data``, which the next update finds."""
        bases = (self.U, self.Vh)
        if any(type(p) is not nn.Parameter or p.is_meta or p.is_inference() for p in bases):
            return ()
        return (*(p.data_ptr() for p in bases), *(p._version for p in bases))

    def bases_error(self) -> float:
        """The larger of ``||U^T U - I||_F / sqrt(r)`` and that of ``Vh``; 0 if sharded or not loaded yet."""
        whole = not isinstance(self.U, DTensor) and (self.U.shape[0], self.Vh.shape[1]) == (self.m, self.columns)
        if self.S.is_meta or not whole or not bool(self.S.any()):
            return 0.0
        return max(orthogonality_error(self.U), orthogonality_error(self.Vh.mT))

    @exact_arithmetic()
    def _check_bases(self) -> None:
        """Raise :class:`ModelError` if ``U`` or ``Vh`` was written into and is not orthonormal any more."""
        stamp = self._stamp_of_bases()
        if not stamp:  # casts or shards stand in the place of the parameters
            return
        if not (self.U.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.require_orthonormal(self.bases_error(), self.U.dtype)
        self.known_bases = stamp

    def require_orthonormal(self, error: float, dtype: torch.dtype, name: str = "") -> None:
        """Raise :class:`ModelError` if storage in ``dtype`` cannot explain the :meth:`bases_error` of frozen bases.

        Loops over ``model.parameters()`` that clip, decay or average weights in place reach U and Vh as well.
        """
        if self.bases_trained or error <= rounding_bound(dtype):
            return
        raise ModelError(
            f"U or Vh of {name or self} is not orthonormal any more (error {error:.1g}), so something has written into "
            "these frozen bases, such as weight clipping, weight decay or an average over model.parameters(). Let it "
            "skip parameters that do not require a gradient, give averages to OIALR(..., averages=[...]), and restart "
            "from the last good checkpoint."
        )

    @property
    def m(self) -> int:
        """Rows of the weight: its leading axis."""
        return int(self.dense_shape[0])

    @property
    def n(self) -> int:
        """Columns of the weight: all axes after the leading one."""
        return int(self.dense_shape.numel() // self.dense_shape[0])

    @property
    def r(self) -> int:
        """Inner dimension."""
        return int(whole_shape(self.S)[0])

    @property
    def columns(self) -> int:
        """Columns of ``Vh``."""
        return self.n

    @property
    def inner(self) -> Inner:
        """What a checkpoint keeps of the structure: r, or both of a Tucker layer."""
        return self.r

    @property
    def k(self) -> int:
        """Largest r this weight can have, min(m, n)."""
        return min(self.m, self.n)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """``U``, ``S`` and ``Vh``."""
        return self.U, self.S, self.Vh

    def matrix(self) -> Tensor:
        """``U S Vh`` (m x n) in the core's dtype, differentiable in S; under autocast in that of autocast."""
        U, S, Vh = self.matched_factors()
        return U @ times(S, Vh)

    @property
    def weight(self) -> Tensor:
        """The dense weight in full precision, for code that reads ``layer.weight``; writes into it are errors."""
        if torch.compiler.is_compiling():  # the settings of a compiled graph cannot be changed inside
            return self.matrix().reshape(self.dense_shape)
        # Writes into an inference tensor could not be noticed.
        with full_precision(), torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            W = self.matrix().reshape(self.dense_shape)
        ordinary = type(self.S) in (nn.Parameter, DTensor) and not self.S.is_meta and not is_transformed()
        return read_only(W, weakref.ref(self)) if ordinary else W

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise refuse_assignment(self)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; pruning, which would register the built weight, is refused."""
        if isinstance(param, BuiltWeight):
            raise refuse_assignment(self)
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> None:
        raise ModelError(
            "torch.jit.script cannot compile low-rank layers. Script hpc_oialr.merge(model), or use torch.export, "
            "torch.compile or torch.jit.trace."
        )

    @exact_arithmetic()
    def merged_weight(self) -> Tensor:
        """The dense weight in its own shape and the core's dtype, computed in fp32 or better."""
        U, S, Vh = (factor.to(compute_dtype(self.S.dtype)) for factor in self.factors)
        S = self._beside(U, S)
        return (U @ times(S, Vh)).reshape(self.dense_shape).to(self.S.dtype)

    def matched_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The factors in the core's dtype; under autocast as they are, or copies, and autocast casts the rest."""
        self.check_use()
        U: Tensor = self.U
        Vh: Tensor = self.Vh
        device = U.device.type
        if U.requires_grad and not self.bases_trained and torch.compiler.is_compiling():
            # Compiled code cannot switch requires_grad.
            U, Vh = U.detach(), Vh.detach()
        copies = None if U.is_meta or U.requires_grad or is_transformed() else self.autocast_copies
        if copies is not None and torch.is_autocast_enabled(device):
            U, Vh = cast(Any, copies.of(U, Vh, torch.get_autocast_dtype(device)))
        elif copies is not None and self.S.dtype.itemsize < U.dtype.itemsize:  # FSDP casts parameters that it gathers
            U, Vh = cast(Any, copies.of(U, Vh, self.S.dtype))
        return self.in_one_dtype(U, Vh)

    def in_one_dtype(self, U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``U`` or a part of it, ``S``, and ``Vh`` or a part of it in the core's dtype; under autocast as they are."""
        S = self._beside(U, self.S)
        if S.is_meta or not torch.is_autocast_enabled(S.device.type):
            U, Vh = U.to(S.dtype), Vh.to(S.dtype)
        return U, S, Vh

    @staticmethod
    def _beside(U: Tensor, S: Tensor) -> Tensor:
        """A sharded core whole where the bases are."""
        return S.full_tensor() if isinstance(S, DTensor) and not isinstance(U, DTensor) else S

    def factored(self, tokens: int) -> bool:
        """Whether this many tokens are cheaper in factored execution."""
        # Under a tracer it is no number. torch's __setattr__ takes longer.
        if self.training and not torch.compiler.is_compiling() and type(tokens) is int:
            self.__dict__["tokens"] = tokens
        crossover = self.crossover
        if not isinstance(crossover, (int, float)):
            device = self.S.device.type
            by_autocast = torch.is_autocast_enabled(device)
            crossover = crossover[torch.get_autocast_dtype(device) if by_autocast else self.S.dtype]
        return self._pays(tokens, crossover)

    def _pays(self, tokens: int, crossover: float) -> bool:
        return prefer_factored(tokens, self.m, self.n, self.r, crossover=crossover)

    def extra_repr(self) -> str:
        """Shape and inner dimension, as ``print(model)`` shows them."""
        return f"m={self.m}, n={self.n}, r={self.r}, bias={self.bias is not None}"

    @exact_arithmetic()
    def become_dense(self) -> None:
        """Become a layer of the dense class with an ordinary weight again, in place."""
        weight = nn.Parameter(self.merged_weight(), requires_grad=self.S.requires_grad)
        pass_on_attributes(self.S, weight)
        rest = {name: p for name, p in self._parameters.items() if name not in ("U", "S", "Vh")}
        self.__class__ = self.dense_class  # type: ignore[assignment]
        for attribute in LowRankWeight.__annotations__:  # one that stayed would keep the layer dense for good
            self.__dict__.pop(attribute, None)
        # The kinds this project knows register their weight before their bias.
        self._parameters.clear()
        self._parameters.update({"weight": weight, **rest})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Adopt the stored r, or become dense, before torch copies the values; a controller does so for its layers."""
        stored = [x for name in ("U", "S", "Vh") if isinstance(x := state_dict.get(prefix + name), Tensor)]
        if controller_of(self) is None:
            core = self.S
            if len(stored) == 3:
                U, S, Vh = (torch.empty_like(x, device=core.device) for x in stored)
                if S.shape != core.shape and (U.shape[0], Vh.shape[1]) == (self.m, self.columns):
                    self.set_factors(U, S, Vh)
            elif prefix + "weight" in state_dict:
                self.become_dense()
            if core is not self._parameters.get("S") and is_in_optimizer(core):
                warnings.warn(
                    f"layer {prefix.rstrip('.')} takes the form of the loaded state, but an optimizer still holds the "
                    "core it had, which is no longer trained. Make the optimizer from model.parameters() after the "
                    "load; or load while OIALR(...) is attached, which updates the optimizer too.",
                    stacklevel=2,
                )
        # The layer may have its dense class again, now or in a hook.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        if isinstance(self, LowRankWeight):
            self._accept_bases()
