"""Orthogonality-Informed Adaptive Low-Rank training: the paper's algorithm, line by line."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.lowrank import TargetWeight, low_rank_layers
from hpc_oialr.lowrank.attachment import Attachment, untie
from hpc_oialr.method.basis import BasisUpdater
from hpc_oialr.method.checks import (
    check_change,
    check_optimizer,
    check_structure,
    plain_parameters,
    require_finite,
    require_own_bases,
    require_unattached,
)
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.decompositions import Factors, Rotation, core_rotations, weight_factors
from hpc_oialr.method.engine import Engine, adopt
from hpc_oialr.method.foreign_steps import ForeignSteps
from hpc_oialr.method.loading import Loader, require_same_groups
from hpc_oialr.method.participants import FrozenByUser, drop_unfit, find_participants
from hpc_oialr.method.report import Kind, LayerUpdate, UpdateReport, layer_update
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
        in place; those that are low-rank already, of a run before or by ``match_structure``, go on from their r.
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
                f"{len(averages)} running averages were given, but the engine splits each matrix over processes; "
                "averages must be whole. Average the exported models, or use DistributedDataParallel."
            )
        check_change(self.targets, self._optimizers, self.engine, self.config.core_lr_scale)
        self._changes = BasisUpdater(self.module, self._optimizers, self.config, averages, self.engine)
        adopted = self._changes.adopt(self.targets)
        self._watch = StabilityTracker(self.targets, self.engine, self.config.stability_threshold)
        self._model = self.engine.wrap(self.module, optimizer)
        self._loader = Loader(self.module, self.targets, self._changes, self.engine)
        if adopted:
            # Values may be yet to come, and a wrapper may have been made before the layers were.
            self._loader.empty = {target.name for target in adopted}
            self.rewrap()
        self._tie()
        self._foreign = ForeignSteps(self._changes.core_lr, self.engine)
        self._foreign.remember(self.targets)

    def _tie(self) -> None:
        self._given = {target.name: weakref.ref(target.weight) for target in self._dense()}
        self._attachment = Attachment(self)
        holders = [module for target in self.targets for module in (target.owner, target.holder)]
        self._attachment.tie(self.module, holders, self._optimizers.nodes)
        for guard in self._changes.guards:
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
        """Take the state, and tie the model in it."""
        vars(self).update(state)
        self._tie()

    def __repr__(self) -> str:
        """Where it stands."""
        model = type(self.module).__name__
        return f"OIALR(step {self.t}, {len(self.r)} of {len(self.targets)} layers of {model} low-rank)"

    @property
    def model(self) -> nn.Module:
        """What to call in the loop: the model as it was given, in a ``DistributedDataParallel`` where processes need one.

        The object stays the same for the whole run; a wrapper of the user's own may be called just as well.
        """
        return self._model

    @property
    def r(self) -> dict[str, int]:
        """Inner dimension of every low-rank layer."""
        return {name: layer.r for name, layer in low_rank_layers(self.module).items()}

    @property
    def layers(self) -> list[str]:
        """Names of the layers that take part, in the model's order."""
        return [target.name for target in self.targets]

    def no_sync(self) -> AbstractContextManager[None]:
        """Context for all but the last backward pass of an accumulated step: gradients stay local."""
        return self.engine.no_sync(self._model)

    def rewrap(self) -> None:
        """The wrapper's buckets made anew, as a resumed run begins with; nothing is broadcast."""
        self._model = self.engine.rewrap(self.module)

    def detach(self) -> None:
        """Let go of model and optimizer: layers stay as they are, and cores get the step their optimizer gives them."""
        untie(self.module)
        for guard in self._changes.guards:
            guard.release()
        self._changes.core_lr.remove()

    def before_forward(self) -> None:
        """Called before every forward pass of the model: refuse what would go wrong without a word."""
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
            If processes hold different factors after an update, or different values of what is not low-rank.
        """
        self.engine.check_step()
        self._foreign.check(self.targets)
        self._loader.optimizer_loaded = False
        self.t += 1
        report = self._advance()
        self._frozen.remember(self.targets)
        return report

    def _advance(self) -> UpdateReport | None:
        """Measure, convert what has settled, update what was low-rank before: whatever is due in this step."""
        done: list[UpdateReport] = []
        low_rank = [target for target in self.targets if target.low_rank is not None]
        if self._stability_due():
            done.append(self._watch.report(self._fit(self._dense()), self.t))
        settled = self._fit(self._settled())
        if settled:
            done.append(self._convert(settled))
        if low_rank and self._update_due():
            self.updates += 1
            due = [target for target in self._next_to_update() if target in low_rank]
            if due:
                done.append(self._update(due))
        return replace(done[-1], earlier=tuple(done[:-1])) if done else None

    def _fit(self, targets: list[TargetWeight]) -> list[TargetWeight]:
        """Without those that the user has made unfit since the start; they take part no more, and are named."""
        unfit = drop_unfit(self.module, targets, self._optimizers) if targets else set()
        self.targets = self._loader.targets = [target for target in self.targets if target.name not in unfit]
        return [target for target in targets if target.name not in unfit]

    def _stability_due(self) -> bool:
        every = self.config.stability_frequency
        return every is not None and self.t % every == 0 and bool(self._dense())

    def _settled(self) -> list[TargetWeight]:
        """Dense layers whose basis is to be frozen now: at step d all, or those that have been stable.

        A weight that has been frozen from the start waits until it is trained.
        """
        if self.t < self.config.delay:
            return []
        dense = [target for target in self._dense() if not self._frozen.waits(target)]
        if self.config.stability_threshold is None:
            return dense
        streaks, patience = self._watch.streaks, self.config.stability_patience
        return [target for target in dense if streaks.get(target.name, 0) >= patience]

    def _update_due(self) -> bool:
        since = self.t - self.config.delay
        return since > 0 and since % self.config.frequency == 0

    def _next_to_update(self) -> list[TargetWeight]:
        """The last layers first, at every update a larger share; without those whose core the user has frozen."""
        share = min(1.0, self.config.layer_share_step * self.updates)
        first = len(self.targets) - max(1, round(share * len(self.targets)))
        return [target for target in self.targets[first:] if not self._frozen(target)]

    def _dense(self) -> list[TargetWeight]:
        return [target for target in self.targets if target.low_rank is None]

    @exact_arithmetic()
    def _convert(self, targets: list[TargetWeight]) -> UpdateReport:
        """``W = U diag(s) Vh``; ``U`` and ``Vh`` are frozen, ``S = diag(s)`` is what is trained from now on."""
        start = time.perf_counter()
        self._foreign.check_conversion(targets, self._optimizers.nodes)
        check_structure(self.module, targets, self._given)
        check_change(targets, self._optimizers, self.engine, self.config.core_lr_scale)
        require_finite(targets, self.engine)
        # What the user has frozen meanwhile keeps its value: nothing is cut off.
        kept = [
            target.k if self._frozen(target) else self.config.limits.initial(target.k) for target in targets
        ]
        layers: dict[int, LayerUpdate] = {}
        try:
            for factors in weight_factors(targets, kept, self.engine):
                layers[factors.index] = self._freeze_basis(
                    targets[factors.index], factors, kept[factors.index]
                )
        finally:
            self._changes.order(self.targets)
        self._after_change([target.name for target in targets], reshaped=True)
        sent = sum(target.k + r * sum(target.shape) for target, r in zip(targets, kept, strict=True))
        return self._report("conversion", _in_order(layers), start, sent)

    @exact_arithmetic()
    def _update(self, targets: list[TargetWeight]) -> UpdateReport:
        """``S = P diag(s) Qh``; ``U <- U P``, ``Vh <- Qh Vh``, ``S <- diag(s)``; small values are dropped."""
        start = time.perf_counter()
        check_structure(self.module, targets, self._given)
        low_rank = [target for target in self.targets if target.low_rank is not None]
        check_change(low_rank, self._optimizers, self.engine, self.config.core_lr_scale)
        require_finite(targets, self.engine)
        layers: dict[int, LayerUpdate] = {}
        for rotation in core_rotations(targets, self.engine):
            layers[rotation.index] = self._rotate_and_cut(targets[rotation.index], rotation)
        self._after_change(
            [target.name for target in targets], reshaped=any(u.cut_values for u in layers.values())
        )
        sent = sum(2 * u.r_before**2 + u.r_before + 4 for u in layers.values())
        return self._report("update", _in_order(layers), start, sent)

    # -- one layer -------------------------------------------------------------------------------

    def _freeze_basis(self, target: TargetWeight, factors: Factors, r: int) -> LayerUpdate:
        self._changes.convert(target, factors.U, factors.s[:r], factors.Vh)
        self._watch.forget(target.name)
        return layer_update(target, target.k, factors.s, None, (0.0, 0.0), factors.seconds)

    def _rotate_and_cut(self, target: TargetWeight, rotation: Rotation) -> LayerUpdate:
        layer = target.low_rank
        assert layer is not None
        P, s, Qh, r = rotation.P, rotation.s, rotation.Qh, layer.r
        wanted = self.config.rule.choose(rotation.spectrum, layer.m, layer.n)
        keep = self.config.limits.apply(wanted, r, layer.k)
        stored = self.engine.basis_dtype(layer)
        drifted = max(rotation.errors) > self.config.bound_on_errors(stored)
        require_own_bases(layer, target.name, max(rotation.errors), stored)
        self._changes.rotate(layer, target.name, P[:, :keep], s[:keep], Qh[:keep], repair=drifted)
        update = layer_update(
            target, r, rotation.spectrum, rotation.stability, rotation.errors, rotation.seconds
        )
        angle_U, angle_Vh = rotation.angles
        return replace(update, subspace_angle_U=angle_U, subspace_angle_Vh=angle_Vh)

    def _after_change(self, names: Sequence[str], *, reshaped: bool) -> None:
        """Nothing is rebuilt when no shape changed; replicas must be equal bit for bit either way."""
        layers, local = low_rank_layers(self.module), self.engine.layout.local
        for layer in layers.values():
            layer.keep_bases_frozen()
        if reshaped:
            self.rewrap()
        self._foreign.remember(self.targets)
        factors = {name: [local(p) for p in layers[name].factors] for name in names}
        plain = plain_parameters(self.module, self.engine.ignored)
        rest = {name: [self.engine.local_shard(p)] for name, p in plain.items()}
        self.engine.check_replicas(factors | rest)

    def _report(
        self, kind: Kind, layers: tuple[LayerUpdate, ...], start: float, numbers: int
    ) -> UpdateReport:
        width = compute_dtype(self.targets[0].trained.dtype).itemsize
        sent = numbers * width * (self.engine.world.size - 1)
        return UpdateReport(
            t=self.t, kind=kind, layers=layers, seconds=time.perf_counter() - start, bytes_sent=sent
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and the r of every low-rank layer; plain numbers, fit for JSON."""
        return {"t": self.t, "updates": self.updates, "r": self.r, "streaks": dict(self._watch.streaks)}

    def tensor_state(self) -> dict[str, Tensor]:
        """The bases kept for measuring stability in the full-rank phase; a collective call."""
        return self._watch.bases(self._dense())

    @exact_arithmetic()
    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Take the structure of a checkpoint: counters, and layers of the stored r, still empty.

        The model's state may be loaded before or after it, the optimizer's after one of them: its state belongs to the
        structure. A forward pass before the model's state is there is refused.

        Raises
        ------
        ModelError
            If a stored layer is not among this model's, the optimizer's state was loaded before its structure, or the
            bases are missing on which the moment of conversion depends.
        """
        self._watch.require(tensors, state["streaks"])
        changed = self._loader.take(state["r"])
        self._given |= {
            target.name: weakref.ref(target.weight) for target in self._dense() if target.name in changed
        }
        self.t, self.updates = int(state["t"]), int(state["updates"])
        self._watch.restore(tensors or {}, state["streaks"])
        if changed or state["r"]:
            self.rewrap()

    def before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *, assign: bool) -> None:
        """Called before every ``load_state_dict`` of the model: its layers take the structure of what is loaded."""
        self._foreign.forget()
        changed = self._loader.before_load(module, state, prefix, assign=assign)
        self._given |= {
            target.name: weakref.ref(target.weight) for target in self._dense() if target.name in changed
        }
        if changed:
            self.rewrap()

    def before_optimizer_load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Called before every ``load_state_dict`` of the optimizer: groups of another structure are refused."""
        require_same_groups(optimizer, state)

    def after_optimizer_load(self, optimizer: Optimizer) -> None:
        """Called after it: so is state of another structure."""
        self._loader.after_optimizer_load(optimizer)


def _in_order(layers: dict[int, LayerUpdate]) -> tuple[LayerUpdate, ...]:
    return tuple(layers[i] for i in sorted(layers))
