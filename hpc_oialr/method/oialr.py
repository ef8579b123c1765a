"""The OIALR controller, which runs algorithm 1 of the paper under any engine; ``reference.py`` is the plain version."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.lowrank import TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attachment import Attachment, untie
from hpc_oialr.lowrank.shared_input import share_inputs
from hpc_oialr.lowrank.targets import plain_name
from hpc_oialr.method.basis import BasisUpdater
from hpc_oialr.method.channel_bases import layer_factors, layer_rotations
from hpc_oialr.method.checks import (
    DenseWeights,
    check_averages,
    check_change,
    check_free_bases,
    check_optimizer,
    check_tucker,
    compared_parts,
    require_finite,
    require_one_process,
    require_unattached,
)
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.decompositions import choice_of_r, low_rank_layer
from hpc_oialr.method.engine import Engine, adopt
from hpc_oialr.method.gathering import Window
from hpc_oialr.method.loading import Loader, require_same_groups
from hpc_oialr.method.other_optimizers import OtherOptimizers
from hpc_oialr.method.participants import FrozenByUser, drop_unfit, find_participants
from hpc_oialr.method.report import LayerUpdate, StepReport, UpdateReport, layer_update
from hpc_oialr.method.second_moments import SecondMoments
from hpc_oialr.method.sketches import GradientSketches
from hpc_oialr.method.stability_tracker import StabilityTracker
from hpc_oialr.optim.stack import OptimizerStack

log = logging.getLogger(__name__)


class OIALR:
    """Trains a model at low rank, inside any training loop.

    Call ``oialr.model(x)`` for the forward pass and ``oialr.step()`` after ``optimizer.step()``; the rest of the loop
    stays as it is, on one rank or many.

    Parameters
    ----------
    model
        Any module, already on its device; plain, in ``DistributedDataParallel``, or sharded by ``fully_shard``. Its
        layers are converted in place; layers that are low-rank already, e.g. by ``match_structure``, keep their r.
    optimizer
        Made from ``model.parameters()``. Groups and schedulers stay as they are; a core replaces its weight.
    config
        The settings; ``OIALRConfig.paper()`` gives the published method.
    engine
        How ranks share the model; by default what the model is wrapped in, or the initialised process group, or a
        single process.
    averages
        Running averages that are transformed with the model, e.g. ``AveragedModel(model)``.

    Raises
    ------
    ModelError
        If the optimizer holds parameters that are not the model's, the optimizer's state cannot be transformed with
        the weights, or no layer can be converted.

    Notes
    -----
    Memory: layers are converted one after another, and each dense weight, gradient and moment is freed before the
    next; with ``limits.at_conversion`` below about 0.7 the peak stays below the dense run's. Traffic per layer:
    ``r (m + n) + k`` numbers at the conversion, ``2 r^2 + r + 4`` at an update, and ``r^2`` gradients in every step.
    What ``importance`` adds: :class:`~hpc_oialr.method.second_moments.SecondMoments`; what ``grow`` does:
    :class:`~hpc_oialr.method.sketches.GradientSketches`.

    References
    ----------
    Coquelin et al., arXiv 2401.08505, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: OIALRConfig | None = None,
        *,
        engine: Engine | None = None,
        averages: Sequence[nn.Module] = (),
    ) -> None:
        self.config = config or OIALRConfig()
        self.config.require_steps()
        self.optimizer = optimizer
        require_unattached(model)
        self.engine, self.module = (engine, model) if engine else adopt(model)
        self._optimizers = OptimizerStack(optimizer)
        check_optimizer(self.module, self._optimizers)
        self.targets = find_participants(self.module, self.config.selection, self._optimizers, self.engine)
        self._frozen = FrozenByUser(self.targets)
        self.t = self.updates = 0
        check_averages(averages, self.module, self.engine)
        check_free_bases(self.config, self._optimizers, self.engine, averages)
        check_tucker(self.targets, self.config.conv, self.engine)
        check_change(self.targets, self._optimizers, self.engine, self.config.core_lr_scale)
        self._basis = BasisUpdater(self.module, self._optimizers, self.config, averages, self.engine)
        adopted = self._basis.adopt(self.targets)
        self._moments = SecondMoments(self.config, self.engine)
        self._sketches = GradientSketches(self.config, self.engine)
        self._window = Window(self.engine, self._moments, self._sketches)
        self._tracker = StabilityTracker(self.targets, self.engine, self.config.stability_threshold)
        self.engine.model = self.engine.wrap(self.module, optimizer)
        self._loader = Loader(self.module, self.targets, self._basis, self.engine, empty=adopted)
        if adopted:
            self.rewrap()  # the wrapper may be older than the layers
        self._attach()
        self._other_optimizers = OtherOptimizers(self._basis.core_lr, self.engine)
        self._other_optimizers.remember(self.targets)
        self.watch()

    def _attach(self) -> None:
        """Register hooks on the model, its layers and the optimizers."""
        self._dense_weights = DenseWeights(self.targets)
        share_inputs(self.module)
        self._attachment = Attachment(self)
        self._window.restore_code_with(self)
        holders = [module for target in self.targets for module in (target.owner, target.holder)]
        self._attachment.tie(self.module, holders, self._optimizers.nodes)
        for guard in self._loader.guards:
            guard.tie()

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or pickle, which must include the model and the optimizer."""
        require_one_process(self.engine)
        own_process = ("_dense_weights", "_attachment")
        return {key: value for key, value in vars(self).items() if key not in own_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and attach to the copied model."""
        vars(self).update(state)
        self._attach()

    def __repr__(self) -> str:
        """Steps done, and how many layers are low-rank."""
        model = type(self.module).__name__
        return f"OIALR(step {self.t}, {len(self.r)} of {len(self.targets)} layers of {model} low-rank)"

    @property
    def model(self) -> nn.Module:
        """What to call in the loop: the model as given, or in a ``DistributedDataParallel`` where ranks need one.

        The object stays the same for the whole run; the user's own wrapper may be called as well.
        """
        return self.engine.model

    @property
    def r(self) -> dict[str, int]:
        """Inner dimension of every low-rank layer; of one in Tucker form that of its output channels."""
        return {name: layer.r for name, layer in low_rank_layers(self.module).items()}

    @property
    def gathered(self) -> list[Tensor]:
        """Sums to which hooks on layers add in the next step: a replayed CUDA graph would not run them."""
        return self._window.sums

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are or become low-rank, in the model's order."""
        return [target.name for target in self.targets]

    def no_sync(self) -> AbstractContextManager[None]:
        """Context for all but the last backward pass of an accumulated step: gradients stay local."""
        return self.engine.no_sync(self.model)

    def rewrap(self) -> None:
        """Rebuild the wrapper's buckets, as at the start of a resumed run; nothing is broadcast."""
        self.engine.model = self.engine.rewrap(self.module)

    def detach(self) -> None:
        """Remove all hooks from model and optimizer; layers stay as they are, the steps of cores are no longer scaled."""
        for model in (self.module, *(average for average, _ in self._basis.averages)):
            untie(model)
        self._window.forget()
        self._basis.core_lr.remove()

    def before_forward(self) -> None:
        """Forward pre-hook of the model: raises where the pass would use stale buckets or empty layers."""
        self.engine.check_caller(self.module)
        self._loader.check_values()
        self._window.tie()

    # -- the algorithm ---------------------------------------------------------------------------

    def step(self) -> UpdateReport | None:
        """One step of the algorithm, after ``optimizer.step()``; reports what was done, if anything.

        Raises
        ------
        NonFiniteError
            If a weight due for an SVD holds NaN or Inf; nothing has been changed then.
        ModelError
            If layers, weights or the optimizer's groups were changed in between, the optimizer's state cannot be
            transformed, or another optimizer trains the weights; nothing has been changed.
        ReplicaMismatchError
            If ranks have different factors after an update, or different values of other parameters.
        """
        self.engine.check_step()
        self._other_optimizers.check(self.targets)
        self._loader.optimizer_loaded = False
        self.t += 1
        report = StepReport(self.t, self.engine.world.size)
        low_rank = self._low_rank()
        every = self.config.stability_frequency
        if every is not None and self.t % every == 0 and (due := self._drop_unfit(self._dense())):
            with report.part("stability", due) as layers:
                layers += self._tracker.measure(due)
        if due := self._due_for_conversion():
            with report.part("conversion", due) as layers:
                layers += self._convert(due)
        if due := self._due_for_update(low_rank):
            with report.part("update", due) as layers:
                layers += self._update(due)
        self._free_or_freeze_bases()
        self.watch()
        self._frozen.remember(self.targets)
        return report.result()

    def _due_for_conversion(self) -> list[TargetWeight]:
        """From step d on all dense layers that the user does not keep frozen, or the stable ones among them."""
        if self.t < self.config.delay:
            return []
        dense = [target for target in self._dense() if not self._frozen.waits(target)]
        if self.config.stability_threshold is not None:
            streaks, patience = self._tracker.streaks, self.config.stability_patience
            dense = [target for target in dense if streaks.get(target.name, 0) >= patience]
        return self._drop_unfit(dense)

    def _due_for_update(self, low_rank: list[TargetWeight]) -> list[TargetWeight]:
        """Every nu steps the last layers, a larger share at each update; excluding cores the user has frozen."""
        since = self.t - self.config.delay
        if not low_rank or since <= 0 or since % self.config.frequency:
            return []
        self.updates += 1
        due = self._last(self.updates)
        return [target for target in due if target in low_rank and not self._frozen(target)]

    def _last(self, updates: int) -> list[TargetWeight]:
        """The layers that an update of this number reaches."""
        share = min(1.0, self.config.layer_share_step * updates)
        return self.targets[len(self.targets) - max(1, round(share * len(self.targets))) :]

    def watch(self) -> None:
        """Gather in the next step what a change needs that is near; :meth:`step` ends with it."""
        if self._window.acts(self.t):
            due = [target for target in [*self._dense(), *self._last(self.updates + 1)] if not self._frozen(target)]
            self._window.watch(self.t, self.updates + 1, due, self._tracker.streaks)

    @exact_arithmetic()
    def _convert(self, targets: list[TargetWeight]) -> list[LayerUpdate]:
        """``W = U diag(s) Vh``; ``U`` and ``Vh`` are frozen, ``S = diag(s)`` is trained from now on."""
        self._other_optimizers.check_conversion(targets, self._optimizers.nodes)
        self._check(targets, state_of=targets)
        # Weights that the user has frozen since keep their value: nothing is cut.
        kept = [target.k if self._frozen(target) else self.config.limits.initial(target.k) for target in targets]
        parts, done = (self.config, self.engine, self._moments), dict[int, LayerUpdate]()
        with self.engine.changing(self.module):
            try:
                for i, factors, spectrum, figures in layer_factors(targets, kept, *parts):
                    target = targets[i]
                    self._basis.convert(target, *factors)
                    self._tracker.forget(target.name)
                    done[i] = layer_update(target.name, target.shape, target.k, kept[i], spectrum, **figures)
            finally:
                self._basis.order(self.targets)
        self._check_replicas(targets)
        return [done[i] for i in sorted(done)]

    @exact_arithmetic()
    def _update(self, targets: list[TargetWeight]) -> list[LayerUpdate]:
        """``S = P diag(s) Qh``; ``U <- U P``, ``Vh <- Qh Vh``, ``S <- diag(s)``; small values go, new directions come."""
        self._check(targets, state_of=self._low_rank())
        parts, done = (self.config, self.engine, self._moments), dict[int, LayerUpdate]()
        sketches = self._sketches.reduce(targets)

        with self.engine.changing(self.module):
            for target in targets if self.config.frees_bases else []:
                if low_rank_layer(target).bases_trained:
                    self._basis.orthonormalise(target, self._moments)
            choose = choice_of_r(targets, self.config, self.engine, self._moments, sketches.keys())
            for rotation in layer_rotations(targets, choose, *parts):
                target = targets[rotation.index]
                layer = low_rank_layer(target)
                r, dtype = layer.r, self.engine.basis_dtype(layer)
                layer.require_orthonormal(rotation.error, dtype, target.name)
                keep, new = choose(layer, rotation.spectrum)
                repair, found = rotation.error > self.config.bound_on_errors(dtype), sketches.pop(layer, None)
                self._basis.rotate(target, *rotation.cut(keep), repair=repair, new=new, sketches=found)
                figures = {**rotation.figures, "seconds": rotation.seconds, "new_directions": new}
                shape, s = target.shape, rotation.spectrum
                done[rotation.index] = layer_update(target.name, shape, r, keep + new, s, **figures)
        self._check_replicas(targets)
        return [done[i] for i in sorted(done)]

    def _free_or_freeze_bases(self) -> None:
        """Begin or end a phase in which ``U`` and ``Vh`` are trained, in the layers that are not in it yet."""
        if not self.config.frees_bases:
            return
        wanted = self.config.trains_bases(self.t)
        due = [target for target in self._low_rank() if low_rank_layer(target).bases_trained != wanted]
        if not due:
            return
        self._check(due, state_of=due)
        with self.engine.changing(self.module):
            for target in due:
                self._basis.train_bases(target, wanted, self._moments)
        self._check_replicas(due)
        log.info("step %d: U and Vh of %d layers are %s", self.t, len(due), "trained" if wanted else "frozen")

    # -- layers ----------------------------------------------------------------------------------

    def _dense(self) -> list[TargetWeight]:
        return [target for target in self.targets if target.low_rank is None]

    def _low_rank(self) -> list[TargetWeight]:
        return [target for target in self.targets if target.low_rank is not None]

    def _drop_unfit(self, targets: list[TargetWeight]) -> list[TargetWeight]:
        """Drop the layers that the user has made unfit since OIALR(...), with a warning; returns the others."""
        unfit = drop_unfit(self.module, targets, self._optimizers) if targets else set()
        self.targets = self._loader.targets = [target for target in self.targets if target.name not in unfit]
        return [target for target in targets if target.name not in unfit]

    def _check(self, targets: list[TargetWeight], *, state_of: list[TargetWeight]) -> None:
        """Raise before anything changes unless ``targets`` and the optimizer state of ``state_of`` are as required."""
        self._dense_weights.check(self.module, targets)
        check_change(state_of, self._optimizers, self.engine, self.config.core_lr_scale)
        require_finite(targets, self.engine)
        for layer in low_rank_layers(self.module).values():
            layer.keep_bases_frozen()

    def _check_replicas(self, targets: list[TargetWeight]) -> None:
        """Raise unless all ranks have equal bits after a change of ``targets``."""
        self._other_optimizers.remember(self.targets)
        if self.engine.world.size > 1:
            self.engine.check_replicas(compared_parts(self.module, targets, self.engine))

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and the r of every low-rank layer; plain numbers that JSON can store. Names are the plain model's."""
        layers = {plain_name(name): layer for name, layer in low_rank_layers(self.module).items()}
        r = {name: layer.inner for name, layer in layers.items()}
        streaks = {plain_name(name): streak for name, streak in self._tracker.streaks.items()}
        state = {"t": self.t, "updates": self.updates, "r": r, "streaks": streaks}
        return state | {"bases_trained": [name for name, layer in layers.items() if layer.bases_trained]}

    def tensor_state(self) -> dict[str, Tensor]:
        """Every rank's sums for a change that is near, and bases kept for measuring stability; a collective call."""
        tensors = self._tracker.bases(self._dense()) | self._window.state()
        return {plain_name(name): tensor for name, tensor in tensors.items()}

    @exact_arithmetic()
    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Restore the structure of a checkpoint: counters, and layers of the stored r, still empty.

        Load the model's state before or after this, the optimizer's after either. A forward pass before the model's
        state is loaded raises an error. Raises :class:`ModelError` if this model lacks a stored layer, the optimizer's
        state was loaded before the structure, or ``tensors`` is missing though conversions depend on it.
        """
        here = self._loader.own_names
        streaks, tensors = here(state["streaks"]), None if tensors is None else here(tensors)
        self._tracker.require(tensors, streaks)
        changed = self._loader.take(here(state["r"]), list(here(dict.fromkeys(state.get("bases_trained", [])))))
        self._dense_weights.remember(self.targets, changed)
        self.t, self.updates = int(state["t"]), int(state["updates"])
        self._tracker.restore(tensors or {}, streaks)
        self._window.forget()
        self.watch()
        self._window.restore(tensors or {})
        if state["r"] and (self.config.frees_bases or not changed):
            self.rewrap()

    def before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *, assign: bool) -> None:
        """Pre-hook of the model's ``load_state_dict``: layers are given the structure of the state."""
        self._other_optimizers.forget()
        changed = self._loader.before_load(module, state, prefix, assign=assign)
        self._dense_weights.remember(self.targets, changed)
        if changed:
            self._window.forget()

    before_optimizer_load = staticmethod(require_same_groups)  # pre-hook of the optimizer's load_state_dict

    def after_optimizer_load(self, optimizer: Optimizer) -> None:
        """Post-hook of it: state of another structure raises an error."""
        self._loader.after_optimizer_load(optimizer)
