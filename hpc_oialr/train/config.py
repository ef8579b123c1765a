"""The settings of a run as typed objects that check their fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hpc_oialr.data import DataConfig
from hpc_oialr.distributed.signals import check_name
from hpc_oialr.engines import DDP, EngineConfig
from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.models import ModelConfig
from hpc_oialr.record.trackers import check_tracker
from hpc_oialr.train.optimizers import OptimizerConfig
from hpc_oialr.train.schedules import ScheduleConfig, WarmupCosine
from hpc_oialr.train.tasks import Task

Precision = Literal["fp32", "bf16", "bf16-params", "fp16", "float64"]


@dataclass(kw_only=True)
class TrainConfig:
    """The loop.

    Parameters
    ----------
    epochs
        Length of the run in passes over the training data.
    steps
        Length of the run in steps; overrides ``epochs``.
    global_batch
        Samples per step, all ranks together.
    accumulation
        Parts into which each process splits its share of a batch, to save memory.
    precision
        fp32 and float64 throughout; bf16 and fp16 by autocast, fp16 with a loss scale; bf16-params: forward and
        backward pass on bf16 copies of the fp32 parameters, so that activations are bf16 too. Normalisations and the
        loss compute in fp32 inside.
    tf32
        On CUDA, products of fp32 matrices and convolutions in TF32, in every precision: 10 bits of the inputs, sums
        in fp32. The cores' Newton-Schulz follows; SVDs, Gram matrices and changes of basis are in IEEE fp32 anyway.
    gradient_clip
        Largest 2-norm of the gradient of all parameters together; null = off.
    seed
        Of everything random.
    evaluations
        How many, equally spaced in steps, the last one at the end.
    evaluation_batch
        Samples per evaluation step and process.
    early_stopping
        Stop after so many evaluations in a row without a better metric; null = off.
    test_at_best
        Evaluate on the test set too whenever the validation metric is the best so far; ``test_at_best`` in
        ``summary.json`` is that of the best validation metric, the usual protocol with early stopping.
    sync_batch_norm
        Batch statistics over all ranks; on GPUs only.
    activation_checkpointing
        Recompute activations in the backward pass, where the model can.
    cuda_graph
        Whether a whole step is captured as a CUDA graph and replayed, which takes the launches off the host: "auto"
        on one GPU, unless something prevents it, which the log and ``summary.json`` name; "on" makes that an error;
        "off". It is captured anew, in about a second, after every change of r.
    channels_last
        Whether images, and with them what convolutions compute, are stored with their channels last, as tensor cores
        read them: "auto" on a GPU, where the model has more than one Conv2d; "on", "off". Weights stay as they are.
    workers
        Data loader processes; 0 = load in the training process.
    device
        "cpu", "cuda"; null = CUDA where there is one.
    profile
        Write a trace of torch's profiler of so many steps, after ten others, into RUN/profile; null = none.
    profile_ranks
        Ranks that write one.
    peak_tflops
        Of one device, in dense products of this precision, for the MFU shown; null = from its data sheet (A100, H100,
        H200), no MFU for others.
    timeout_s
        A process that keeps the others waiting this long counts as dead and ends the run, which can be resumed (s).
        Must be longer than the SVD of the largest layer, than a checkpoint, and than the time between the start of
        the first process and of the last.
    stop_signal
        Upon this signal, and upon TERM, a run writes a checkpoint and stops with exit code 75: "USR2", "USR1"
        (which NCCL uses too), "TERM" or "HUP".
    health_check
        Check first that every process has its device, that an all-reduce is right, and that versions and settings
        are the same everywhere.
    """

    epochs: float | None = None
    steps: int | None = None
    global_batch: int = 128
    accumulation: int = 1
    precision: Precision = "fp32"
    tf32: bool = True
    gradient_clip: float | None = None
    seed: int = 0
    evaluations: int = 10
    evaluation_batch: int = 500
    early_stopping: int | None = None
    test_at_best: bool = False
    sync_batch_norm: bool = False
    activation_checkpointing: bool = False
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    channels_last: Literal["auto", "on", "off"] = "auto"
    workers: int = 0
    device: str | None = None
    profile: int | None = None
    profile_ranks: tuple[int, ...] = (0,)
    peak_tflops: float | None = None
    timeout_s: float = 600.0
    stop_signal: str = "USR2"
    health_check: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ConfigError("epochs", None, "must be set, or steps", fix="E.g. --train.epochs 3")
        for name in ("epochs", "steps", "gradient_clip", "early_stopping", "profile", "peak_tflops"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(name, getattr(self, name), "must be positive")
        for name in ("global_batch", "accumulation", "evaluations", "evaluation_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        check_name("stop_signal", self.stop_signal)
        check_interval("timeout_s", self.timeout_s, 1, 86_400, closed=(True, True))
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "must not be negative")
        fix = "One a core of a process is plenty."
        check_interval("workers", self.workers, 0, 1024, closed=(True, True), fix=fix)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * steps_per_epoch))

    def check_accumulation(self, world_size: int) -> None:
        """Raise :class:`ConfigError` unless ``accumulation`` divides a rank's share of a batch."""
        local = self.global_batch // world_size
        if self.global_batch % world_size == 0 and local % self.accumulation:
            rule = f"must divide the {local} samples that each of {world_size} ranks takes per step"
            raise ConfigError("accumulation", self.accumulation, rule)


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints; one is always written at the end of a run.

    Parameters
    ----------
    every
        Steps between two; null = only at the end.
    keep
        How many of the last ones stay.
    asynchronous
        Whether the training goes on as soon as the state is copied to the host's memory, while a thread writes it.
        The next checkpoint, the end of the run and a stop wait for it.
    """

    every: int | None = 500
    keep: int = 2
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError("every", self.every, "must be at least 1 step, or null")
        if self.keep < 1:
            raise ConfigError("keep", self.keep, "must be at least 1")


@dataclass(kw_only=True)
class RecordConfig:
    """What a run writes down.

    Parameters
    ----------
    every
        Steps between two rows of training loss in ``metrics.jsonl``.
    spectra
        Keep losses and times of steps, and the singular values of every event, in ``spectra.h5``. null: events of
        the method, so none of a dense run; true: while matrices are dense measure them too, in a dense run all
        along; false: write nothing.
    frequency
        Steps between two measurements of dense matrices, where ``spectra`` is true and the method has no
        ``stability_frequency`` of its own. Each costs an SVD of every matrix.
    spectra_queue
        How many events may wait to be written beside the training.
    tracker
        An experiment tracker that gets all numbers too, with r and stability of each layer: comet, mlflow, tensorboard,
        trackio or wandb; needs the extra ``trackers`` and the tracker's package. A resumed run continues the tracker's.
    project
        Under which the tracker lists the run.
    """

    every: int = 20
    spectra: bool | None = None
    frequency: int = 100
    spectra_queue: int = 64
    tracker: str | None = None
    project: str = "hpc_oialr"

    def __post_init__(self) -> None:
        if self.tracker is not None:
            check_tracker(self.tracker)
        for name, unit in (("every", "step"), ("frequency", "step"), ("spectra_queue", "event")):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), f"must be at least 1 {unit}")


@dataclass(kw_only=True)
class RunConfig:
    """A run.

    Parameters
    ----------
    data, model, task, optimizer, schedule, engine
        Choices of type, as ``class_path`` and ``init_args``.
    oialr
        The method; null trains dense.
    train, checkpoint, record
        See their types.
    compile
        What ``torch.compile`` compiles: "off" nothing; "blocks" each block of the model's longest list of blocks, all
        of them by one compilation for every set of r; "model" the model as a whole. Evaluations are not compiled.
        Recompilations are counted in the summary.
    dense
        Settings of the dense baseline that differ when ``oialr compare --own`` or ``oialr train --dense`` trains it; same
        structure.
    paper
        Settings that differ in the published method, which ``--paper`` trains: these over ``OIALRConfig.paper()`` and the
        recipe's delay, frequency and selection; same structure.
    """

    data: DataConfig
    model: ModelConfig
    task: Task
    optimizer: OptimizerConfig
    train: TrainConfig
    schedule: ScheduleConfig = field(default_factory=WarmupCosine)
    oialr: OIALRConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    engine: EngineConfig = field(default_factory=DDP)
    compile: Literal["off", "blocks", "model"] = "off"
    dense: dict[str, Any] | None = None
    paper: dict[str, Any] | None = None
