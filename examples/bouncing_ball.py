"""The gradient through the bounces of a ball.

    python examples/bouncing_ball.py [--bounces N]

A ball is thrown up, falls, and bounces off the ground several times, each time with a
part of its speed. Each flight is a solve that ends with an event: a root finder finds
the time at which the ball is at the ground. `ReversibleAdjoint` differentiates through
all of them: when the last bounce is, and how high the ball is some time after it, with
respect to gravity, to how elastic the bounces are, and to the start. All of this is
known in closed form as well, with which it is compared.

Prints a table of the derivatives. Takes about a quarter of a minute, most of it to
compile.
"""

import argparse

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array


Params = dict[str, Array]
PARAMS = {"gravity": 9.8, "restitution": 0.8, "height": 1.5, "velocity": 2.0}


def fall(t, y, gravity):
    del t
    _, velocity = y
    return velocity, -gravity


def fly(t0, t1, y0, gravity, event=None) -> tuple[Array, tuple[Array, Array]]:
    """Returns the time and the state at the end: at `t1`, or at the event."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(fall),
        diffrax.Tsit5(),
        t0,
        t1,
        dt0=0.01,
        y0=y0,
        args=gravity,
        event=event,
        adjoint=diffrax.ReversibleAdjoint(),
    )
    assert sol.ts is not None and sol.ys is not None
    height, velocity = sol.ys
    return sol.ts[-1], (height[-1], velocity[-1])


def simulate(params: Params, num_bounces: int, t1: float) -> dict[str, Array]:
    # Only on the way down: after a bounce the ball is at the ground as well.
    ground = diffrax.Event(
        lambda t, y, args, **kwargs: y[0],
        root_finder=optx.Newton(rtol=1e-12, atol=1e-12),
        direction=False,
    )

    def bounce(carry, _):
        time, y = carry
        time, (height, velocity) = fly(time, jnp.inf, y, params["gravity"], ground)
        return (time, (height, -params["restitution"] * velocity)), None

    start = jnp.array(0.0), (params["height"], params["velocity"])
    (time, y), _ = jax.lax.scan(bounce, start, length=num_bounces)
    _, (height, _) = fly(time, t1, y, params["gravity"])
    return {"time of the last bounce": time, "height later on": height}


def closed_form(params: Params, num_bounces: int, t1: float) -> dict[str, Array]:
    gravity, restitution = params["gravity"], params["restitution"]
    speed = jnp.sqrt(params["velocity"] ** 2 + 2 * gravity * params["height"])
    time = (params["velocity"] + speed) / gravity
    for _ in range(num_bounces - 1):
        speed = restitution * speed
        time = time + 2 * speed / gravity
    later = t1 - time
    height = restitution * speed * later - gravity * later**2 / 2
    return {"time of the last bounce": time, "height later on": height}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bounces", type=int, default=6, help="up to 15")
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    options = parser.parse_args()
    num_bounces = 2 if options.smoke else options.bounces

    jax.config.update("jax_enable_x64", True)
    params = {name: jnp.array(value) for name, value in PARAMS.items()}
    last, next_ = (
        float(closed_form(params, n, 0.0)["time of the last bounce"])
        for n in (num_bounces, num_bounces + 1)
    )
    t1 = last + 0.3 * (next_ - last)

    def with_derivatives(fn):
        twice = lambda params: (fn(params, num_bounces, t1),) * 2
        grads, values = jax.jit(jax.jacrev(twice, has_aux=True))(params)
        return {k: {"": values[k]} | grads[k] for k in values}

    solved, exact = with_derivatives(simulate), with_derivatives(closed_form)
    print(f"{'':38}{'closed form':>14}{'solved':>14}{'difference':>12}")
    for what in solved:
        for by, x in solved[what].items():
            exact_x = exact[what][by]
            difference = abs(x - exact_x)
            label = what if by == "" else f"    with respect to {by}"
            print(f"{label:38}{exact_x:14.9f}{x:14.9f}{difference:12.0e}")
            assert difference <= 1e-9 * abs(exact_x)


if __name__ == "__main__":
    main()
