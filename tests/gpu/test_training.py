"""A training step without waiting for the host, precision of the method, loss scaling, compiled forward, memory."""

from __future__ import annotations

import pytest
import torch
from support.gpu_loop import OPTIMIZERS, batch, make, no_synchronisation, one_step, train
from torch import nn

from hpc_oialr import OIALR, MuonAdamW, low_rank_layers
from hpc_oialr.linalg.basis_change import orthogonality_error
from hpc_oialr.record.memory import MemoryMeter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("state", ["dense", "converted"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_never_waits_for_the_host(optimizer: str, state: str, precision: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else None
    oialr = make(device, optimizer, delay=100 if state == "dense" else 2, frequency=4)
    # The second update is at step 10: the steps in between change nothing.
    train(oialr, 6, dtype=dtype, clip=1.0)
    assert bool(oialr.r) is (state == "converted")
    x, y = batch(device)
    with no_synchronisation(device):
        losses = [one_step(oialr, x, y, dtype=dtype, clip=1.0) for _ in range(3)]
    assert all(report is None for _, report in losses)
    assert torch.isfinite(torch.stack([loss for loss, _ in losses])).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_those_of_the_cpu(optimizer: str, device: torch.device) -> None:
    """Through conversion and cuts, in fp32; what rounding makes of it grows with every step."""
    here, there = make(device, optimizer), make(torch.device("cpu"), optimizer)
    for group in [*here.optimizer.param_groups, *there.optimizer.param_groups]:
        # Muon's default depends on the device.
        group["newton_schulz_dtype"] = torch.float32
    losses, expected = train(here, 8), train(there, 8)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert expected[-1] < 0.9 * expected[0]
    assert here.r == there.r == {"layers.0": 16, "layers.1": 32, "layers.2": 16}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_bases_are_orthonormal_whatever_precision_the_user_has_set(
    autocast: torch.dtype | None, device: torch.device
) -> None:
    """TF32 has 11 bits: a method that multiplied in it would miss 1e-5 by a factor of 50."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    oialr = make(device, "MuonAdamW")
    x, y = batch(device)
    for _ in range(6):
        loss = nn.functional.cross_entropy(oialr.model(x), y)
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            oialr.step()
            products = {name: layer.merged_weight() for name, layer in low_rank_layers(oialr.module).items()}
        for name, layer in low_rank_layers(oialr.module).items():
            assert orthogonality_error(layer.U.cpu()) < 1e-5
            assert orthogonality_error(layer.Vh.mT.cpu()) < 1e-5
            assert products[name].dtype == torch.float32
            exact = layer.U.cpu().double() @ layer.S.cpu().double() @ layer.Vh.cpu().double()
            assert (products[name].cpu() - exact).abs().max() < 1e-5
    assert oialr.r == {"layers.0": 16, "layers.1": 32, "layers.2": 16}
    assert torch.backends.cuda.matmul.allow_tf32, "the user's setting is left alone"


def test_factors_own_their_memory(device: torch.device) -> None:
    """A view of an SVD's result would keep all of it alive."""
    oialr = make(device)
    for _ in range(3):
        train(oialr, 2)
        for layer in low_rank_layers(oialr.module).values():
            for p in layer.factors:
                assert p.is_contiguous()
                assert p.untyped_storage().nbytes() == p.nbytes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_conversion_needs_no_more_memory_than_a_dense_step(optimizer: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)), nn.Linear(512, 4)).to(device)
    # By inputs it takes a few n^2 numbers more, which a step with so few tokens does not.
    config = make(device, delay=4, frequency=2, importance="weights").config
    oialr = OIALR(model, OPTIMIZERS[optimizer](model), config)
    x, y = torch.randn(64, 512, device=device), torch.zeros(64, dtype=torch.int64, device=device)
    one_step(oialr, x, y)
    peaks, reports = [], []
    for _ in range(3):
        # A new meter sets a GPU's counter back.
        meter = MemoryMeter(lambda: (oialr.module, oialr.optimizer), device)
        with meter.probe():
            reports.append(one_step(oialr, x, y)[1])
        peaks.append(meter.peak_bytes)
    assert [report and report.kind for report in reports] == [None, None, "conversion"]
    assert 0 < peaks[2] <= 1.01 * peaks[1]


def test_a_step_of_muon_in_a_graph_is_the_eager_one(device: torch.device) -> None:
    """Over unequal cores, padded on a GPU, with a rate that changes between replays."""
    torch.manual_seed(0)
    start = [torch.randn(r, r, device=device) for r in (5, 60, 64, 100)]
    runs = []
    for graphed in (False, True):
        cores = [nn.Parameter(value.clone()) for value in start]
        rate = torch.tensor(0.1, device=device)
        optimizer = MuonAdamW([{"params": cores, "cores": True}])
        optimizer.param_groups[0]["lr"] = rate
        for p in cores:
            p.grad = p.detach().clone()
        optimizer.step()
        step = optimizer.step
        if graphed and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for t in range(3):
            rate.fill_(0.1 / (t + 1))
            step()
        runs.append([p.detach().clone() for p in cores])
    torch.testing.assert_close(runs[1], runs[0])
    assert all((a - b).norm() > 0.1 for a, b in zip(runs[1], start, strict=True))
