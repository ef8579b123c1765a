"""The options of ``oialr plan``, and the planner and engines they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_oialr.engines import EngineConfig
from hpc_oialr.errors import ConfigError, UnknownNameError, check_interval
from hpc_oialr.plan.machine import Machine, cluster, gpu_machine, network_link, this_machine
from hpc_oialr.plan.planner import Planner
from hpc_oialr.plan.scripted_run import probe
from hpc_oialr.plan.workload import Workload, all_engines
from hpc_oialr.train.config import RunConfig

DEFAULT_NETWORK = "hdr200"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of a plan, as ``oialr plan --help`` explains them; None and () stand for the defaults."""

    nodes: Sequence[int]
    gpus_per_node: int | None = None
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
        adapters = 1 if self.adapters is None else self.adapters
        counts = {"--nodes": self.nodes, "--gpus-per-node": [self.per_node], "--adapters": [adapters]}
        for name, values in counts.items():
            if not values or min(values) < 1:
                raise ConfigError(name, list(values), "must be at least 1")
        check_interval("--r-fraction", self.r_fraction, 0, 1, closed=(False, True))
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError("--memory-gib", self.memory_gib, "must be positive")
        other = self.site or self.gpu
        for name, value in (("--probe", self.probe), ("--calibration", str(self.calibration or ""))):
            if value and other:
                rule = f"is of the machine at hand, and the plan is for {other}"
                raise ConfigError(name, value, rule, fix=f"Leave out --site and --gpu, or {name}.")
        if self.adapters is not None and not (other or self.network):
            rule = "needs a network whose adapters they are"
            raise ConfigError("--adapters", self.adapters, rule, fix="Name it: --network, --gpu or --site.")

    @property
    def per_node(self) -> int:
        """Processes of a node: as given, the site's, or 1."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return cluster(self.site).gpus_per_node if self.site else 1

    def machine(self) -> Machine:
        """Presets where any is named; otherwise the machine at hand, measured."""
        site = cluster(self.site) if self.site else None
        gpu = self.gpu or (site.gpu if site else None)
        network = self.network or (site.network if site else None)
        adapters = self.adapters or (site.adapters if site else 1)
        if gpu is not None:
            return gpu_machine(gpu, network or DEFAULT_NETWORK, adapters)
        machine = this_machine(self.calibration)
        if network is None:
            return machine
        link, source = network_link(network)
        return replace(machine, between=link, adapters=adapters, fitted={}, links=f"stated: {source}")

    def chosen_engines(self, of_recipe: EngineConfig) -> list[EngineConfig]:
        """By name; the recipe's if there are none."""
        if not self.engines:
            return [of_recipe]
        known = all_engines(self.per_node)
        if list(self.engines) == ["all"]:
            return known
        valid = {type(engine).__name__ for engine in known}
        for name in self.engines:
            if name not in valid:
                raise UnknownNameError("engine", name, [*valid, "all"])
        return [engine for engine in known if type(engine).__name__ in self.engines]


def prepare(config: RunConfig, request: Request) -> tuple[Planner, list[EngineConfig]]:
    """A planner, with steps measured if requested, and the engines to plan with."""
    workload, machine, per_node = Workload.of(config, request.samples), request.machine(), request.per_node
    engines = request.chosen_engines(config.engine)
    memory_gib = request.memory_gib or machine.memory_of_process_gib(per_node)
    planner = Planner(workload, machine, memory_gib, r_fraction=request.r_fraction, weak=request.weak)
    if request.probe:
        batches = {planner.deployment(n, per_node, engine).batch for n in request.nodes for engine in engines}
        planner.use(probe(workload, planner.rule, batches, machine.threads(per_node)))
    return planner, engines
