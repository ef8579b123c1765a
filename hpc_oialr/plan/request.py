"""The options of ``oialr plan``, and the planner and engines they stand for, and what the figures rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_oialr.engines import EngineConfig
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.plan import presets
from hpc_oialr.plan.deployment import all_engines
from hpc_oialr.plan.planner import Planner
from hpc_oialr.plan.scripted_run import Probe, probe
from hpc_oialr.plan.timing import Machine, svd_seconds, this_machine
from hpc_oialr.plan.workload import Workload
from hpc_oialr.train.config import RunConfig

DEFAULT_NETWORK = "hdr200"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of a plan, as ``oialr plan --help`` explains them; None and () stand for the defaults."""

    nodes: Sequence[int]
    per_node: int | None = None
    site: str | None = None
    gpu: str | None = None
    network: str | None = None
    adapters: int | None = None
    memory_gib: float | None = None
    engines: Sequence[str] = ()
    r_fraction: float = 0.25
    weak: bool = False
    samples: int | None = None
    calibration: Path | None = None
    probe: bool = False

    def __post_init__(self) -> None:
        for name, values in (("--nodes", self.nodes), ("--gpus-per-node", [self.per_node or 1])):
            if not values or min(values) < 1:
                raise ConfigError(name, list(values), "must be at least 1")
        if not 0 < self.r_fraction <= 1:
            raise ConfigError("--r-fraction", self.r_fraction, "must lie in (0, 1]")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError("--memory-gib", self.memory_gib, "must be positive")
        if self.probe and (self.site or self.gpu):
            rule = f"measures the machine at hand, and the plan is for {self.site or self.gpu}"
            raise ConfigError("--probe", True, rule, fix="Leave out --site and --gpu, or --probe.")

    @property
    def processes_per_node(self) -> int:
        """As given, the site's, or 1."""
        return self.per_node or (presets.cluster(self.site).gpus_per_node if self.site else 1)

    def machine(self) -> Machine:
        """Presets where any is named; otherwise the machine at hand, measured."""
        site = presets.cluster(self.site) if self.site else None
        gpu, network = (
            self.gpu or (site.gpu if site else None),
            self.network or (site.network if site else None),
        )
        adapters = self.adapters or (site.adapters if site else 1)
        if gpu is not None:
            return presets.gpu_machine(gpu, network or DEFAULT_NETWORK, adapters)
        machine = this_machine(self.calibration)
        if network is None:
            return machine
        link, source = presets.network_link(network)
        return replace(machine, between=link, adapters=adapters, fitted={}, links=f"stated: {source}")


@dataclass(frozen=True)
class Plan:
    """A planner, the engines to plan with, the memory of a process, and what the figures rest on."""

    planner: Planner
    engines: Sequence[EngineConfig]
    memory_gib: float
    grounds: Sequence[str]


def prepare(config: RunConfig, request: Request) -> Plan:
    """All but the forecasts.

    Raises
    ------
    ConfigError, UnknownNameError, DataError
        If names are unknown, or the data are needed and not on this machine.
    """
    workload, machine = Workload.of(config, request.samples), request.machine()
    engines = chosen_engines(request.engines, config.engine, request.processes_per_node)
    planner = Planner(workload, machine, r_fraction=request.r_fraction, weak=request.weak)
    probed = _probe(planner, request, engines) if request.probe else None
    if probed is not None:
        if probed.conversion_s:
            alone = planner.deployment(1, 1, engines[0])
            conversion = planner.first_events["conversion"]
            expected_s = svd_seconds(conversion, planner.shapes, alone, machine, sharded=False)
            machine = replace(machine, svd_flops=machine.svd_flops * expected_s / probed.conversion_s)
        planner = Planner(
            workload, machine, r_fraction=request.r_fraction, weak=request.weak, measured=probed.seconds
        )
    memory_gib = request.memory_gib or machine.memory_of_process_gib(request.processes_per_node)
    return Plan(planner, engines, memory_gib, _grounds(planner, probed))


def chosen_engines(names: Sequence[str], of_recipe: EngineConfig, per_node: int) -> list[EngineConfig]:
    """By name; the recipe's if there are none.

    Raises
    ------
    UnknownNameError
        Listing the valid names.
    """
    if not names:
        return [of_recipe]
    known = all_engines(per_node)
    if list(names) == ["all"]:
        return known
    valid = {type(engine).__name__ for engine in known}
    for name in names:
        if name not in valid:
            raise UnknownNameError("engine", name, [*valid, "all"])
    return [engine for engine in known if type(engine).__name__ in names]


def _probe(planner: Planner, request: Request, engines: Sequence[EngineConfig]) -> Probe:
    """Steps with the smallest, the middle and the largest batch per process of the plan."""
    per_node = request.processes_per_node
    threads = planner.machine.threads(per_node)
    batches = sorted(
        {planner.deployment(n, per_node, engine).batch for n in request.nodes for engine in engines}
    )
    loads = {(batches[i], threads) for i in (0, len(batches) // 2, -1)}
    return probe(planner.workload, planner.rule, loads)


def _grounds(planner: Planner, probed: Probe | None) -> list[str]:
    """One line for everything that was counted, measured, stated or assumed."""
    machine, workload = planner.machine, planner.workload
    lines = [
        "counted: memory, operations and messages, by the run's own code on tensors without data; by formula: DDP's "
        "buckets, DeepSpeed, and SVDs of sharded matrices",
        machine.speeds,
        machine.links,
    ]
    if probed is None:
        lines.append(f"assumed: {machine.assumed}")
    else:
        lines.append("measured: steps and conversion of one process on this machine")
    if workload.assumption:
        lines.append(f"assumed: {workload.assumption}")
    if planner.assumption:
        lines.append(f"assumed: {planner.assumption}")
    lines.append("left out: evaluations, checkpoints, data loading, stragglers, new bases of an event")
    return lines
