"""Muon for weight matrices and cores beside AdamW for the rest, as one optimizer object.

How the momentum follows a change of basis: docs/architecture.md, "How Muon's momentum is carried".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.linalg.newton_schulz import Precision, newton_schulz_each
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.linalg.work_plan import longest_processing_time
from hpc_oialr.lowrank import Selection, low_rank_layers, select
from hpc_oialr.lowrank.layout import chunk, exchange, local

Group = dict[str, Any]
Map = Callable[[Sequence[Tensor]], list[Tensor]]
ALGORITHMS = ("muon", "adamw")

# A core wants a somewhat larger step than the dense weight did: in exploratory runs of one seed, on
# validation images, 1.6 times the best dense rate did better than 3 and 6 times.
CORE_LR_RATIO = 1.5


def muon_adamw(
    model: nn.Module,
    *,
    lr: float = 0.01,
    core_lr: float | None = None,
    bases_lr: float | None = None,
    adamw_lr: float = 1e-3,
    dense_algorithm: str = "muon",
    selection: Selection | None = None,
    **options: Any,
) -> MuonAdamW:
    """Muon for the weights that can become low-rank and for their cores, AdamW for every other parameter.

    The groups, each with a learning rate that schedulers see: dense matrices, cores (empty until the conversion, then
    :class:`hpc_oialr.OIALR` moves each core there), the rest, with and without weight decay, and with ``bases_lr`` the
    bases ``U`` and ``Vh``, without weight decay.

    Parameters
    ----------
    model
        Dense or already low-rank.
    lr
        Learning rate of the dense matrices.
    core_lr
        Muon's learning rate of the cores; default ``CORE_LR_RATIO`` times ``lr`` under Muon, 0.01 otherwise.
    bases_lr
        Muon's learning rate of ``U`` and ``Vh``, where ``OIALRConfig(train=..., bases_trained=...)`` trains them; None:
        no such group.
    adamw_lr
        Learning rate of the rest.
    dense_algorithm
        "muon", or "adamw" for matrices that are still dense: cheaper steps where Newton-Schulz on an
        m x n matrix would cost more than it gives.
    selection
        Which weights count as matrices; default all layers :class:`Selection` admits.
    options
        Further keyword arguments of :class:`MuonAdamW`, for all groups.
    """
    matrices = [target.weight for target in select(model, selection)]
    cores = [layer.S for layer in low_rank_layers(model).values()]
    taken = {id(p) for p in [*matrices, *cores]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    decayed, others = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]
    if core_lr is None:
        core_lr = CORE_LR_RATIO * lr if dense_algorithm == "muon" else 0.01
    groups = [
        {"params": matrices, "algorithm": dense_algorithm, "lr": lr},
        {"params": cores, "algorithm": "muon", "lr": core_lr, "cores": True},
        {"params": decayed, "algorithm": "adamw", "lr": adamw_lr},
        {"params": others, "algorithm": "adamw", "lr": adamw_lr, "weight_decay": 0.0},
    ]
    if bases_lr is not None:
        groups.append({"params": [], "algorithm": "muon", "lr": bases_lr, "weight_decay": 0.0, "bases": True})
    return MuonAdamW(groups, **options)


class MuonAdamW(Optimizer):
    """Muon and AdamW side by side; each parameter group names its ``algorithm``.

    Muon's step: ``M <- momentum M + (1 - momentum) G``; ``D`` = Newton-Schulz of ``M`` (or of
    Nesterov's ``G + momentum (M - G)``); ``W <- (1 - lr wd) W - lr sqrt(max(1, m/n)) D``. Matrices of one size
    class go through Newton-Schulz in one batch, see :func:`newton_schulz_each`; a sharded one is gathered on one of its
    ranks and scattered again. Weights with more axes are flattened to (leading axis) x (all the rest).

    After the first step, which makes the state, a step neither waits for the device nor reads from it, and a CUDA graph
    can hold it; a learning rate that changes between replays must be a tensor on the device.

    Parameters
    ----------
    params
        Groups with a key ``"algorithm"``, ``"muon"`` or ``"adamw"``, and any of the options below.
        A group with ``"cores": True`` takes the core of every weight of the other groups that is
        converted, and its momentum with it; one with ``"bases": True`` takes ``U`` and ``Vh`` where they are trained.
    lr
        Default learning rate of groups without one; a number or a tensor without axes.
    momentum, nesterov, newton_schulz_steps, newton_schulz_dtype
        Muon's options. The dtype default is :func:`newton_schulz`'s for dense matrices, and at least
        float32 for cores: they are small, and bfloat16 would turn last-bit differences of their gradients,
        as another number of processes makes, into differences of 1e-3 after a hundred steps. On CUDA float32 goes
        in TF32 where torch is allowed to, "tf32" in any case.
    betas, eps
        AdamW's options.
    weight_decay
        Decoupled, for both; :func:`muon_adamw` gives parameters with one axis none.

    Raises
    ------
    UnknownNameError
        For a group with another ``algorithm``.
    ConfigError
        For a negative rate or decay, a momentum outside [0, 1), or a Muon parameter with one axis.

    References
    ----------
    K. Jordan, "Muon" (2024); Loshchilov & Hutter, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Group] | Iterable[Tensor],
        *,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: Precision = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {
            "algorithm": "muon",
            "cores": False,
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_dtype": newton_schulz_dtype,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            # torch.optim.Optimizer.load_state_dict looks here for the device of "step".
            "fused": True,
        }
        super().__init__(cast(Any, params), defaults)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; options and shapes are checked here, before any step."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["algorithm"] not in ALGORITHMS:
            raise UnknownNameError("algorithm", str(group["algorithm"]), ALGORITHMS)
        for name in ("lr", "weight_decay"):
            if group[name] < 0:
                raise ConfigError(name, group[name], "must not be negative")
        if not 0 <= group["momentum"] < 1:
            raise ConfigError("momentum", group["momentum"], "must lie in [0, 1)")
        for p in group["params"]:
            if group["algorithm"] == "muon" and p.dim() < 2:
                fix = 'Give it algorithm="adamw", or use muon_adamw(model).'
                raise ConfigError("params", tuple(p.shape), "must have at least two axes under Muon", fix=fix)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After loading or unpickling: options that older checkpoints lack, and ``step`` where the kernel reads it."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("fused", True)
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    self.state[p]["step"] = self.state[p]["step"].to(p.device, torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; an option that a stored group lacks stays as it is.

        ``torch.distributed.checkpoint`` stores no options of a group without parameters, as that for cores is before
        the conversion.
        """
        stored = state_dict["param_groups"]
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        if len(stored) == len(own):
            stored = [{**mine, **theirs} for mine, theirs in zip(own, stored, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": stored})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["algorithm"] == "muon" else self._adamw)(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: Group) -> None:
        directions = self._momentum(params, group)
        dtype: Precision = group["newton_schulz_dtype"]
        if dtype is None and group["cores"]:
            dtype = compute_dtype(directions[0].dtype)
        iterate = partial(newton_schulz_each, steps=group["newton_schulz_steps"], dtype=dtype)
        done = _orthogonalize(directions, iterate)
        lr: float | Tensor = group["lr"]
        torch._foreach_mul_(_parts(params), 1 - lr * group["weight_decay"])
        by_scale: defaultdict[float, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            by_scale[max(1.0, p.shape[0] ** 2 / p.numel()) ** 0.5].append(i)
        for scale, members in by_scale.items():
            chosen = _parts([params[i] for i in members])
            steps = [done[i] for i in members]
            if isinstance(lr, Tensor):
                # ``alpha`` would be read on the host.
                torch._foreach_mul_(steps, -lr * scale)
                torch._foreach_add_(chosen, steps)
            else:
                torch._foreach_add_(chosen, steps, alpha=-lr * scale)

    def _momentum(self, params: list[Tensor], group: Group) -> list[Tensor]:
        """Update the momenta; returns the matrices to orthogonalize."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [cast(Tensor, p.grad) for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(_parts(buffers), _parts(grads), 1 - group["momentum"])
        if not group["nesterov"]:
            return buffers
        ahead = torch._foreach_lerp(_parts(grads), _parts(buffers), group["momentum"])
        return [_stored_like(p, direction) for p, direction in zip(params, ahead, strict=True)]

    def _adamw(self, params: list[Tensor], group: Group) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            _parts(params),
            _parts([cast(Tensor, p.grad) for p in params]),
            _parts([self.state[p]["exp_avg"] for p in params]),
            _parts([self.state[p]["exp_avg_sq"] for p in params]),
            [],
            _parts([self.state[p]["step"] for p in params]),
            fused=group["fused"] and all(p.device.type in ("cpu", "cuda") for p in params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank stores of each tensor: elementwise steps need no more."""
    return [local(tensor) for tensor in tensors]


def _stored_like(parameter: Tensor, part: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def _orthogonalize(directions: Sequence[Tensor], iterate: Map) -> list[Tensor]:
    """Newton-Schulz of every matrix; of sharded ones (DTensors, along their first axis) this rank's parts.

    Sharded matrices are distributed over the ranks by cost, each is iterated whole on one of them: an all-to-all of
    m n / P numbers a matrix brings the parts there, another one back.
    """
    results: dict[int, Tensor] = {}
    whole = [i for i, d in enumerate(directions) if not isinstance(d, DTensor)]
    results |= zip(whole, iterate([directions[i] for i in whole]), strict=True)
    groups: defaultdict[dist.ProcessGroup, list[int]] = defaultdict(list)
    for i, direction in enumerate(directions):
        if isinstance(direction, DTensor):
            axis = next(a for a, p in enumerate(direction.placements) if isinstance(p, Shard))
            groups[direction.device_mesh.get_group(axis)].append(i)
    for group, members in groups.items():
        results |= zip(members, _exchanged([directions[i] for i in members], group, iterate), strict=True)
    return [results[i] for i in range(len(directions))]


def _exchanged(directions: Sequence[Tensor], group: dist.ProcessGroup, iterate: Map) -> list[Tensor]:
    """To the owners, through Newton-Schulz there, and back; all of one group, in one dtype."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shapes = [(d.shape[0], d.numel() // d.shape[0]) for d in directions]
    owners = longest_processing_time([float(m) * n * min(m, n) for m, n in shapes], size)
    owned = [[i for i, owner in enumerate(owners) if owner == p] for p in range(size)]
    stored = _parts(directions)
    parts = [part.reshape(-1, n) for part, (_, n) in zip(stored, shapes, strict=True)]
    rows = [[chunk(m, size, p) for p in range(size)] for m, _ in shapes]

    def of_rank(i: int, p: int) -> tuple[int, int]:
        return rows[i][p].stop - rows[i][p].start, shapes[i][1]

    there = [[parts[i] for i in theirs] for theirs in owned]
    expected = [[of_rank(i, p) for i in owned[rank]] for p in range(size)]
    received = exchange(there, expected, group, parts[0])
    done = iterate([torch.cat(pieces) for pieces in zip(*received, strict=True)])
    back = [[matrix[rows[i][p]] for i, matrix in zip(owned[rank], done, strict=True)] for p in range(size)]
    expected = [[of_rank(i, rank) for i in theirs] for theirs in owned]
    received = exchange(back, expected, group, parts[0])
    results = dict(zip(chain(*owned), chain(*received), strict=True))
    return [results[i].view_as(part) for i, part in enumerate(stored)]
