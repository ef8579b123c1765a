"""One wrapper for the whole run: the user's object goes on working through conversions and cuts, with its options."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.spawn import spawn
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import _hook_then_optimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, merge
from hpc_oialr.distributed import World
from hpc_oialr.engines import SingleEngine
from hpc_oialr.engines.ddp_wrapper import _NOT_KEPT, options_of
from hpc_oialr.errors import ModelError

STEPS = 9


class Net(nn.Module):
    """Two layers that are converted, a last one that is not, and one that no loss ever sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 20), nn.Tanh())
        self.unused = nn.Linear(20, 20)
        self.head = nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def config() -> OIALRConfig:
    return OIALRConfig(delay=3, frequency=2, rule=FixedFraction(0.4), layer_share_step=1.0)


def train(call: nn.Module, oialr: OIALR, part: slice, steps: int = STEPS) -> None:
    """The loop of a user who knows nothing of ``oialr.model``."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(16, 16, generator=generator), torch.randint(0, 6, (16,), generator=generator)
        F.cross_entropy(call(x[part]), y[part]).backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        oialr.step()


def made(net: nn.Module, model: nn.Module, **options: Any) -> OIALR:
    return OIALR(model, torch.optim.SGD(net.parameters(), 0.3, momentum=0.9), config(), **options)


def expected() -> list[torch.Tensor]:
    """All samples on one process."""
    net = Net()
    train(net, made(net, net, engine=SingleEngine()), slice(None))
    return dense(net)


def dense(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in merge(net).parameters()]


def same_everywhere(net: nn.Module) -> bool:
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return all(torch.equal(flat, other) for other in every)


class Averaging:
    """A hook's state that holds tensors by bucket, and says how to forget them."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}
        self.forgotten = 0

    def forget_buckets(self) -> None:
        self.seen.clear()
        self.forgotten += 1


# Without annotations: DDP compares them with its own types, and here they would be strings.
def remembering_hook(state, bucket):
    seen = state.seen if isinstance(state, Averaging) else state["seen"]
    last = seen.setdefault(bucket.index(), torch.zeros_like(bucket.buffer()))
    last.copy_(bucket.buffer())
    return default_hooks.allreduce_hook(None, bucket)


def plain(model: DistributedDataParallel) -> None:
    return


def with_power_sgd(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def with_halves(model: DistributedDataParallel) -> None:
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)


def with_memory(model: DistributedDataParallel) -> None:
    model.register_comm_hook(Averaging(), remembering_hook)


# Options, what is registered on the wrapper, and how far the result may be from one process's.
VARIANTS: list[tuple[dict[str, Any], Callable[[DistributedDataParallel], None], float]] = [
    ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, plain, 1e-5),
    ({"static_graph": True, "gradient_as_bucket_view": True}, plain, 1e-5),
    ({"static_graph": True, "find_unused_parameters": True, "bucket_cap_mb": 1e-3}, plain, 1e-5),
    ({"find_unused_parameters": True, "bucket_cap_mb_list": [1e-3, 2e-3]}, plain, 1e-5),
    ({"find_unused_parameters": True, "batched_grad_copy": True}, with_memory, 1e-5),
    ({"static_graph": True}, with_halves, 0.02),
    ({"static_graph": True}, with_power_sgd, 1.0),
]


def keeps_working(rank: int, size: int) -> list[tuple[bool, float, dict[str, Any], dict[str, Any]]]:
    World.from_environment(timeout_s=60)
    want, part, results = expected(), slice(8 * rank, 8 * rank + 8), []
    known = options_of(DistributedDataParallel(Net()))
    for options, register, _ in VARIANTS:
        options = {name: value for name, value in options.items() if name in known}
        net = Net()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed find_unused_parameters=true")
            model = DistributedDataParallel(net, **options)
        register(model)
        before, calls = options_of(model), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.note = "mine"
        oialr = made(net, model)
        assert oialr.model is model
        train(model, oialr, part)
        assert oialr.model is model
        assert model.module is net
        assert model.note == "mine"
        assert len(calls) == STEPS
        assert oialr.r == {"body.0": 7, "body.2": 8, "unused": 8}
        far = max(float((p - q).abs().max()) for p, q in zip(dense(net), want, strict=True))
        after = options_of(model)
        assert before.pop("process_group") is after.pop("process_group")
        results.append((same_everywhere(net), far, before, after))
        if register is with_memory:
            ((_, state),) = model._comm_hooks
            assert state.forgotten == 3, "the conversion and two cuts"
            assert sum(t.numel() for t in state.seen.values()) == sum(
                p.numel() for p in net.parameters() if p.requires_grad
            )
        if register is with_power_sgd:
            ((_, state),) = model._comm_hooks
            assert state.iter >= state.start_powerSGD_iter, "it compresses again"
            assert state.error_dict
        if register is with_halves:
            assert model._get_ddp_logging_data()["comm_hook"].endswith("FP16_COMPRESS")
    return results


