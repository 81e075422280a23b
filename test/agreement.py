"""The gradients of `ReversibleAdjoint` against those of `RecursiveCheckpointAdjoint`.

    python -m test.agreement [--solver NAME] [--case NAME]

prints the relative error of the gradient, for every solver and case (about an hour and
a half on 2 cores for all of them; less if a part of a name is given).
`test_agreement.py` checks the same cases. Everything is in float64 unless a case says
otherwise.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .compiling import compile_quickly


# Before any array is made.
jax.config.update("jax_enable_x64", True)
compile_quickly()

t0, t1, dt0 = 0.5, 2.45, 0.2
# At both ends, twice at the same time, several in one step, none in many, and on the
# end of a step.
ts = jnp.array([t0, t0, 0.7, 0.71, 0.75, 0.75, 2.0, 2.449, t1])


SOLVERS: dict[str, diffrax.AbstractSolver] = {
    **{
        type(solver).__name__: solver
        for solver in (
            diffrax.SemiImplicitEuler(),
            diffrax.PositionVerlet(),
            diffrax.VelocityVerlet(),
            diffrax.Ruth3(),
            diffrax.ForestRuth(),
        )
    },
    "HalfSolver(VelocityVerlet)": diffrax.HalfSolver(diffrax.VelocityVerlet()),
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint(),
    "AsynchronousLeapfrog": diffrax.AsynchronousLeapfrog(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "ImplicitMidpoint": diffrax.ImplicitMidpoint(),
    "GaussLegendre4": diffrax.GaussLegendre4(),
    **{
        f"BitExact({type(solver).__name__})": diffrax.BitExact(solver, size=1.0)
        for solver in (
            diffrax.SemiImplicitEuler(),
            diffrax.VelocityVerlet(),
            diffrax.LeapfrogMidpoint(),
            diffrax.AsynchronousLeapfrog(),
            diffrax.ReversibleHeun(),
            diffrax.Bosh3(),
        )
    },
    "BitExact(UReversible(Heun))": diffrax.BitExact(
        diffrax.UReversible(diffrax.Heun(), 0.9), size=1.0
    ),
    "HalfSolver(ReversibleHeun)": diffrax.HalfSolver(diffrax.ReversibleHeun()),
    **{
        f"UReversible({type(solver).__name__})": diffrax.UReversible(solver)
        for solver in (
            diffrax.Euler(),
            diffrax.Heun(),
            diffrax.Midpoint(),
            diffrax.Ralston(),
            diffrax.Bosh3(),
            diffrax.Tsit5(),
            diffrax.Dopri5(),
            diffrax.Dopri8(),
        )
    },
    **{
        type(solver).__name__: solver
        for solver in (
            diffrax.Heun(),
            diffrax.Bosh3(),
            diffrax.Tsit5(),
            diffrax.Dopri5(),
            diffrax.Dopri8(),
            diffrax.EES25(),
            diffrax.EES27(),
        )
    },
    "HalfSolver(Bosh3)": diffrax.HalfSolver(diffrax.Bosh3()),
}
# Going back has to find its way over several steps at a time.
reversible = diffrax.ReversibleAdjoint(checkpoints=1)


#
# The problem: not at rest, not linear, not autonomous, of three dimensions. It is
# written in terms of `args`, which has leaves of all kinds that are no arrays of
# floats.
#


def _drift(t, y, args):
    assert args["label"] == "drift"
    out = args["activation"](args["a"] @ y) + args["b"] * jnp.sin(3 * t).astype(y.dtype)
    return out * args["scale"].astype(y.dtype)


def _other_drift(t, y, args):
    # The other half of the pair that some solvers take.
    return args["a"].T @ jnp.cos(y) - args["b"] * jnp.cos(2 * t).astype(y.dtype)


def _args(params: PyTree) -> PyTree:
    return dict(
        a=params["a"],
        b=params["b"],
        scale=jnp.array(1),
        nothing=None,
        label="drift",
        activation=jnp.tanh,
    )


def make_params(dtype: Any = jnp.float64) -> PyTree[Array]:
    a, b, y0 = (jr.normal(jr.key(i), (3, 3), dtype) for i in range(3))
    return dict(a=a / 2, b=b[0], y0=y0[0])


def _takes_pair(solver: diffrax.AbstractSolver) -> bool:
    return isinstance(solver.term_structure, tuple)


@dataclasses.dataclass(frozen=True)
class Solve:
    """Calls `diffeqsolve` on the problem, for a solver, an adjoint, and parameters.
    Every argument can be overridden."""

    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    params: PyTree[Array]

    @property
    def is_pair(self) -> bool:
        return _takes_pair(self.solver)

    def y0(self, y0: PyTree[Array]) -> PyTree[Array]:
        if self.is_pair:
            return y0, jtu.tree_map(lambda x: 2 * x[::-1], y0)
        return y0

    @property
    def adaptive(self) -> diffrax.PIDController:
        # At the smaller tolerance this method takes 3000 steps, over which their sizes
        # amplify one rounding error of `y0` to 4e-6 of the solution.
        is_euler = isinstance(getattr(self.solver, "solver", None), diffrax.Euler)
        rtol = 1e-1 if is_euler else 1e-4
        return diffrax.PIDController(rtol=rtol, atol=rtol / 10)

    def terms(self, vector_field: Callable = _drift) -> PyTree[diffrax.AbstractTerm]:
        term = diffrax.ODETerm(vector_field)
        if self.is_pair:
            return term, diffrax.ODETerm(_other_drift)
        return term

    def __call__(self, **kwargs: Any) -> diffrax.Solution:
        arguments = dict(
            terms=self.terms(),
            solver=self.solver,
            t0=t0,
            t1=t1,
            dt0=dt0,
            y0=self.y0(self.params["y0"]),
            args=_args(self.params),
            adjoint=self.adjoint,
            max_steps=64,
        )
        return diffrax.diffeqsolve(**(arguments | kwargs))  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Case:
    """A way of using `diffeqsolve`; `run` returns what to take the gradient of."""

    name: str
    run: Callable[[Solve], PyTree[Array]]
    # A step size controller needs an error estimate.
    is_adaptive: bool = False
    # Other terms than a pair of them.
    single_term: bool = False
    # Controls other than time.
    has_control: bool = False
    # The method has to be of the Stratonovich kind, or the noise additive.
    is_sde: bool = False
    # Implicit methods differentiate the vector field in forward mode.
    is_explicit: bool = False
    # Of the value as well: two programs need not round alike.
    tolerance: float = 1e-10
    dtype: Any = jnp.float64
    # Upstream's is wrong when vmapping over `SaveAt(ts=...)` with `t1=True`.
    reference: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint()
    # Takes long to compile: with which solver to do so in the quick part of the tests.
    quick_solver: str | None = None
    # Whether it is in the quick part at all.
    is_quick: bool = True

    def suits(self, solver: diffrax.AbstractSolver) -> bool:
        unwrapped = getattr(solver, "solver", solver)
        if self.single_term and _takes_pair(solver):
            return False
        if self.is_explicit and isinstance(unwrapped, diffrax.AbstractImplicitSolver):
            return False
        if self.is_adaptive and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
            return False
        if self.has_control and type(solver) is diffrax.BitExact:
            if isinstance(unwrapped, diffrax.AsynchronousLeapfrog):
                return False
        if self.is_sde:
            # (Diffrax looks into one wrapper for that, and not into a second one.)
            return isinstance(solver, diffrax.AbstractStratonovichSolver)
        if isinstance(self.reference, diffrax.DirectAdjoint):
            # Upstream's does not take `HalfSolver` around a Runge--Kutta method.
            is_half = type(solver) is diffrax.HalfSolver
            return not (is_half and isinstance(unwrapped, diffrax.AbstractRungeKutta))
        return True


CASES: dict[str, Case] = {}


def _case(name: str, **kwargs: Any) -> Callable:
    def _register(run):
        assert name not in CASES
        CASES[name] = Case(name, run, **kwargs)
        return run

    return _register


#
# Saving
#

for _save_t0 in (False, True):
    for _save_t1 in (False, True):
        for _save_ts in (False, True):
            if not (_save_t0 or _save_t1 or _save_ts):
                continue
            _saveat = diffrax.SaveAt(
                t0=_save_t0, t1=_save_t1, ts=ts if _save_ts else None
            )
            _name = "+".join(
                n
                for n, s in (("t0", _save_t0), ("ts", _save_ts), ("t1", _save_t1))
                if s
            )
            # Each output by itself, and all of them, are the quick ones.
            _is_quick = _save_t0 + _save_t1 + _save_ts in (1, 3)
            _case(f"save {_name}", is_quick=_is_quick)(
                lambda solve, saveat=_saveat: solve(saveat=saveat).ys
            )
            # One of these is enough, with every solver: see `test_agreement.py`.
            _case(f"save {_name}, max_steps reached", is_quick=False)(
                lambda solve, saveat=_saveat: _finite(
                    solve(saveat=saveat, max_steps=4, throw=False)
                )
            )

everything = diffrax.SaveAt(t0=True, t1=True, ts=ts)


def _finite(sol: diffrax.Solution) -> PyTree[Array]:
    # The rows that nothing was saved to are filled with infinities.
    return jtu.tree_map(lambda y: jnp.where(jnp.isfinite(y), y, 0), sol.ys)


#
# Times and step sizes
#


@_case("backwards in time")
def _backwards(solve):
    saveat = diffrax.SaveAt(t0=True, t1=True, ts=ts[::-1])
    return solve(t0=t1, t1=t0, dt0=-dt0, saveat=saveat).ys


@_case("t0 == t1")
def _no_interval(solve):
    saveat = diffrax.SaveAt(t0=True, t1=True, ts=jnp.array([t0, t0]))
    return solve(t1=t0, saveat=saveat).ys


step_to = jnp.array([t0, 0.6, 0.9, 1.0, 1.5, 1.6, 1.9, 2.1, 2.3, t1])


@_case("StepTo")
def _step_to(solve):
    controller = diffrax.StepTo(ts=step_to)
    return solve(dt0=None, stepsize_controller=controller, saveat=everything).ys


@_case("StepTo, backwards in time", is_quick=False)
def _step_to_backwards(solve):
    controller = diffrax.StepTo(ts=step_to[::-1])
    kwargs: Any = dict(dt0=None, stepsize_controller=controller)
    return solve(t0=t1, t1=t0, saveat=diffrax.SaveAt(ts=ts[::-1]), **kwargs).ys


@_case("adaptive, rejected steps", is_adaptive=True)
def _adaptive(solve):
    sol = solve(
        dt0=t1 - t0,
        stepsize_controller=solve.adaptive,
        saveat=everything,
        max_steps=16384,
    )
    num_rejected = eqx.error_if(
        sol.stats["num_rejected_steps"],
        sol.stats["num_rejected_steps"] == 0,
        "This is a test of rejected steps.",
    )
    return sol.ys, 0.0 * num_rejected


@_case("adaptive, dt0=None, backwards in time", is_adaptive=True, is_quick=False)
def _adaptive_backwards(solve):
    kwargs: Any = dict(dt0=None, stepsize_controller=solve.adaptive, max_steps=16384)
    return solve(t0=t1, t1=t0, saveat=diffrax.SaveAt(ts=ts[::-1]), **kwargs).ys


#
# Jumps
#

jumps = jnp.array([0.75, 1.3, 2.0])


def _jump(solve, ts, jump_ts, **kwargs):
    def vector_field(t, y, args):
        # Right-continuous at each jump.
        num = jnp.sum(t >= jump_ts).astype(y.dtype)
        return _drift(t, y, args) * (1 + 0.5 * num)

    controller = diffrax.ClipStepSizeController(solve.adaptive, jump_ts=jump_ts)
    return solve(
        terms=solve.terms(vector_field),
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t0=True, t1=True, ts=ts),
        max_steps=16384,
        **kwargs,
    ).ys


_case("one jump", is_adaptive=True, is_quick=False)(lambda s: _jump(s, ts, jumps[1:2]))
# `ts` holds the first and the last of the jumps.
_case("several jumps", is_adaptive=True)(lambda s: _jump(s, ts, jumps))
_case("several jumps, backwards in time", is_adaptive=True, is_quick=False)(
    lambda s: _jump(s, ts[::-1], jumps, t0=t1, t1=t0, dt0=-dt0)
)


@_case("passed made_jump", is_adaptive=True)
def _made_jump(solve):
    return solve(stepsize_controller=solve.adaptive, made_jump=True, max_steps=16384).ys


@_case("passed made_jump, constant steps", is_quick=False)
def _made_jump_constant(solve):
    return solve(made_jump=True, saveat=everything).ys


@_case("passed made_jump, StepTo", is_quick=False)
def _made_jump_step_to(solve):
    controller = diffrax.StepTo(ts=step_to)
    return solve(dt0=None, stepsize_controller=controller, made_jump=True).ys


#
# States
#


@_case("passed solver_state")
def _solver_state(solve):
    first = solve(
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
        adjoint=diffrax.RecursiveCheckpointAdjoint(),
    )
    y0 = jtu.tree_map(lambda y: y[-1], first.ys)
    second = solve(t0=t1, t1=2 * t1, dt0=0.13, y0=y0, solver_state=first.solver_state)
    return first.ys, second.ys


@_case("pytree state", single_term=True)
def _pytree_state(solve):
    def vector_field(t, y, args):
        x, (z,) = y["x"], y["z"]
        f = _drift(t, x, args)
        return {"x": f + z, "z": (jnp.sin(f) * x,), "none": None, "scalar": f[0] * z[1]}

    y0 = solve.params["y0"]
    y0 = {"x": y0, "z": (y0[::-1],), "none": None, "scalar": y0[0]}
    return solve(terms=diffrax.ODETerm(vector_field), y0=y0, saveat=everything).ys


@_case("empty state", single_term=True)
def _empty_state(solve):
    y0 = solve.params["y0"]
    term = diffrax.ODETerm(lambda t, y, args: {"x": _drift(t, y["x"], args), "e": None})
    return solve(terms=term, y0={"x": y0, "e": None}).ys


# Tolerances in float32 are for a gradient that is a sum over 10 steps, and for Dopri8,
# whose coefficients are as large as 17 and cancel.
@_case("float32", dtype=jnp.float32, tolerance=1e-4)
def _float32(solve):
    ts_ = ts.astype(jnp.float32)
    saveat = diffrax.SaveAt(t0=True, t1=True, ts=ts_)
    times = [jnp.float32(t) for t in (t0, t1, dt0)]
    return solve(t0=times[0], t1=times[1], dt0=times[2], saveat=saveat).ys


# The times of the stages are rounded to float32.
@_case("float64 state, float32 time", tolerance=1e-6)
def _float32_time(solve):
    saveat = diffrax.SaveAt(t0=True, t1=True, ts=ts.astype(jnp.float32))
    times = [jnp.float32(t) for t in (t0, t1, dt0)]
    return solve(t0=times[0], t1=times[1], dt0=times[2], saveat=saveat).ys


# Diffrax promotes such a state to float64; the parameters stay as they are.
@_case(
    "float32 state, float64 time",
    dtype=jnp.float32,
    tolerance=1e-5,
    is_quick=False,
)
def _float64_time(solve):
    def promoted(vector_field):
        return lambda t, y, args: vector_field(
            t, y, jtu.tree_map(lambda x: x.astype(y.dtype), args)
        )

    field = lambda t, y, args: jnp.tanh(args["a"] @ y) + args["b"] * jnp.sin(t)
    terms: Any = diffrax.ODETerm(promoted(field))
    if solve.is_pair:
        terms = (terms, diffrax.ODETerm(promoted(_other_drift)))
    args = {k: solve.params[k] for k in ("a", "b")}
    return solve(terms=terms, args=args, saveat=everything).ys


@_case("complex state", single_term=True)
def _complex_state(solve):
    def vector_field(t, y, args):
        f = _drift(t, jnp.real(y), args)
        return 1j * y * 0.5 + f.astype(y.dtype)

    y0 = jax.lax.complex(solve.params["y0"], 0.5 * solve.params["y0"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Complex dtype support")
        ys = solve(terms=diffrax.ODETerm(vector_field), y0=y0, saveat=everything).ys
    return jnp.real(ys), jnp.imag(ys)


@_case("integers as y0", single_term=True)
def _integer_state(solve):
    return solve(y0=jnp.array([1, 2, 3]), saveat=diffrax.SaveAt(ts=ts)).ys


@_case("Python numbers as y0", single_term=True, is_quick=False)
def _python_state(solve):
    def vector_field(t, y, args):
        x, z = y
        return args["b"][0] * z, -args["b"][1] * jnp.sin(x)

    return solve(terms=diffrax.ODETerm(vector_field), y0=(1.0, 2)).ys


#
# Parameters in other places than `args`
#


@_case("random keys in args", single_term=True)
def _random_keys(solve):
    def vector_field(t, y, args):
        a, new_key, old_key = args
        keys = jr.fold_in(new_key, 1), jr.fold_in(old_key, 2)
        return jnp.tanh(a @ y) + jr.normal(keys[0], (3,)) * jr.normal(keys[1], (3,))

    args = (solve.params["a"], jr.key(1), jr.PRNGKey(2))
    return solve(terms=diffrax.ODETerm(vector_field), args=args, saveat=everything).ys


class _Field(eqx.Module):
    a: Array
    b: Array
    counts: Array
    name: str

    def __call__(self, t, y, args):
        assert args is None
        return jnp.tanh(self.a @ y) + self.b * jnp.sin(3 * t)


@_case("terms", single_term=True)
def _terms(solve):
    field = _Field(solve.params["a"], solve.params["b"], jnp.arange(3), "field")
    return solve(terms=diffrax.ODETerm(field), args=None, saveat=everything).ys


@_case("closed-over values", is_quick=False)
def _closure(solve):
    args = _args(solve.params)
    field = lambda t, y, _: _drift(t, y, args)
    other = lambda t, y, _: _other_drift(t, y, args)
    terms: Any = diffrax.ODETerm(field)
    if solve.is_pair:
        terms = (terms, diffrax.ODETerm(other))
    return solve(terms=terms, args=None, saveat=everything).ys


@_case("closed-over and passed values", single_term=True)
def _closure_and_args(solve):
    b = jnp.cos(solve.params["b"])
    field = lambda t, y, args: args["activation"](args["a"] @ y) + args["b"] * b
    return solve(terms=diffrax.ODETerm(field), saveat=everything).ys


@_case("closed-over values, vmap", single_term=True)
def _closure_vmap(solve):
    def solve_one(b):
        field = lambda t, y, args: _drift(t, y, args) + b
        return solve(terms=diffrax.ODETerm(field), saveat=everything).ys

    return jax.vmap(solve_one)(jnp.stack([solve.params["b"], solve.params["y0"]]))


#
# Controlled and stochastic differential equations
#


def _matrix_field(t, y, args):
    return jnp.tanh(args["a"] @ y)[:, None] * args["b"][None, :2] + jnp.cos(t)


@_case("CDE", single_term=True, has_control=True)
def _cde(solve):
    values = jnp.sin(jnp.arange(10.0).reshape(5, 2)) * solve.params["b"][None, :2]
    path = diffrax.LinearInterpolation(jnp.linspace(t0, t1, 5), values)
    term = diffrax.ControlTerm(_matrix_field, path)
    return solve(terms=term, saveat=everything).ys


def _sde(solve, tol=1e-3, **kwargs):
    path = diffrax.VirtualBrownianTree(t0, t1, tol, shape=(2,), key=jr.key(5))
    noise = diffrax.ControlTerm(_matrix_field, path)
    terms = diffrax.MultiTerm(diffrax.ODETerm(_drift), noise)
    return solve(terms=terms, saveat=everything, **kwargs).ys


_case("SDE", single_term=True, has_control=True, is_sde=True, quick_solver="Heun")(_sde)


@_case(
    "SDE, adaptive",
    single_term=True,
    has_control=True,
    is_sde=True,
    is_adaptive=True,
    is_quick=False,
)
def _adaptive_sde(solve):
    # Each step size depends on the path, and so on the step size before: on a path that
    # is rough at the scale of the steps, rounding errors grow to the size of the
    # solution within fifty steps.
    controller = diffrax.PIDController(rtol=0.1, atol=0.1, dtmin=1e-2)
    return _sde(solve, tol=0.5, stepsize_controller=controller, max_steps=16384)


#
# Transformations
#


def _batch(solve, num=3):
    y0 = solve.params["y0"]
    scales = jnp.linspace(0.5, 1.5, num)
    return jax.vmap(lambda s: s * y0)(scales)


@_case("vmap over y0")
def _vmap_y0(solve):
    return jax.vmap(lambda y: solve(y0=solve.y0(y), saveat=everything).ys)(
        _batch(solve)
    )


@_case("vmap over args")
def _vmap_args(solve):
    def solve_one(scale):
        params = jtu.tree_map(lambda x: scale * x, solve.params)
        return solve(args=_args(params), saveat=everything).ys

    return jax.vmap(solve_one)(jnp.array([0.5, 1.0, 2.0]))


@_case("vmap over ts", reference=diffrax.DirectAdjoint(), is_quick=False)
def _vmap_ts(solve):
    saveat = lambda ts: diffrax.SaveAt(t0=True, ts=ts, t1=True)
    batch_ts = jnp.stack([ts, 0.9 * ts + 0.1 * t0, jnp.full_like(ts, 1.0)])
    return jax.vmap(lambda ts: solve(saveat=saveat(ts)).ys)(batch_ts)


@_case("vmap over t1, different numbers of steps")
def _vmap_t1(solve):
    # One of them makes no step at all.
    t1s = jnp.array([t1, t0, 0.8, 1.7])
    return jax.vmap(lambda t: solve(t1=t).ys)(t1s)


@_case("vmap, adaptive, different numbers of steps", is_adaptive=True)
def _vmap_adaptive(solve):
    kwargs: Any = dict(
        stepsize_controller=solve.adaptive, max_steps=16384, saveat=everything
    )
    solve_one = lambda y: solve(y0=solve.y0(y), **kwargs).ys
    return jax.vmap(solve_one)(_batch(solve) ** 3)


@_case("vmap, jumps", is_adaptive=True, is_quick=False)
def _vmap_jumps(solve):
    solve_one = lambda t: _jump(solve, ts, jnp.stack([t, t + 0.5]))
    return jax.vmap(solve_one)(jnp.array([0.8, 1.0, 1.5]))


@_case("nested vmap", is_quick=False)
def _nested_vmap(solve):
    solve_one = lambda y, t: solve(y0=solve.y0(y), t1=t, saveat=diffrax.SaveAt(t1=True))
    over_t1 = lambda y: jax.vmap(lambda t: solve_one(y, t).ys)(jnp.array([t1, 1.0]))
    return jax.vmap(over_t1)(_batch(solve, 2))


@_case("vmap over y0, args not batched", is_quick=False)
def _vmap_in_axes(solve):
    solve_one = lambda y, args: solve(y0=solve.y0(y), args=args, saveat=everything).ys
    in_axes = (0, None)
    arrays, others = eqx.partition(_args(solve.params), eqx.is_array)
    combined = lambda y, args: solve_one(y, eqx.combine(args, others))
    return jax.vmap(combined, in_axes)(_batch(solve), arrays)


@_case("solves in a scan", is_quick=False)
def _scan(solve):
    def body(y, scale):
        ys = solve(y0=y, t1=t0 + scale).ys
        return jtu.tree_map(lambda x: x[-1], ys), ys

    y0 = solve.y0(solve.params["y0"])
    return jax.lax.scan(body, y0, jnp.array([0.5, 1.1]))


@_case("a solve in a branch of cond", is_quick=False)
def _cond(solve):
    y0 = solve.y0(solve.params["y0"])
    solve_one = lambda y: solve(y0=y, saveat=everything).ys
    skip_one = lambda y: jtu.tree_map(jnp.zeros_like, jax.eval_shape(solve_one, y))
    pred = solve.params["a"][0, 0] < 100
    return jax.lax.cond(pred, solve_one, skip_one, y0)


@_case("a solve in jax.checkpoint", is_quick=False)
def _checkpoint(solve):
    solve_one = lambda y: solve(y0=solve.y0(y), saveat=everything).ys
    return jax.checkpoint(solve_one)(solve.params["y0"])


@_case(
    "a solve in the vector field of another",
    single_term=True,
    is_explicit=True,
    is_quick=False,
)
def _nested_solve(solve):
    def vector_field(t, y, args):
        inner = lambda s, z, _: _drift(s, z, args)
        return solve(terms=diffrax.ODETerm(inner), y0=y, t1=t0 + 0.3, args=None).ys[-1]

    return solve(terms=diffrax.ODETerm(vector_field), t1=t0 + 0.4).ys


@_case("vmap of grad")
def _vmap_of_grad(solve):
    # The other cases of `vmap` are a gradient of a `vmap`.
    return ()


#
# Comparing
#


def _scalar(ys: PyTree[Array]) -> Array:
    total = jnp.zeros(())
    for y in jtu.tree_leaves(ys):
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        total = total + jnp.sum(weights * y * y + weights * y).astype(total.dtype)
    return total


def value_and_grad(
    case: Case, solver: diffrax.AbstractSolver, adjoint: diffrax.AbstractAdjoint
) -> tuple[Array, PyTree[Array]]:
    """The loss of a case, and its gradient with respect to all parameters."""

    def loss(params):
        return _scalar(case.run(Solve(solver, adjoint, params)))

    params = make_params(case.dtype)
    if case.run is _vmap_of_grad:
        loss = lambda params: _scalar(
            Solve(solver, adjoint, params)(saveat=everything).ys
        )
        params = jtu.tree_map(lambda x: jnp.stack([x, 0.5 * x]), params)
        value, grad = jax.jit(jax.vmap(jax.value_and_grad(loss)))(params)
        return jnp.sum(value), grad
    return jax.jit(jax.value_and_grad(loss))(params)


def compare(case: Case, solver: diffrax.AbstractSolver) -> tuple[float, float]:
    """The relative errors of the value, and of the gradient: of the latter in that leaf
    of the parameters for which it is largest."""
    value, grad = value_and_grad(case, solver, reversible)
    true_value, true_grad = value_and_grad(case, solver, case.reference)

    def _error(x, true_x):
        assert bool(jnp.all(jnp.isfinite(true_x) & jnp.isfinite(x)))
        size = jnp.max(jnp.abs(true_x))
        return float(jnp.max(jnp.abs(x - true_x)) / jnp.where(size == 0, 1, size))

    errors = jtu.tree_map(_error, grad, true_grad)
    return _error(value, true_value), max(jtu.tree_leaves(errors))


def pairs(solver: str = "", case: str = "") -> Iterator[tuple[str, str]]:
    """The names of all cases and solvers that suit each other."""
    for case_name, case_ in CASES.items():
        for solver_name, solver_ in SOLVERS.items():
            if case_.suits(solver_) and solver in solver_name and case in case_name:
                yield case_name, solver_name


def _compare_by_name(pair: tuple[str, str]) -> tuple[float, float]:
    case, solver = pair
    # See `conftest.py`.
    jax.clear_caches()
    try:
        return compare(CASES[case], SOLVERS[solver])
    except Exception as e:
        # The other rows are worth printing all the same.
        print(f"{case}, {solver}: {type(e).__name__}: {e}", file=sys.stderr)
        return math.inf, math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", default="", help="a part of a solver's name")
    parser.add_argument("--case", default="", help="a part of a case's name")
    arguments = parser.parse_args()
    rows = list(pairs(arguments.solver, arguments.case))
    worst = 0.0
    print(f"{'case':44s} {'solver':28s} {'value':>8s} {'gradient':>8s}", flush=True)
    # Most of the time goes into tracing, which a process does one at a time.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as executor:
        results = executor.map(_compare_by_name, rows)
        for (case, solver), (value, grad) in zip(rows, results):
            worst = max(worst, grad / CASES[case].tolerance)
            print(f"{case:44s} {solver:28s} {value:8.1e} {grad:8.1e}", flush=True)
    print(f"The largest error is {worst:.1e} times what is tolerated.")


if __name__ == "__main__":
    main()
