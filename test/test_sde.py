"""Gradients through stochastic differential equations, by every solver for them."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest


_W = diffrax.BrownianIncrement
_H = diffrax.SpaceTimeLevyArea
_K = diffrax.SpaceTimeTimeLevyArea
_general = (
    (diffrax.Euler(), _W),
    (diffrax.Heun(), _W),
    (diffrax.Midpoint(), _W),
    (diffrax.Ralston(), _W),
    (diffrax.EES25(), _W),
    (diffrax.EES27(), _W),
    (diffrax.EulerHeun(), _W),
    (diffrax.ItoMilstein(), _W),
    (diffrax.StratonovichMilstein(), _W),
    (diffrax.SlowRK(), _H),
    (diffrax.SPaRK(), _H),
    (diffrax.GeneralShARK(), _H),
    (diffrax.ReversibleHeun(), _W),
    (diffrax.AsynchronousLeapfrog(), _W),
    (diffrax.ImplicitMidpoint(), _W),
    (diffrax.GaussLegendre4(), _W),
    (diffrax.UReversible(diffrax.Heun()), _W),
    (diffrax.HalfSolver(diffrax.EulerHeun()), _W),
)
# Only for a diffusion that does not depend on the state.
_additive = ((diffrax.SEA(), _H), (diffrax.SRA1(), _H), (diffrax.ShARK(), _H))
_langevin = (
    (diffrax.ALIGN(0.1), _H),
    (diffrax.ShOULD(0.1), _K),
    (diffrax.QUICSORT(0.1), _K),
)


def _brownian(shape, levy_area):
    return diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, shape, jr.key(0), levy_area)


def _neural_sde(network, diffusion, levy_area, is_additive):
    drift = diffrax.ODETerm(lambda t, y, args: network(y))
    if is_additive:
        fn = lambda t, y, args: diffusion[:, :2]
        noise = diffrax.ControlTerm(fn, _brownian((2,), levy_area))
    else:
        # Diagonal, as the Milstein methods want it to be.
        fn = lambda t, y, args: lx.DiagonalLinearOperator(jnp.sin(diffusion @ y))
        noise = diffrax.ControlTerm(fn, _brownian((3,), levy_area))
    return diffrax.MultiTerm(drift, noise)


def _langevin_equation(network, diffusion, levy_area):
    gamma, u = 1 + diffusion[0] ** 2, 1 + diffusion[1] ** 2
    force = lambda y, args: network(y)
    drift = diffrax.UnderdampedLangevinDriftTerm(gamma, u, force)
    brownian = _brownian((3,), levy_area)
    noise = diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, brownian)
    return diffrax.MultiTerm(drift, noise)


def _cases():
    quick = diffrax.Euler
    for kind, solvers in (
        ("general", _general),
        ("additive", _additive),
        ("langevin", _langevin),
    ):
        for solver, levy_area in solvers:
            name = type(solver).__name__
            marks = () if isinstance(solver, quick) else pytest.mark.slow
            yield pytest.param(solver, levy_area, kind, id=name, marks=marks)


@pytest.mark.parametrize("solver, levy_area, kind", list(_cases()))
def test_gradient(solver, levy_area, kind, getkey):
    network = eqx.nn.MLP(3, 3, 4, 1, jnp.tanh, key=getkey(), dtype=jnp.float64)
    params = network, jr.normal(getkey(), (3, 3)) / 3, jr.normal(getkey(), (3,))

    def loss(params, adjoint):
        network, diffusion, y0 = params
        if kind == "langevin":
            terms = _langevin_equation(network, diffusion, levy_area)
            y0 = y0, y0[::-1]
        else:
            is_additive = kind == "additive"
            terms = _neural_sde(network, diffusion, levy_area, is_additive)
        sol = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 0.02, y0, adjoint=adjoint, max_steps=64
        )
        return sum(jnp.sum(y**2) for y in jtu.tree_leaves(sol.ys))

    grad = eqx.filter_jit(eqx.filter_grad(loss))
    out = grad(params, diffrax.ReversibleAdjoint(checkpoints=3))
    expected = grad(params, diffrax.RecursiveCheckpointAdjoint())
    for x, true_x in zip(jtu.tree_leaves(out), jtu.tree_leaves(expected), strict=True):
        size = float(jnp.max(jnp.abs(true_x)))
        assert size > 0
        np.testing.assert_allclose(x, true_x, rtol=0, atol=1e-11 * size)


class _Watched(diffrax.AbstractPath):
    """A Brownian motion that tells for which intervals it is asked."""

    path: diffrax.VirtualBrownianTree
    tell: Callable = eqx.field(static=True)
    t0: float = 0.0
    t1: float = 1.0

    def evaluate(self, t0, t1=None, left=True):
        jax.debug.callback(self.tell, t0, t1)
        return self.path.evaluate(t0, t1, left)


@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(diffrax.ReversibleHeun(), marks=pytest.mark.slow),
        diffrax.Heun(),
    ),
)
def test_backward_asks_for_the_increments_of_forward(solver):
    """To the last bit of the times: one bit is a change by 1e-8. The number of steps is
    not a power of two, so that the times are rounded."""
    num_steps, asked = 600, set()
    tell = lambda t0, t1: asked.add((float(min(t0, t1)), float(max(t0, t1))))
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / num_steps, (), jr.key(0))

    def loss(scale):
        drift = diffrax.ODETerm(lambda t, y, args: -y)
        path = _Watched(tree, tell)
        noise = diffrax.ControlTerm(lambda t, y, args: jnp.sin(scale * y), path)
        terms = diffrax.MultiTerm(drift, noise)
        adjoint = diffrax.ReversibleAdjoint()
        sol = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / num_steps, 0.5, adjoint=adjoint, max_steps=600
        )
        assert sol.ys is not None
        return sol.ys[0]

    _, grad = jax.jit(jax.value_and_grad(loss))(1.0)
    jax.effects_barrier()
    assert abs(grad) > 1e-3
    # One after another, from `t0` to `t1`, and nothing else.
    starts, ends = zip(*sorted(asked))
    assert starts[0] == 0 and starts[1:] == ends[:-1] and ends[-1] == 1
    assert len(asked) == num_steps


def test_every_solver_is_tested():
    exported = {
        cls
        for cls in vars(diffrax).values()
        if isinstance(cls, type)
        and issubclass(
            cls,
            (
                diffrax.AbstractItoSolver,
                diffrax.AbstractStratonovichSolver,
                diffrax.AbstractSRK,
                diffrax.AbstractFosterLangevinSRK,
            ),
        )
        and not cls.__name__.startswith("Abstract")
    }
    tested = {type(solver) for solver, _ in _general + _additive + _langevin}
    assert exported == {cls for cls in tested if cls in exported}
