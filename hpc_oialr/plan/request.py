"""What a plan is asked for, in the words of the command line, and everything it needs to answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_oialr.engines import EngineConfig
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.plan import presets
from hpc_oialr.plan.advice import all_engines
from hpc_oialr.plan.calibration import machine_at_hand
from hpc_oialr.plan.planner import Assumptions, Planner
from hpc_oialr.plan.probe import Probe, probe
from hpc_oialr.plan.sequence import foreseeable
from hpc_oialr.plan.subject import Subject
from hpc_oialr.plan.timing import Machine, with_measured_event
from hpc_oialr.train.config import RunConfig

DEFAULT_NETWORK = "hdr200"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of a plan.

    Attributes
    ----------
    nodes
        Numbers of nodes.
    per_node
        GPUs, or processes, of a node; default the site's, or 1.
    site, gpu, network
        Names of presets; without any the machine at hand.
    adapters
        Network adapters of a node, shared by its GPUs; default the site's, or 1.
    memory_gib
        Of a process; default the GPU's, or its share of this machine's.
    engines
        Names; "all"; default the recipe's.
    r_fraction, weak
        See :class:`hpc_oialr.plan.planner.Assumptions`.
    samples
        Of the training data, where they are not here.
    calibration
        Result file of ``python -m benchmarks.comm``.
    probe
        Train for some steps on this machine, to measure what they take.
    """

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
    def of_site(self) -> presets.Site | None:
        """The site's preset."""
        return None if self.site is None else presets.site(self.site)

    @property
    def processes_per_node(self) -> int:
        """As given, the site's, or 1."""
        site = self.of_site
        return self.per_node or (site.gpus_per_node if site else 1)

    def machine(self) -> Machine:
        """Presets where any is named; otherwise the machine at hand, measured."""
        site = self.of_site
        gpu = self.gpu or (site.gpu if site else None)
        if gpu is None:
            machine = machine_at_hand(self.calibration)
            if self.network is None:
                return machine
            adapters = self.adapters or 1
            return replace(machine, network=presets.network(self.network, machine.device, adapters=adapters))
        device = presets.gpu(gpu)
        network = self.network or (site.network if site else DEFAULT_NETWORK)
        adapters = self.adapters or (site.adapters if site else 1)
        return Machine(device, presets.network(network, device, adapters=adapters))

    def of_process_gib(self, machine: Machine) -> float:
        """Memory that a process may use."""
        return self.memory_gib or machine.device.memory_of_process_gib(self.processes_per_node)


@dataclass(frozen=True)
class Answer:
    """A planner, the engines it is to plan with, and what its figures rest on."""

    planner: Planner
    engines: Sequence[EngineConfig]
    memory_gib: float
    grounds: Sequence[str]


def answer(config: RunConfig, request: Request) -> Answer:
    """Everything but the forecasts.

    Raises
    ------
    ConfigError, UnknownNameError, DataError
        If names are unknown, or the data are needed and not here.
    """
    # What stays dense was said when the recipe was last trained; a plan makes the model again and again.
    logging.getLogger("hpc_oialr.lowrank").setLevel(logging.WARNING)
    subject = Subject.of(config, request.samples)
    machine = request.machine()
    engines = chosen_engines(request.engines, config.engine, request.processes_per_node)
    how = Assumptions(r_fraction=request.r_fraction, weak=request.weak)
    planner = Planner(subject, machine, how)
    found = _probed(planner, request, engines) if request.probe else None
    if found is not None:
        if "conversion" in found.events:
            conversion = planner.first_events["conversion"]
            machine = with_measured_event(machine, conversion, planner.shapes, found.events["conversion"])
        planner = Planner(subject, machine, replace(how, measured=found.seconds))
    return Answer(planner, engines, request.of_process_gib(machine), _grounds(planner, request, found))


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


def _probed(planner: Planner, request: Request, engines: Sequence[EngineConfig]) -> Probe:
    """Steps with the smallest, the middle and the largest share of the batch that the plan is about."""
    per_node = request.processes_per_node
    threads = planner.machine.device.threads(per_node)
    batches = sorted({planner.place(n, per_node, engine).batch for n in request.nodes for engine in engines})
    picked = {batches[0], batches[len(batches) // 2], batches[-1]}
    method = planner.subject.config.oialr
    rule = foreseeable(method.rule, request.r_fraction)[0] if method else None
    return probe(planner.subject, rule, [(batch, threads) for batch in picked])


def _grounds(planner: Planner, request: Request, found: Probe | None) -> list[str]:
    """One line for each thing that is measured, preset or assumed."""
    device, network = planner.machine.device, planner.machine.network
    lines = [
        "counted: memory, operations and messages, by the run's own code on tensors without data; formulas for "
        "DDP's buckets, DeepSpeed, and SVDs of split matrices",
        f"{device.origin}: {device.name} ({device.source})",
        f"{network.origin}: {network.name} ({network.source})",
    ]
    if found is not None:
        lines.append("measured: steps and conversion on one process of this machine")
    elif device.origin == "preset":
        lines.append(
            f"assumed: products reach {device.efficiency:.0%} of the peak, SVDs {presets.SVD_SHARE:.0%} of fp32's, "
            f"collectives {presets.LINK_EFFICIENCY:.0%} of the links, {device.overlap:.0%} of the backward pass hides "
            "messages"
        )
    else:
        lines.append(
            f"assumed: products reach {device.efficiency:.0%} of large ones (--probe measures steps)"
        )
    if planner.subject.assumption:
        lines.append(f"assumed: {planner.subject.assumption}")
    method = planner.subject.config.oialr
    rule = foreseeable(method.rule, request.r_fraction)[1] if method else None
    if rule:
        lines.append(f"assumed: {rule}")
    lines.append("left out: evaluations, checkpoints, data loading, stragglers")
    return lines
