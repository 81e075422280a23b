"""The gradients that `peers.py` measures, by torchdiffeq and torchsde. To be imported
only where these are installed."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from _peers_problems import MAX_STEPS, Method, Prepared, Problem, Work


# Not by `import`: the `peers` extra, unlike `benchmarks`, need not be there.
torch: Any = importlib.import_module("torch")
torchdiffeq: Any = importlib.import_module("torchdiffeq")
torchsde: Any = importlib.import_module("torchsde")


class _Equation(torch.nn.Module):
    """What both libraries want: a module with the parameters."""

    sde_type = "stratonovich"
    noise_type = "diagonal"

    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        tensors = [torch.nn.Parameter(torch.tensor(p)) for p in problem.params]
        self.params = torch.nn.ParameterList(tensors)

    def f(self, t, y):
        return self.problem.field(torch, t, y, list(self.params))

    def g(self, t, y):
        assert self.problem.diffusion is not None
        return self.problem.diffusion(torch, t, y, list(self.params))

    forward = f


class _InSinglePrecision(torchsde.BaseBrownian):
    """The path that float32 would have, for a solve in float64."""

    def __init__(self, path: Any):
        super().__init__()
        self.path = path

    def __call__(self, ta, tb=None, return_U=False, return_A=False):
        return self.path(ta, tb, return_U, return_A).double()

    def __repr__(self):
        return f"{type(self).__name__}({self.path!r})"

    dtype = torch.float64
    device = property(lambda self: self.path.device)
    shape = property(lambda self: self.path.shape)
    levy_area_approximation = property(lambda self: self.path.levy_area_approximation)


def _solve_ode(problem: Problem, method: Method, work: Work) -> Callable[..., Any]:
    def grid(func, y0, t):
        del func, y0
        assert work.steps is not None
        return torch.linspace(float(t[0]), float(t[-1]), work.steps + 1, dtype=t.dtype)

    def solve(equation, y0):
        solver = getattr(torchdiffeq, method.gradient)
        ts = torch.tensor([0.0, problem.t1], dtype=y0.dtype)
        if work.steps is not None:
            options = dict(grid_constructor=grid)
            return solver(equation, y0, ts, method=method.solver, options=options)[-1]
        options = dict(max_num_steps=MAX_STEPS)
        tol = dict(rtol=work.tol, atol=work.tol)
        return solver(equation, y0, ts, **tol, method=method.solver, options=options)[
            -1
        ]

    return solve


def _solve_sde(problem: Problem, method: Method, work: Work) -> Callable[..., Any]:
    def solve(equation, y0):
        assert work.steps is not None
        path = torchsde.BrownianInterval(
            0.0, problem.t1, size=tuple(y0.shape), dtype=torch.float32, entropy=0
        )
        solver = getattr(torchsde, method.gradient)
        options: dict[str, Any] = dict(method=method.solver, dt=problem.t1 / work.steps)
        if (method.gradient, method.solver) == ("sdeint_adjoint", "reversible_heun"):
            options.update(adjoint_method="adjoint_reversible_heun")
        options.update(
            bm=_InSinglePrecision(path) if problem.dtype == "float64" else path
        )
        ts = torch.tensor([0.0, problem.t1], dtype=y0.dtype)
        return solver(equation, y0, ts, **options)[-1]

    return solve


def prepare(problem: Problem, method: Method, work: Work) -> Prepared:
    make = _solve_ode if problem.diffusion is None else _solve_sde
    solve = make(problem, method, work)
    equation = _Equation(problem)

    def run():
        y0 = torch.tensor(problem.y0, requires_grad=True)
        loss = torch.sum(solve(equation, y0) ** 2)
        return torch.autograd.grad(loss, [*equation.params, y0])

    def flatten(gradients):
        return np.concatenate([gradient.numpy().ravel() for gradient in gradients])

    return Prepared(run, flatten, {})
