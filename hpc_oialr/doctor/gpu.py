"""GPUs: driver, torch's CUDA, one for each process, NCCL."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from hpc_oialr.commands import Answer
from hpc_oialr.distributed.environment import gpus_per_node
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem

NVIDIA, AMD = Path("/proc/driver/nvidia/version"), Path("/dev/kfd")
_BUILDS = "https://pytorch.org/get-started/locally"
_ASK = "srun --gpus-per-node=N   (on a partition with GPUs, see: sinfo -o '%P %G')"
_FULL = 0.1


def check_gpus(context: CheckContext) -> list[Finding]:
    """CUDA, this process's GPU and NCCL; nothing is loaded if there is no driver or torch is built for CPUs."""
    if not (NVIDIA.exists() or AMD.exists()):
        if not context.gpus_asked:
            return [ok("GPU", "none here: runs compute on CPUs")]
        found = f"the job has GPUs by its variables, but {context.node} has no GPU driver"
        return [problem("GPU", found, _ASK)]
    problem_if_asked = problem if context.gpus_asked else note
    build = metadata.version("torch")
    if build.endswith("+cpu"):
        found = f"there is a GPU, but torch {build} is built for CPUs"
        return [problem_if_asked("GPU", found, f"see {_BUILDS} for a build with CUDA")]
    local_rank = 0 if context.place is None else context.place.local_rank
    report, answer = context.probe("cuda", str(local_rank), slow=True)
    names, torch = report.get("names"), f"torch {report.get('torch')}"
    if names is None:
        fix = f"nvidia-smi   (if that hangs too, leave the node out: --exclude={context.node})"
        return [problem("GPU", f"CUDA does not start: {answer.reason}", fix)]
    if not names:
        driver, built = report.get("driver_cuda"), report.get("torch_cuda")
        if driver and built and driver // 1000 < int(built.partition(".")[0]):
            newest = f"{driver // 1000}.{driver % 1000 // 10}"
            found = f"{torch} is built for CUDA {built}, the driver supports {newest} at most"
            fix = f"see {_BUILDS} for a build with CUDA {driver // 1000}, or renew the driver"
            return [problem("GPU", found, fix)]
        found = f"{torch} sees no GPU: {report['error'] or 'none is visible'}"
        return [problem_if_asked("GPU", found, _ASK)]
    findings = [ok("GPU", f"{len(names)} x {names[0]}, {torch}"), _own(context, report, answer)]
    if "index" not in report:
        return findings
    # An all-reduce over this process alone.
    if "nccl" in report and report["nccl"] is None:
        fix = f"see {_BUILDS} for a build with NCCL"
        return [*findings, problem("NCCL", f"{torch} is built without it", fix)]
    if not report.get("reduced"):
        fix = "NCCL_DEBUG=INFO oialr doctor"
        return [*findings, problem("NCCL", f"an all-reduce fails: {answer.reason}", fix)]
    return [*findings, ok("NCCL", f"{report['nccl']}, an all-reduce is right")]


def _own(context: CheckContext, report: dict[str, Any], answer: Answer) -> Finding:
    """This process's GPU: there must be one, it must compute, and should be free."""
    visible, local_size = len(report["names"]), context.local_size
    given = gpus_per_node(context.environ)
    # One visible GPU may be this process's own; whether processes share it, the start of a run finds out.
    if (given is not None and given < local_size) or 1 < visible < local_size:
        found = f"{local_size} ranks share {visible if given is None else given} GPUs of {context.node}"
        return problem("own GPU", found, f"srun --gpus-per-node={local_size} --ntasks-per-node={local_size}")
    index = report.get("index")
    if not report.get("right"):
        found = f"GPU {index} computes wrong or not at all: {answer.reason}"
        return problem("own GPU", found, f"sbatch --exclude={context.node}")
    used, total = (report["total"] - report["free"]) / 2**30, report["total"] / 2**30
    if used > _FULL * total:
        found = f"{used:.0f} of {total:.0f} GiB of GPU {index} are taken by other programs"
        return note("own GPU", found, "nvidia-smi   (shows whose they are)")
    return ok("own GPU", f"GPU {index} of {visible} computes")
