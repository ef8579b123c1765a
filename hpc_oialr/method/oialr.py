"""Orthogonality-Informed Adaptive Low-Rank training: the paper's algorithm, line by line."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.lowrank import TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attachment import Attachment, untie
from hpc_oialr.method.basis import BasisUpdater
from hpc_oialr.method.checks import (
    check_change,
    check_optimizer,
    check_structure,
    plain_parameters,
    require_finite,
    require_unattached,
)
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.decompositions import core_rotations, weight_factors
from hpc_oialr.method.engine import Engine, adopt
from hpc_oialr.method.foreign_steps import ForeignSteps
from hpc_oialr.method.loading import Loader, require_same_groups
from hpc_oialr.method.participants import FrozenByUser, drop_unfit, find_participants
from hpc_oialr.method.report import LayerUpdate, StepReport, UpdateReport, layer_update
from hpc_oialr.method.stability_tracker import StabilityTracker
from hpc_oialr.optim.stack import OptimizerStack


class OIALR:
    """Trains a model at low rank, inside any training loop.

    ``oialr.model(x)`` is the forward pass and ``oialr.step()`` follows ``optimizer.step()``; nothing
    else of the loop changes, on one process or many.

    Parameters
    ----------
    model
        Any module, in its final place; plain or wrapped in ``DistributedDataParallel``. Its layers are converted
        in place; those that are low-rank already, from an earlier run or by ``match_structure``, keep their r.
    optimizer
        Made from ``model.parameters()``. Groups and schedulers stay as they are; a core takes the
        place of its weight.
    config
        Settings; default the published ones.
    engine
        How processes share the work; default: what the model is wrapped in, or the initialised
        process group, or one process.
    averages
        Running averages that follow every change, e.g. ``AveragedModel(model)``.

    Raises
    ------
    ModelError
        If the optimizer holds parameters that are not the model's, its state cannot follow a change of variables,
        or no layer can be converted.

    Notes
    -----
    Memory: layers are converted one after another, each dense weight, gradient and moment freed
    before the next; with ``limits.at_conversion`` below about 0.7 the peak never passes the dense
    run's. Traffic of an update: ``2 r^2 + r + 4`` numbers a layer, of the conversion
    ``r (m + n) + k``; in every step the gradients of what is trained, ``r^2`` a layer.

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
        self.optimizer = optimizer
        require_unattached(model)
        self.engine, self.module = (engine, model) if engine else adopt(model)
        self._optimizers = OptimizerStack(optimizer)
        check_optimizer(self.module, self._optimizers)
        self.targets = find_participants(self.module, self.config.selection, self._optimizers, self.engine)
        self._frozen = FrozenByUser(self.targets)
        self.t = 0
        self.updates = 0
        if averages and self.engine.layout.group is not None:
            raise ModelError(
                f"{len(averages)} running averages were given, but the engine splits each matrix over ranks; "
                "averages must be whole. Average the exported models, or use DistributedDataParallel."
            )
        check_change(self.targets, self._optimizers, self.engine, self.config.core_lr_scale)
        self._basis = BasisUpdater(self.module, self._optimizers, self.config, averages, self.engine)
        adopted = self._basis.adopt(self.targets)
        self._tracker = StabilityTracker(self.targets, self.engine, self.config.stability_threshold)
        self.engine.model = self.engine.wrap(self.module, optimizer)
        self._loader = Loader(self.module, self.targets, self._basis, self.engine)
        if adopted:
            # Values may be loaded later, and a wrapper may have been made before the layers were.
            self._loader.empty = {target.name for target in adopted}
            self.rewrap()
        self._tie()
        self._foreign = ForeignSteps(self._basis.core_lr, self.engine)
        self._foreign.remember(self.targets)

    def _tie(self) -> None:
        self._given: dict[str, weakref.ref[nn.Parameter]] = {}
        self._note_weights(self.layers)
        self._attachment = Attachment(self)
        holders = [module for target in self.targets for module in (target.owner, target.holder)]
        self._attachment.tie(self.module, holders, self._optimizers.nodes)
        for guard in self._loader.guards:
            guard.tie()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles, of model and optimizer together with the controller, are tied to their own model."""
        if self.engine.world.size > 1:
            raise ModelError(
                f"a controller of {self.engine.world.size} processes cannot be copied or pickled, since a process group "
                "cannot; store state_dict() of controller, model and optimizer instead."
            )
        return {key: value for key, value in vars(self).items() if key not in ("_given", "_attachment")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state, and attach to the model in it."""
        vars(self).update(state)
        self._tie()

    def __repr__(self) -> str:
        """Steps done, and how many layers are low-rank."""
        model = type(self.module).__name__
        return f"OIALR(step {self.t}, {len(self.r)} of {len(self.targets)} layers of {model} low-rank)"

    @property
    def model(self) -> nn.Module:
        """What to call in the loop: the model as it was given, in a ``DistributedDataParallel`` where ranks need one.

        The object stays the same for the whole run; a wrapper of the user's own may be called just as well.
        """
        return self.engine.model

    @property
    def r(self) -> dict[str, int]:
        """Inner dimension of every low-rank layer."""
        return {name: layer.r for name, layer in low_rank_layers(self.module).items()}

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are or become low-rank, in the model's order."""
        return [target.name for target in self.targets]

    def no_sync(self) -> AbstractContextManager[None]:
        """Context for all but the last backward pass of an accumulated step: gradients stay local."""
        return self.engine.no_sync(self.model)

    def rewrap(self) -> None:
        """Rebuild the wrapper's buckets, as a resumed run starts with; nothing is broadcast."""
        self.engine.model = self.engine.rewrap(self.module)

    def detach(self) -> None:
        """Release model and optimizer: layers stay as they are, and cores get the step their optimizer gives them."""
        untie(self.module)
        for guard in self._loader.guards:
            guard.release()
        self._basis.core_lr.remove()

    def before_forward(self) -> None:
        """Called before every forward pass of the model: raise for what would otherwise go wrong silently."""
        self.engine.check_caller(self.module)
        self._loader.check_values()

    # -- the algorithm ---------------------------------------------------------------------------

    def step(self) -> UpdateReport | None:
        """One step of the algorithm, after ``optimizer.step()``; the report of all that it did, if anything.

        Raises
        ------
        NonFiniteError
            If a weight due for an SVD holds NaN or Inf; nothing has been changed then.
        ModelError
            If layers, weights or the optimizer's groups were changed in between, its state cannot follow, or another
            optimizer trains the weights; nothing has been changed.
        ReplicaMismatchError
            If ranks hold different factors after an update, or different values of what is not low-rank.
        """
        self.engine.check_step()
        self._foreign.check(self.targets)
        self._loader.optimizer_loaded = False
        self.t += 1
        report = StepReport(self.t, self.engine.world.size)
        low_rank = self._low_rank()
        if measured := self._due_for_measurement():
            with report.part("stability", measured) as layers:
                layers += self._tracker.measure(measured)
        if settled := self._settled():
            with report.part("conversion", settled) as layers:
                layers += self._convert(settled)
        if due := self._due_for_update(low_rank):
            with report.part("update", due) as layers:
                layers += self._update(due)
        self._frozen.remember(self.targets)
        return report.result()

    def _due_for_measurement(self) -> list[TargetWeight]:
        every = self.config.stability_frequency
        return self._fit(self._dense()) if every is not None and self.t % every == 0 else []

    def _settled(self) -> list[TargetWeight]:
        """Dense layers whose basis is to be frozen now: at step d all, or those that have been stable.

        A weight that has been frozen by the user from the start waits until it is trained.
        """
        if self.t < self.config.delay:
            return []
        dense = [target for target in self._dense() if not self._frozen.waits(target)]
        if self.config.stability_threshold is not None:
            streaks, patience = self._tracker.streaks, self.config.stability_patience
            dense = [target for target in dense if streaks.get(target.name, 0) >= patience]
        return self._fit(dense)

    def _due_for_update(self, low_rank: list[TargetWeight]) -> list[TargetWeight]:
        """Every nu steps: the last layers first, at every update a larger share; without cores the user has frozen."""
        since = self.t - self.config.delay
        if not low_rank or since <= 0 or since % self.config.frequency:
            return []
        self.updates += 1
        share = min(1.0, self.config.layer_share_step * self.updates)
        first = len(self.targets) - max(1, round(share * len(self.targets)))
        return [target for target in self.targets[first:] if target in low_rank and not self._frozen(target)]

    @exact_arithmetic()
    def _convert(self, targets: list[TargetWeight]) -> list[LayerUpdate]:
        """``W = U diag(s) Vh``; ``U`` and ``Vh`` are frozen, ``S = diag(s)`` is what is trained from now on."""
        self._foreign.check_conversion(targets, self._optimizers.nodes)
        self._check(targets, stateful=targets)
        # What the user has frozen meanwhile keeps its value: nothing is cut off.
        kept = [
            target.k if self._frozen(target) else self.config.limits.initial(target.k) for target in targets
        ]
        done: dict[int, LayerUpdate] = {}
        with self.engine.changing(self.module):
            try:
                for found in weight_factors(targets, kept, self.engine):
                    target, r = targets[found.index], kept[found.index]
                    self._basis.convert(target, found.U, found.s[:r], found.Vh)
                    self._tracker.forget(target.name)
                    done[found.index] = layer_update(
                        target.name, target.shape, target.k, r, found.s, found.seconds
                    )
            finally:
                self._basis.order(self.targets)
        self._check_replicas(targets)
        return [done[i] for i in sorted(done)]

    @exact_arithmetic()
    def _update(self, targets: list[TargetWeight]) -> list[LayerUpdate]:
        """``S = P diag(s) Qh``; ``U <- U P``, ``Vh <- Qh Vh``, ``S <- diag(s)``; small values are dropped."""
        self._check(targets, stateful=self._low_rank())
        done: dict[int, LayerUpdate] = {}
        with self.engine.changing(self.module):
            for found in core_rotations(targets, self.engine):
                target, layer = targets[found.index], targets[found.index].low_rank
                assert layer is not None
                r, dtype = layer.r, self.engine.basis_dtype(layer)
                layer.require_orthonormal(found.error, dtype, target.name)
                wanted = self.config.rule.choose(found.spectrum, layer.m, layer.n)
                keep = self.config.limits.apply(wanted, r, layer.k)
                P, s, Qh = found.P[:, :keep], found.s[:keep], found.Qh[:keep]
                self._basis.rotate(target, P, s, Qh, repair=found.error > self.config.bound_on_errors(dtype))
                done[found.index] = layer_update(
                    target.name, target.shape, r, keep, found.spectrum, found.seconds, **found.figures
                )
        self._check_replicas(targets)
        return [done[i] for i in sorted(done)]

    # -- what it works on ------------------------------------------------------------------------

    def _dense(self) -> list[TargetWeight]:
        return [target for target in self.targets if target.low_rank is None]

    def _low_rank(self) -> list[TargetWeight]:
        return [target for target in self.targets if target.low_rank is not None]

    def _fit(self, targets: list[TargetWeight]) -> list[TargetWeight]:
        """Without those that the user has made unfit since the start, which are named in a warning and dropped."""
        unfit = drop_unfit(self.module, targets, self._optimizers) if targets else set()
        self.targets = self._loader.targets = [target for target in self.targets if target.name not in unfit]
        return [target for target in targets if target.name not in unfit]

    def _note_weights(self, names: Iterable[str]) -> None:
        """Remember the dense weights of these layers, which must not be replaced by others."""
        self._given |= {
            target.name: weakref.ref(target.weight) for target in self._dense() if target.name in names
        }

    def _check(self, targets: list[TargetWeight], *, stateful: list[TargetWeight]) -> None:
        """What must hold before ``targets`` change; ``stateful`` are those whose optimizer state is checked."""
        check_structure(self.module, targets, self._given)
        check_change(stateful, self._optimizers, self.engine, self.config.core_lr_scale)
        require_finite(targets, self.engine)
        for layer in low_rank_layers(self.module).values():
            layer.keep_bases_frozen()

    def _check_replicas(self, targets: list[TargetWeight]) -> None:
        """Ranks must hold equal bits after every change."""
        self._foreign.remember(self.targets)
        layers, local = low_rank_layers(self.module), self.engine.layout.local
        factors = {target.name: [local(p) for p in layers[target.name].factors] for target in targets}
        plain = plain_parameters(self.module, self.engine.ignored)
        rest = {name: [self.engine.local_shard(p)] for name, p in plain.items()}
        self.engine.check_replicas(factors | rest)

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and the r of every low-rank layer; plain numbers, fit for JSON."""
        return {"t": self.t, "updates": self.updates, "r": self.r, "streaks": dict(self._tracker.streaks)}

    def tensor_state(self) -> dict[str, Tensor]:
        """The bases kept for measuring stability in the full-rank phase; a collective call."""
        return self._tracker.bases(self._dense())

    @exact_arithmetic()
    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Take the structure of a checkpoint: counters, and layers of the stored r, still empty.

        The model's state may be loaded before or after it, the optimizer's after one of them: its state belongs to the
        structure. A forward pass before the model's state is there raises an error.

        Raises
        ------
        ModelError
            If a stored layer is not among this model's, the optimizer's state was loaded before its structure, or the
            bases are missing on which the moment of conversion depends.
        """
        self._tracker.require(tensors, state["streaks"])
        changed = self._loader.take(state["r"])
        self._note_weights(changed)
        self.t, self.updates = int(state["t"]), int(state["updates"])
        self._tracker.restore(tensors or {}, state["streaks"])
        if state["r"] and not changed:
            self.rewrap()

    def before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *, assign: bool) -> None:
        """Called before every ``load_state_dict`` of the model: its layers take the structure of what is loaded."""
        self._foreign.forget()
        self._note_weights(self._loader.before_load(module, state, prefix, assign=assign))

    def before_optimizer_load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Called before every ``load_state_dict`` of the optimizer: groups of another structure raise an error."""
        require_same_groups(optimizer, state)

    def after_optimizer_load(self, optimizer: Optimizer) -> None:
        """Called after it: state of another structure raises an error."""
        self._loader.after_optimizer_load(optimizer)