def test_the_users_wrapper_goes_on_with_every_option() -> None:
    for results in spawn(keeps_working, 2):
        for (options, register, tolerance), (same, far, before, after) in zip(VARIANTS, results, strict=True):
            assert same, (options, register)
            assert far < tolerance, (options, register)
            automatic = before.pop("bucket_cap_mb") is None
            assert after.pop("bucket_cap_mb") == (1.0 if automatic else pytest.approx(1e-3, rel=0.01)) or (
                options.get("bucket_cap_mb_list")
            )
            assert before.keys() == after.keys()
            assert before == after


def test_every_argument_of_torchs_wrapper_is_known() -> None:
    """A new one of another version must be read back or refused on purpose."""
    arguments = set(inspect.signature(DistributedDataParallel).parameters) - _NOT_KEPT
    assert arguments <= {
        "device_ids",
        "output_device",
        "dim",
        "process_group",
        "bucket_cap_mb",
        "find_unused_parameters",
        "gradient_as_bucket_view",
        "static_graph",
        "mixed_precision",
        "skip_all_reduce_unused_params",
        "bucket_cap_mb_list",
        "batched_grad_copy",
        "forward_sync_buffers",
    }


def other_ways(rank: int, size: int) -> None:
    World.from_environment(timeout_s=60)
    part = slice(8 * rank, 8 * rank + 8)
    compiled_outside(part)
    python_reducer(part)
    mixed_precision()
    inside_no_sync(part)
    refused()


def compiled_outside(part: slice) -> None:
    net = Net()
    del net.unused
    model = torch.compile(DistributedDataParallel(net), backend="eager")
    oialr = made(net, model)
    assert oialr.model is model
    train(model, oialr, part)
    assert oialr.r == {"body.0": 7, "body.2": 8}
    assert same_everywhere(net)
    with oialr.no_sync():
        model(torch.ones(1, 16) * (dist.get_rank() + 1)).sum().backward()
    assert not same_gradient(net)


def same_gradient(net: Net) -> bool:
    assert net.head.weight.grad is not None
    every = [torch.empty_like(net.head.weight.grad) for _ in range(2)]
    dist.all_gather(every, net.head.weight.grad)
    return torch.equal(*every)


def python_reducer(part: slice) -> None:
    net = Net()
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DistributedDataParallel(net)
    oialr = made(net, model)
    train(model, oialr, part)
    torch._dynamo.config.optimize_ddp = True
    assert same_everywhere(net)
    kept = net.head.weight._post_accumulate_grad_hooks
    assert len(kept) == 1, "an old hook would average twice"


def mixed_precision() -> None:
    """Torch runs it on accelerators only; what is set up for it can be seen anywhere."""
    try:
        torch.Stream()
    except RuntimeError:
        return  # of a CUDA build without a GPU; the wrapper could not even be made
    net = Net()
    precision = _MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = DistributedDataParallel(net, mixed_precision=precision)
    oialr = made(net, model)
    hooks = {name: len(m._forward_pre_hooks) for name, m in net.named_modules()}
    left = net.body[0].weight
    full = left.detach().clone()
    left.data = left._mp_param = torch.zeros_like(left, dtype=torch.bfloat16)
    for _ in range(3):
        oialr.step()
    assert model.mixed_precision is precision
    assert {name: len(m._forward_pre_hooks) for name, m in net.named_modules()} == hooks
    for p in net.parameters():
        assert p._mp_param.shape == p.shape
        assert p._fp_param.data_ptr() == p.data_ptr()
        assert p.dtype == torch.float32
    torch.testing.assert_close(net.body[0].weight.detach(), full)


def inside_no_sync(part: slice) -> None:
    net = Net()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    oialr = made(net, model)
    with model.no_sync():
        for _ in range(3):
            oialr.step()
        assert not model.require_backward_grad_sync
        model(torch.ones(1, 16) * (dist.get_rank() + 1)).sum().backward()
        assert not same_gradient(net)
    model(torch.ones(1, 16) * (dist.get_rank() + 1)).sum().backward()
    assert same_gradient(net)


def refused() -> None:
    net = Net()
    named = [("unused.weight", net.unused.weight)]
    delayed = DistributedDataParallel(
        net, delay_all_reduce_named_params=named, param_to_hook_all_reduce=net.head.weight
    )
    with pytest.raises(ModelError, match="delay_all_reduce_named_params hooks that single parameter"):
        made(net, delayed)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    net = Net()
    with pytest.raises(ModelError, match="device_mesh is one axis of a larger mesh"):
        made(net, DistributedDataParallel(net, device_mesh=mesh["data"]))
    stepping = DistributedDataParallel(copy.deepcopy(net))
    stepping._comm_hooks.append((_hook_then_optimizer(default_hooks.allreduce_hook, None), None))
    with pytest.raises(ModelError, match="hook_then_optimizer_wrapper steps the optimizer in the backward pass"):
        made(net, stepping)
    unknown = DistributedDataParallel(net)
    unknown.register_comm_hook({"seen": {0: torch.zeros(3)}}, remembering_hook)
    oialr = made(net, unknown)
    oialr.step(), oialr.step()
    with pytest.raises(ModelError, match="remembering_hook keeps tensors in its dict.*forget_buckets"):
        oialr.step()


def test_compiled_around_python_reducer_mixed_precision_no_sync_and_refusals() -> None:
    spawn(other_ways, 2)
