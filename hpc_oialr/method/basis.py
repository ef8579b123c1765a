"""One layer's change of basis, with the optimizer state, running averages and step sizes that change with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.linalg.tsqr import tsqr
from hpc_oialr.lowrank import LowRankWeight, TargetWeight, select
from hpc_oialr.lowrank.base import AutocastCopies, whole_shape
from hpc_oialr.lowrank.conversion import convert_weight, empty_factors, leave_fused_inference
from hpc_oialr.lowrank.execution import crossover_by_dtype
from hpc_oialr.lowrank.kernel_modes import Inner, factor_shapes, times
from hpc_oialr.lowrank.shared_input import share_inputs
from hpc_oialr.lowrank.stored import Stored
from hpc_oialr.lowrank.targets import plain_name
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.decompositions import low_rank_layer
from hpc_oialr.method.engine import Engine
from hpc_oialr.method.second_moments import SecondMoments
from hpc_oialr.method.sketches import LayerSketches
from hpc_oialr.optim.core_lr import CoreLearningRate, core_factor
from hpc_oialr.optim.groups import GroupPlaces, order_cores
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state import project, transform_average, transform_state

Bases = tuple[Tensor, Tensor]
Move = tuple[Tensor | None, Tensor | None]  # by which a gradient is multiplied, left^T G right^T; None: by 1


class BasisUpdater:
    """Applies conversions and rotations to a model, its optimizer and its running averages, e.g. ``AveragedModel``.

    All changes are made inside ``engine.changing(model)``, in exact arithmetic. The optimizer's groups keep their order;
    a core takes the place of its weight.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerStack,
        config: OIALRConfig,
        averages: Sequence[nn.Module],
        engine: Engine,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.engine, self.layout = engine, engine.layout
        self._groups = GroupPlaces(optimizer, model)
        self.core_lr = CoreLearningRate(optimizer.leaves)
        engine.scale_steps(self.core_lr.factors)
        crossover = config.crossover
        self._options: dict[str, Any] = {
            "factor_dtype": getattr(torch, config.factor_dtype) if config.factor_dtype else None,
            "crossover": crossover_by_dtype(crossover) if isinstance(crossover, str) else crossover,
        }
        # The averaged modules, with their layers by name.
        self.averages: list[tuple[nn.Module, dict[str, TargetWeight]]] = []
        for average in (getattr(average, "module", average) for average in averages):
            leave_fused_inference(average)
            targets = select(average, config.selection, frozen=True, low_rank=True)
            self.averages.append((average, {plain_name(target.name): target for target in targets}))
        leave_fused_inference(model)

    def twins(self, target: TargetWeight) -> list[TargetWeight]:
        """The same layer in every average."""
        return [targets[plain_name(target.name)] for _, targets in self.averages]

    def order(self, targets: Sequence[TargetWeight]) -> None:
        """Sort cores in the optimizer, whatever order and number of ranks the layers were converted in.

        Called after every change of structure, so layers with one input are put together here.
        """
        share_inputs(self.model)
        layers = [target.low_rank for target in targets] if self.config.frees_bases else []
        bases = [basis for layer in layers if layer is not None for basis in (layer.U, layer.Vh)]
        order_cores(self.optimizer, [target.trained for target in targets], bases)

    def adopt(self, targets: Sequence[TargetWeight]) -> list[TargetWeight]:
        """The ``targets`` that are low-rank already, with their cores' step sizes set."""
        found = [target for target in targets if target.low_rank is not None]
        for target in found:
            layer = low_rank_layer(target)
            if not self.engine.whole_factors:
                raise ModelError(
                    f"layer {target.name} is low-rank already, which {type(self.engine).__name__} cannot take over. Make "
                    "a dense model and its optimizer, then OIALR(...), oialr.load_state_dict(...), and load the model's "
                    "state."
                )
            for twin in self.twins(target):
                other = twin.low_rank
                if other is None or other.inner != layer.inner or turned(other, Stored(layer.U, layer.Vh)):
                    raise ModelError(
                        f"layer {target.name} is low-rank with r = {layer.inner}, but not so, or in other bases, in a "
                        "running average. Make averages from the model as it is, then load their state."
                    )
            layer.crossover, layer.autocast_copies = self._options["crossover"], AutocastCopies()
            self._set_step(layer)
            self._hold_bases(layer)
        if found:
            self.order(targets)
        return found

    def convert(self, target: TargetWeight, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        """``W -> U S Vh``; the dense weight, its gradient and its moments are freed.

        ``U`` holds this rank's rows of m x r, ``Vh`` its columns of r x n, ``S`` is whole. Of a convolution in Tucker
        form they are those of :mod:`hpc_oialr.lowrank.kernel_modes`.
        """
        weight, layout, (m, n) = target.weight, self.layout, target.shape
        reset = not self.config.carry_moments
        with self.engine.replacing(target):
            transform_state(self.optimizer, weight, U, layout.whole_columns(Vh, n), layout=layout, reset=reset)
            core, bases = layout.put_core(S), layout.put_bases(U, Vh, m, n)
            gradient = self._gradient(weight, U, layout.whole_columns(Vh, n), core=False)
            layer = convert_weight(target, bases[0], core, bases[1], **self._options)
            self._take_place(weight, layer)
            self._set_step(layer, replaces=weight)
        layer.S.grad = gradient
        for twin in self.twins(target):
            core = transform_average(twin.weight, U, Vh)
            convert_weight(twin, U.clone(), core, Vh.clone(), **self._options).S.requires_grad_(False)

    def rotate(
        self,
        target: TargetWeight,
        P: Tensor,
        S: Tensor,
        Qh: Tensor,
        *,
        repair: bool,
        new: int = 0,
        sketches: LayerSketches | None = None,
    ) -> None:
        """``U <- U P``, ``Vh <- Qh Vh`` and the new core ``S``, ``diag(s)`` of a matrix; P (r x r') and Qh (r' x r).

        ``repair`` re-orthogonalises the new bases by QR, ``U = Q R``, with both R folded into S. ``new`` directions from
        the ``sketches`` join the bases, with zeros in S: the function stays the same. Rank 0's are sent to all replicas.
        """
        layer, layout = low_rank_layer(target), self.layout
        dtype = compute_dtype(layer.S.dtype)
        before = layout.rows(layer.U).to(dtype), layout.columns(layer.Vh).to(dtype)
        U, Vh = before[0] @ P, Qh @ before[1]
        reset = not self.config.carry_moments and S.numel() < whole_shape(layer.S).numel()
        if new and sketches is not None:
            left, right = sketches.outside(*before, new, layout)
            self.engine.replicas.share([left, right])
            U, S, Vh = torch.cat([U, left], dim=1), pad(S, (0, new, 0, new)), torch.cat([Vh, right])
            P, Qh = pad(P, (0, new)), pad(Qh, (0, 0, 0, new))
        if repair:
            U, S, Vh = reorthogonalise(U, S, Vh, layout.group)
        moves: list[Move] = [(None, P.mT), (P, Qh), (Qh.mT, None)]
        with self.engine.replacing(target):
            gradients = self._move(layer, moves, reset=reset, new=new)
            S, (U, Vh) = layout.put_core(S), layout.put_bases(U, Vh, layer.m, layer.n)
            for twin in map(low_rank_layer, self.twins(target)):
                twin.set_factors(U.clone(), transform_average(twin.S, P, Qh), Vh.clone())
            self._set_factors(layer, U, S, Vh)
        _put_gradients(layer, gradients)

    @exact_arithmetic()
    def orthonormalise(self, target: TargetWeight, gathered: SecondMoments) -> None:
        """``U = Q1 R1``, ``Vh^T = Q2 R2`` of trained bases: ``U <- Q1``, ``S <- R1 S R2^T``, ``Vh <- Q2^T``.

        The function stays the same. With G the gradient of the weight, that of S, ``U^T G V``, becomes
        ``R1^-T (U^T G V) R2^-1``; that of U, ``G V S^T``, is multiplied by ``R1^T`` from the right, that of Vh,
        ``S^T U^T G``, by ``R2`` from the left. So are momenta; what is ``gathered`` of inputs and gradients follows. Two
        QR, ``2 r^2 (m + n)`` operations; sends nothing.
        """
        self.engine.gather(target)
        layer = low_rank_layer(target)
        dtype = compute_dtype(layer.S.dtype)
        U, S, Vh = (factor.detach().to(dtype) for factor in layer.factors)
        (U, R1), (V, R2) = positive_qr(U), positive_qr(Vh.mT)
        one = torch.eye(layer.r, dtype=dtype, device=S.device)
        inverse1, inverse2 = (torch.linalg.solve_triangular(R, one, upper=True) for R in (R1, R2))
        with self.engine.replacing(target):
            gradients = self._move(layer, [(None, R1), (inverse1, inverse2.mT), (R2.mT, None)], reset=False)
            self._set_factors(layer, U, R1 @ S @ R2.mT, V.mT)
        _put_gradients(layer, gradients)
        gathered.turn(target, inverse1, inverse2)

    def train_bases(self, target: TargetWeight, trained: bool, gathered: SecondMoments) -> None:
        """Begin a phase in which ``U`` and ``Vh`` are trained; or end it: they are orthonormal, without moments."""
        layer = low_rank_layer(target)
        if not trained:
            self.orthonormalise(target, gathered)
            for _, states in self.optimizer.states():
                for basis in (layer.U, layer.Vh):
                    states.pop(basis, None)
        layer.train_bases(trained)
        self.engine.rebuild_wrapper()

    # -- the structure of a checkpoint -----------------------------------------------------------

    @exact_arithmetic()
    def restructure(self, target: TargetWeight, r: Inner | None, bases: Bases | None = None) -> None:
        """Give a layer zero factors of inner dimension ``r``, or a dense weight if None, for a checkpoint to fill.

        With the bases (U, Vh) that the checkpoint holds, moments and averages are transformed into them.
        Otherwise the optimizer starts with empty state for this layer.
        """
        with self.engine.replacing(target):
            if r is None:
                self._restore(target)
            elif target.low_rank is None:
                self._empty(target, r, bases)
            elif isinstance(r, tuple) != isinstance(target.low_rank.inner, tuple):
                self._restore(target)  # flattened and Tucker form have no basis in common
                self._empty(target, r, bases)
            else:
                self._reshape(target, r, bases)

    def _empty(self, target: TargetWeight, r: Inner, bases: Bases | None) -> None:
        weight = target.weight
        self._transform(weight, bases, core=False)
        layer = empty_factors(target, r, layout=self.layout, **self._options)
        self._take_place(weight, layer)
        if bases is not None:
            layer.set_factors(bases[0], layer.S.detach(), bases[1])
        self._set_step(layer)
        for twin in self.twins(target):
            value = twin.weight.detach()
            factors = empty_factors(twin, r, **self._options)
            factors.S.requires_grad_(False)
            if bases is not None:
                factors.set_factors(bases[0], transform_average(value, *bases), bases[1])

    def _reshape(self, target: TargetWeight, r: Inner, bases: Bases | None) -> None:
        layer = low_rank_layer(target)
        core, dtype, turn = layer.S, compute_dtype(layer.S.dtype), None
        U, S, Vh = _zeros(layer, r)
        if bases is not None:
            U, Vh = (basis.to(core.device, dtype) for basis in bases)
            turn = layer.U.to(dtype).mT @ U, Vh @ layer.Vh.to(dtype).mT
        self._transform(core, turn, core=True)
        for twin in map(low_rank_layer, self.twins(target)):
            factors = _zeros(twin, r) if turn is None else (U, transform_average(twin.S, *turn), Vh)
            twin.set_factors(*factors)
        self._set_factors(layer, U, S, Vh)

    def _restore(self, target: TargetWeight) -> None:
        layer = low_rank_layer(target)
        core, dtype, shape = layer.S, compute_dtype(layer.S.dtype), layer.dense_shape
        matrix = (layer.m, layer.n)
        self._transform(core, (layer.U.to(dtype).mT, layer.Vh.to(dtype).mT), core=True)
        if self.config.frees_bases:
            self._groups.remove_bases((layer.U, layer.Vh))
        layer.become_dense()
        for _, states in self.optimizer.states():
            state = states.get(core, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == matrix:
                    state[key] = value.reshape(shape)
        self.core_lr.factors.pop(core, None)
        self._groups.take_back(core, target.weight)
        for twin in map(low_rank_layer, self.twins(target)):
            twin.become_dense()

    # -- parts of a change -----------------------------------------------------------------------

    def _take_place(self, weight: nn.Parameter, layer: LowRankWeight) -> None:
        layer.autocast_copies = AutocastCopies() if self.engine.whole_bases else None
        self._groups.replace(weight, layer.S)
        self._hold_bases(layer)

    def _hold_bases(self, layer: LowRankWeight) -> None:
        if self.config.frees_bases:
            self._groups.add_bases(layer.S, (layer.U, layer.Vh))

    def _move(self, layer: LowRankWeight, moves: Sequence[Move], *, reset: bool, new: int = 0) -> list[Tensor | None]:
        """Transform the state of U, S and Vh; returns their gradients so far, in the new basis."""
        gradients: list[Tensor | None] = []
        for factor, (left, right) in zip(layer.factors, moves, strict=True):
            if factor is not layer.S and not layer.bases_trained:
                gradients.append(None)
                continue
            transform_state(self.optimizer, factor, left, right, layout=self.layout, core=True, reset=reset, new=new)
            gradients.append(self._gradient(factor, left, right, core=True))
        return gradients

    def _set_factors(self, layer: LowRankWeight, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        before = layer.factors
        if layer.set_factors(U, S, Vh):
            for old, new in zip(before, layer.factors, strict=True):
                if old is before[1] or self.config.frees_bases:
                    self._groups.replace(old, new)
            self._set_step(layer, replaces=before[1])

    def _set_step(self, layer: LowRankWeight, replaces: nn.Parameter | None = None) -> None:
        factor = core_factor(self.optimizer, layer.S, layer.m, layer.n, self.config.core_lr_scale)
        self.core_lr.set(layer.S, factor, replaces=replaces)

    def _transform(self, parameter: nn.Parameter, bases: Bases | None, *, core: bool) -> None:
        """Transform the moments into these bases; drop them where the bases are unknown."""
        if bases is None:
            for _, states in self.optimizer.states():
                states.pop(parameter, None)
            return
        left, right = (basis.to(parameter.device, compute_dtype(parameter.dtype)) for basis in bases)
        reset = not self.config.carry_moments
        transform_state(self.optimizer, parameter, left, right, layout=self.layout, core=core, reset=reset)

    def _gradient(
        self, parameter: nn.Parameter, left: Tensor | None, right: Tensor | None, *, core: bool
    ) -> Tensor | None:
        """The gradient accumulated so far, in the new basis."""
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided:
            return None
        moved = project(gradient, left, right, self.layout, core=core)
        return self.layout.put_core(moved.to(gradient.dtype).contiguous())


def turned(layer: LowRankWeight, stored: Stored) -> bool:
    """Whether stored bases differ from a layer's, which has the same r."""
    pairs = ((layer.U, stored.U), (layer.Vh, stored.Vh))
    return any(new is not None and not torch.equal(old, new.to(old)) for old, new in pairs)


def _zeros(layer: LowRankWeight, r: Inner) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = factor_shapes(layer.dense_shape, r)
    return layer.U.new_zeros(U), layer.S.new_zeros(S), layer.Vh.new_zeros(Vh)


def reorthogonalise(
    U: Tensor, S: Tensor, Vh: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases of the same product: ``U = Q1 R1``, ``Vh^T = Q2 R2``, ``S <- R1 S R2^T``.

    Signs are chosen so that both R have positive diagonals and the bases hardly turn. With a ``group``
    each rank has some of the rows of ``U`` and of the columns of ``Vh``.
    """

    (Q1, R1), (Q2, R2) = positive_qr(U, group), positive_qr(Vh.mT, group)
    return Q1, times(R1 @ S, R2.mT), Q2.mT


def positive_qr(A: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """``A = Q R`` with a diagonal of R above 0."""
    Q, R = tsqr(A, group)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(A.dtype)
    return Q * signs, signs[:, None] * R


def _put_gradients(layer: LowRankWeight, gradients: Sequence[Tensor | None]) -> None:
    for factor, gradient in zip(layer.factors, gradients, strict=True):
        if gradient is not None and factor.grad is not None:
            factor.grad.copy_(gradient)  # perhaps a view of a wrapper's bucket
        else:
            factor.grad = gradient
