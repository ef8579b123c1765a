"""GPUs: driver, torch's CUDA, one for each process, NCCL."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from hpc_oialr.commands import Answer
from hpc_oialr.distributed.environment import gpus_per_node
from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.doctor.finding import Finding, note, ok, problem
from hpc_oialr.doctor.programs import probe

NVIDIA, AMD = Path("/proc/driver/nvidia/version"), Path("/dev/kfd")
_BUILDS = "https://pytorch.org/get-started/locally"
_ASK = "srun --gpus-per-node=N   (on a partition with GPUs, see: sinfo -o '%P %G')"
_FULL = 0.1


def check_gpus(context: CheckContext) -> list[Finding]:
    """Nothing is loaded where there is no driver or torch is built for CPUs."""
    driver, asked = NVIDIA.exists() or AMD.exists(), context.gpus_asked
    if not driver:
        found = f"the job has GPUs by its variables, but {context.node} has no GPU driver"
        return [problem("GPU", found, _ASK) if asked else ok("GPU", "none here: runs compute on CPUs")]
    build = metadata.version("torch")
    if build.endswith("+cpu"):
        found, fix = (
            f"there is a GPU, but torch {build} is built for CPUs",
            f"see {_BUILDS} for a build with CUDA",
        )
        return [problem("GPU", found, fix) if asked else note("GPU", found, fix)]
    local_rank = 0 if context.place is None else context.place.local_rank
    report, answer = probe(context, "try_cuda", str(local_rank), slow=True)
    return judge(context, report, answer)


def judge(context: CheckContext, report: dict[str, Any], answer: Answer) -> list[Finding]:
    """What the trial on the GPU says."""
    names = report.get("names")
    if names is None:
        fix = f"nvidia-smi   (if that hangs too, leave the node out: --exclude={context.node})"
        return [problem("GPU", f"CUDA does not start: {answer.reason}", fix)]
    if not names:
        return [_no_gpu(context, report)]
    findings = [
        ok("GPU", f"{len(names)} x {names[0]}, torch {report['torch']}"),
        *_own(context, report, answer),
    ]
    return findings + (_nccl(context, report, answer) if "index" in report else [])


def _no_gpu(context: CheckContext, report: dict[str, Any]) -> Finding:
    driver, built = report.get("driver_cuda"), report.get("torch_cuda")
    if driver and built and driver // 1000 < int(built.partition(".")[0]):
        speaks = f"{driver // 1000}.{driver % 1000 // 10}"
        found = f"torch {report['torch']} is built for CUDA {built}, the driver speaks {speaks} at most"
        return problem(
            "GPU", found, f"see {_BUILDS} for a build with CUDA {driver // 1000}, or renew the driver"
        )
    found = f"torch {report['torch']} sees no GPU: {report['error'] or 'none is visible'}"
    return problem("GPU", found, _ASK) if context.gpus_asked else note("GPU", found, _ASK)


def _own(context: CheckContext, report: dict[str, Any], answer: Answer) -> list[Finding]:
    """This process's GPU: there must be one, it must compute, and be free."""
    visible, local_size = len(report["names"]), context.local_size
    given = gpus_per_node(context.environ)
    # One visible GPU may be this process's own; whether processes share it, the start of a run finds out.
    if (given is not None and given < local_size) or 1 < visible < local_size:
        found = f"{local_size} processes share {visible if given is None else given} GPUs of {context.node}"
        return [
            problem("own GPU", found, f"srun --gpus-per-node={local_size} --ntasks-per-node={local_size}")
        ]
    if not report.get("right"):
        found = f"GPU {report.get('index')} computes wrong or not at all: {answer.reason}"
        return [problem("own GPU", found, f"sbatch --exclude={context.node}")]
    if report["total"] - report["free"] > _FULL * report["total"]:
        used, total = (report["total"] - report["free"]) / 2**30, report["total"] / 2**30
        found = f"{used:.0f} of {total:.0f} GiB of GPU {report['index']} are taken by other programs"
        return [note("own GPU", found, "nvidia-smi   (shows whose they are)")]
    return [ok("own GPU", f"GPU {report['index']} of {visible} computes")]


def _nccl(context: CheckContext, report: dict[str, Any], answer: Answer) -> list[Finding]:
    """An all-reduce over this process alone, and whether GPUs of the node reach each other."""
    if "nccl" in report and report["nccl"] is None:
        fix = f"see {_BUILDS} for a build with NCCL"
        return [problem("NCCL", f"torch {report['torch']} is built without it", fix)]
    if not report.get("reduced"):
        return [problem("NCCL", f"an all-reduce fails: {answer.reason}", "NCCL_DEBUG=INFO oialr doctor")]
    findings = [ok("NCCL", f"{report['nccl']}, an all-reduce is right")]
    if report["peers"] < report["others"]:
        found = f"GPU {report['index']} reaches {report['peers']} of {report['others']} others directly"
        findings.append(note("peer access", found, "nvidia-smi topo -m   (shows how they are connected)"))
    return findings
