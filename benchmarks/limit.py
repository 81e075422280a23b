"""The least that a gradient can cost: loops that are written by hand, each for a single
solver with constant steps and one time to save.

There is no record of times, no error estimate, no certificate and no state stored:
nothing but the forward loop, the reconstruction and the pullback of each step, with all
that these can share. `ratios.py` compares `ReversibleAdjoint` with them. They are here
to be compared with, and not to be used: where going back is unstable, what they return
is wrong.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


Field = Callable[[Any, Array, PyTree[Array]], Array]
Gradient = Callable[[PyTree[Array], Array], PyTree[Array]]


def _stages(tableau, field, t, h, y, params, k0):
    """The stages of a step of size `h`, the first of which is `k0`, without the last
    one of a first-same-as-last method."""
    num_stages = tableau.num_stages - 1 if tableau.fsal else tableau.num_stages
    k = [k0]
    for a, c in zip(tableau.a_lower[: num_stages - 1], tableau.c):
        y_i = y + h * sum(float(a_j) * k_j for a_j, k_j in zip(a, k) if a_j != 0)
        k.append(field(t + float(c) * h, y_i, params))
    return k


def _increment(tableau, h, k):
    return h * sum(float(b) * k_i for b, k_i in zip(tableau.b_sol, k) if b != 0)


def numerical(
    solver: diffrax.AbstractERK, field: Field, t1: float, num_steps: int
) -> Gradient:
    """The gradient of `sum(y1**2)` by a loop that undoes each step by one of the
    opposite sign, without correcting that."""
    tableau: Any = solver.tableau
    h = t1 / num_steps

    def step(t, y, params):
        k0 = field(t, y, params)
        k = _stages(tableau, field, t, h, y, params, k0)
        return y + _increment(tableau, h, k), k0

    def gradient(params, y0):
        def forward(i, y):
            y1, _ = step(i * h, y, params)
            return y1

        def backward(j, carry):
            y1, vf1, grad_y, grads = carry
            t = (num_steps - 1 - j) * h
            k = _stages(tableau, field, t + h, -h, y1, params, vf1)
            y = y1 + _increment(tableau, -h, k)
            _, pull_back, vf = jax.vjp(
                lambda y, params: step(t, y, params), y, params, has_aux=True
            )
            grad_y, of_params = pull_back(grad_y)
            return y, vf, grad_y, jax.tree.map(jnp.add, grads, of_params)

        y1 = lax.fori_loop(0, num_steps, forward, y0)
        carry = y1, field(t1, y1, params), 2 * y1, jax.tree.map(jnp.zeros_like, params)
        _, _, grad_y, grads = lax.fori_loop(0, num_steps, backward, carry)
        return grads, grad_y

    return gradient


def coupled(
    solver: diffrax.AbstractERK,
    field: Field,
    t1: float,
    num_steps: int,
    coupling_parameter: float = 0.999,
) -> Gradient:
    """The same for `UReversible`, the evaluations of which serve both to undo a step
    and to linearise it."""
    tableau: Any = solver.tableau
    h = t1 / num_steps

    def psi(t, h, y, params):
        k = _stages(tableau, field, t, h, y, params, field(t, y, params))
        return _increment(tableau, h, k)

    def gradient(params, y0):
        def forward(i, carry):
            y, z = carry
            t = i * h
            y1 = coupling_parameter * (y - z) + z + psi(t, h, z, params)
            return y1, z - psi(t + h, -h, y1, params)

        def backward(j, carry):
            y1, z1, grad_y, grad_z, grads = carry
            t = (num_steps - 1 - j) * h
            back, pull_back_1 = jax.vjp(
                lambda y, params: psi(t + h, -h, y, params), y1, params
            )
            z = z1 + back
            ahead, pull_back_0 = jax.vjp(
                lambda z, params: psi(t, h, z, params), z, params
            )
            y = z + (y1 - z - ahead) / coupling_parameter
            of_y1, of_params_1 = pull_back_1(-grad_z)
            grad_y = grad_y + of_y1
            of_z, of_params_0 = pull_back_0(grad_y)
            grad_z = grad_z + (1 - coupling_parameter) * grad_y + of_z
            grads = jax.tree.map(
                lambda *x: x[0] + x[1] + x[2], grads, of_params_0, of_params_1
            )
            return y, z, coupling_parameter * grad_y, grad_z, grads

        y1, z1 = lax.fori_loop(0, num_steps, forward, (y0, y0))
        zeros = jax.tree.map(jnp.zeros_like, params)
        carry = y1, z1, 2 * y1, jnp.zeros_like(y1), zeros
        _, _, grad_y, grad_z, grads = lax.fori_loop(0, num_steps, backward, carry)
        return grads, grad_y + grad_z

    return gradient


def reversible_heun(field: Field, t1: float, num_steps: int) -> Gradient:
    """The same for `ReversibleHeun`, the linearisation of which at the end of a step is
    that at the start of the next one."""
    h = t1 / num_steps

    def gradient(params, y0):
        def forward(i, carry):
            y, yhat, vf = carry
            yhat = 2 * y - yhat + h * vf
            vf1 = field((i + 1) * h, yhat, params)
            return y + 0.5 * h * (vf + vf1), yhat, vf1

        def backward(j, carry):
            y1, yhat1, vf1, grad_y, grad_yhat, grad_vf, grads = carry
            t1 = (num_steps - j) * h
            yhat = 2 * y1 - yhat1 - h * vf1
            vf = field(t1 - h, yhat, params)
            y = y1 - 0.5 * h * (vf + vf1)
            _, pull_back = jax.vjp(lambda *x: field(t1, *x), yhat1, params)
            grad_vf = grad_vf + 0.5 * h * grad_y
            of_yhat, of_params = pull_back(grad_vf)
            grad_yhat = grad_yhat + of_yhat
            grad_vf = 0.5 * h * grad_y + h * grad_yhat
            grads = jax.tree.map(jnp.add, grads, of_params)
            return y, yhat, vf, grad_y + 2 * grad_yhat, -grad_yhat, grad_vf, grads

        vf0 = field(0.0, y0, params)
        y1, yhat1, vf1 = lax.fori_loop(0, num_steps, forward, (y0, y0, vf0))
        zeros = jnp.zeros_like(y0)
        none = jax.tree.map(jnp.zeros_like, params)
        carry = y1, yhat1, vf1, 2 * y1, zeros, zeros, none
        *_, grad_y, grad_yhat, grad_vf, grads = lax.fori_loop(
            0, num_steps, backward, carry
        )
        _, pull_back = jax.vjp(lambda *x: field(0.0, *x), y0, params)
        of_y0, of_params = pull_back(grad_vf)
        grads = jax.tree.map(jnp.add, grads, of_params)
        return grads, grad_y + grad_yhat + of_y0

    return gradient
