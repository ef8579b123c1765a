"""NestedLoRA's gradients by the losses written out, over several ranks, and what it finds of a matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from support.threads import run_threads

from hpc_oialr.errors import ConfigError, NonFiniteError, UnknownNameError
from hpc_oialr.linalg.communicator import Communicator
from hpc_oialr.operators.kernels import MatrixProblem, Points, kernel_sides
from hpc_oialr.operators.nested_lora import Side, nested_lora, sum_gradients
from hpc_oialr.operators.schroedinger import harmonic_oscillator, hydrogen
from hpc_oialr.operators.training import Settings, evaluate, generator_of, train

NESTINGS = ("joint", "sequential", "none")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(T, f, g, w, v, nesting):
    """The losses of the first 1, 2, ... L functions, by the operator's whole matrix."""
    L = f.shape[1]

    def lora(f, g):
        overlap = (f.mT @ (w[:, None] * T * v) @ g).diagonal().sum()
        return -2 * overlap + ((f.mT @ (w[:, None] * f)) * (g.mT @ (v[:, None] * g))).sum()

    if nesting == "none":
        return lora(f, g)
    if nesting == "joint":
        return sum(lora(f[:, :n], g[:, :n]) for n in range(1, L + 1)) / L
    led = [[torch.cat([h[:, : n - 1].detach(), h[:, n - 1 : n]], 1) for h in (f, g)] for n in range(1, L + 1)]
    return sum(lora(*pair) for pair in led)


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_the_losses_written_out(nesting: str, symmetric: bool) -> None:
    T, f, w = random(7, 7), random(7, 4, seed=1).requires_grad_(), random(7, seed=3).square()
    if symmetric:
        T, g, v = T + T.mT, f, w
        sides = [Side(f, T @ (w[:, None] * f.detach()), w)]
    else:
        T, g, v = random(7, 5), random(5, 4, seed=2).requires_grad_(), random(5, seed=4).square()
        sides = [Side(f, T @ (v[:, None] * g.detach()), w), Side(g, T.mT @ (w[:, None] * f.detach()), v)]
    inputs = [f] if symmetric else [f, g]
    loss = nested_lora(sides, nesting=nesting)
    balanced = torch.autograd.grad(nested_lora(sides, nesting=nesting, balance=True), inputs)
    norms = ((w[:, None] * f**2).sum(0) * (v[:, None] * g**2).sum(0)).sqrt()
    expected = written_out(T, f, g, w, v, nesting)
    theirs = torch.autograd.grad(expected, inputs)
    for ours, right, scaled in zip(torch.autograd.grad(loss, inputs), theirs, balanced, strict=True):
        torch.testing.assert_close(ours, right)
        torch.testing.assert_close(scaled, right / (norms + 0.01 * norms.max()))
    # Of sequential nesting the value is the loss of all functions.
    value = written_out(T, f, g, w, v, "none" if nesting == "sequential" else nesting)
    torch.testing.assert_close(loss.detach(), value.detach())
    if nesting == "none":
        residual = T - f @ g.mT
        torch.testing.assert_close(value + (w[:, None] * T**2 * v).sum(), (w[:, None] * residual**2 * v).sum())


class Kernel:
    """A Gaussian kernel on random points, with one network for eigenfunctions."""

    def functions(self, L):
        return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, L))

    def sides(self, model, batch, generator, comm):
        points = Points(torch.randn(batch, 2, generator=generator), torch.full((batch,), 1 / batch))
        return kernel_sides(lambda x, y: (-(torch.cdist(x, y) ** 2)).exp(), model, points, comm=comm)


@pytest.mark.parametrize(
    "problem",
    [Kernel(), MatrixProblem(random(30, 20).float()), harmonic_oscillator(), hydrogen()],
    ids=["kernel", "matrix", "oscillator", "hydrogen"],
)
def test_ranks_compute_the_gradient_of_one_process(problem) -> None:
    torch.manual_seed(0)
    model = problem.functions(4)

    def gradient(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        mine = copy.deepcopy(model)
        loss = nested_lora(problem.sides(mine, 17, generator_of(0, 0), comm), group=comm)
        loss.backward()
        sum_gradients(list(mine.parameters()), comm)
        return loss.detach(), torch.cat([p.grad.flatten() for p in mine.parameters()])

    value, alone = gradient(Communicator())
    for loss, together in run_threads(3, gradient):
        torch.testing.assert_close(loss, value, rtol=1e-5, atol=0)
        assert (together - alone).norm() < 1e-5 * alone.norm()


def decaying(m: int, n: int) -> torch.Tensor:
    U, V = (torch.linalg.qr(random(size, n, seed=size))[0] for size in (m, n))
    return (U * 0.8 ** torch.arange(n)) @ V.mT


@pytest.mark.parametrize("nesting", NESTINGS)
def test_nesting_orders_singular_functions(nesting: str) -> None:
    problem = MatrixProblem(decaying(40, 30))
    settings = Settings(functions=5, batch=40, steps=400, lr=0.05, nesting=nesting)
    model = train(problem, settings).model
    found, exact = torch.tensor(problem.spectrum(evaluate(problem, model, settings))), problem.exact(5)
    F, G = model.parameters()
    A, r = problem.A, 5
    best = torch.linalg.svdvals(A)[r:].norm()
    assert (A - F @ G.mT).norm() < 1.01 * best
    aligned = min(problem.alignments(model))
    if nesting == "none":
        assert aligned < 0.9
    else:
        assert aligned > 0.999
        torch.testing.assert_close(found, torch.tensor(exact), rtol=1e-3, atol=0)


def test_training_goes_on_from_a_state_with_the_same_bits() -> None:
    problem = harmonic_oscillator()
    settings = Settings(functions=2, batch=32, steps=6)
    whole = train(problem, settings)
    half = train(problem, settings, until=3)
    again = train(problem, settings, state=half.state)
    other = train(problem, Settings(functions=2, batch=32, steps=6, seed=1))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert not torch.equal(whole.model.layers[0].weight, other.model.layers[0].weight)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown nesting 'jont'; valid: joint, none, sequential"):
        Settings(nesting="jont")
    with pytest.raises(ConfigError, match="steps is 0; must be at least 1"):
        Settings(steps=0)
    with pytest.raises(ConfigError, match="must have two axes"):
        MatrixProblem(torch.ones(3))
    with pytest.raises(NonFiniteError, match="1 NaN or Inf among 4"):
        MatrixProblem(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]))
    with pytest.raises(NonFiniteError, match=r"the loss is .* in step \d+. Lower lr, 1e\+30 now"):
        train(MatrixProblem(torch.eye(4)), Settings(functions=2, lr=1e30))
