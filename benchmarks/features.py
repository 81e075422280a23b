"""What each adjoint can differentiate.

    python benchmarks/features.py [--feature NAME] [--output FILE]
    python benchmarks/features.py --smoke

For each feature of `diffeqsolve` and each adjoint: computes a gradient, and prints how
far it is from the reference (relative to its largest entry); or the first line of the
error. The reference is the first of `RecursiveCheckpointAdjoint`, `DirectAdjoint` and
`ForwardMode` that can do it. With `ForwardMode` the derivative is taken in forward
mode, as that is all it can do. All in float64, on small problems.

And for `ReversibleAdjoint`: by how many bytes the scratch memory of the compiled
program grows with each step that is allowed for.

Takes about twelve minutes on 2 CPU cores. With `--output` it writes one line of JSON
for each feature, from which the table of the documentation is made:

    python benchmarks/features.py --output docs/measured/features.jsonl

`--smoke` tries a third of the features, with `ReversibleAdjoint` alone, against the
first reference that works. It fails if that file says of a feature that it works and it
does not, or the other way round. (`test/test_features.py` does so with all of them.)
"""

import argparse
import concurrent.futures
import contextvars
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree


STORED = pathlib.Path(__file__).parent.parent / "docs" / "measured" / "features.jsonl"
ADJOINTS: dict[str, diffrax.AbstractAdjoint] = {
    "RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint(),
    "DirectAdjoint": diffrax.DirectAdjoint(),
    "BacksolveAdjoint": diffrax.BacksolveAdjoint(),
    "ForwardMode": diffrax.ForwardMode(),
    "ReversibleAdjoint": diffrax.ReversibleAdjoint(),
}
OURS = "ReversibleAdjoint"
REFERENCES = ("RecursiveCheckpointAdjoint", "DirectAdjoint", "ForwardMode")
# A gradient that is off by more than this is not what the solver computed.
EXACT = 1e-10
# Of every solve. The program, and so its memory, depends on this and not on how many
# steps it takes.
MAX_STEPS = contextvars.ContextVar("MAX_STEPS", default=64)


class Feature(NamedTuple):
    """Something to differentiate: `loss(params, adjoint)`, in a group of the table.

    `step_bytes` is by how much the memory of `ReversibleAdjoint` may grow with each
    step: by the record of its time, 8 bytes; and where times are differentiated, of the
    derivatives of that. `None` where the output grows."""

    group: str
    name: str
    loss: Callable[[PyTree, diffrax.AbstractAdjoint], Array]
    derivative: str = "gradient"
    params: Callable[[], PyTree] = lambda: PARAMS
    step_bytes: int | None = 8


jax.config.update("jax_enable_x64", True)
# Nearly all of the time goes into compiling.
jax.config.update("jax_disable_most_optimizations", True)

PARAMS = {"y0": jnp.array([0.7, -0.4]), "a": jnp.array([1.3, 0.5])}
TS = jnp.array([0.3, 0.55, 0.9])


def vector_field(t, y, args):
    return jnp.stack([y[1], -args[0] * jnp.sin(y[0]) - args[1] * y[1] * jnp.cos(t)])


def diagonal_noise(t, y, args):
    return lx.DiagonalLinearOperator(0.3 * jnp.cos(y) * args)


def general_noise(t, y, args):
    return jnp.outer(jnp.sin(y), args)


def additive_noise(t, y, args):
    return jnp.diag(args)


def solve(params: PyTree, adjoint: diffrax.AbstractAdjoint, **kwargs) -> Any:
    """`diffeqsolve` on a driven pendulum; every argument can be overridden."""
    defaults: dict[str, Any] = dict(
        terms=diffrax.ODETerm(vector_field),
        solver=diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=0.1,
        y0=params["y0"],
        args=params["a"],
        max_steps=MAX_STEPS.get(),
    )
    return diffrax.diffeqsolve(**(defaults | kwargs), adjoint=adjoint)


def saved(**kwargs) -> Callable:
    """The sum of the squares of all that was saved."""

    def loss(params, adjoint):
        leaves = jtu.tree_leaves(solve(params, adjoint, **kwargs).ys)
        # Rows that were not written hold infinity.
        ys = [jnp.where(jnp.isfinite(y), jnp.abs(y), 0) for y in leaves]
        return sum((jnp.sum(y**2) for y in ys), jnp.array(0.0))

    return loss


def _save(**kwargs) -> Callable:
    return saved(saveat=diffrax.SaveAt(**kwargs))


def _dense(params, adjoint):
    sol = solve(params, adjoint, saveat=diffrax.SaveAt(dense=True))
    return jnp.sum(sol.evaluate(0.37) ** 2)


def _fn_of_args(params, adjoint):
    fn = lambda t, y, args: jnp.sum(y**2) * args[0]
    sol = solve(params, adjoint, saveat=diffrax.SaveAt(ts=TS, fn=fn))
    return jnp.sum(sol.ys)


def _solver_state(params, adjoint):
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    sol = solve(params, adjoint, solver=diffrax.ReversibleHeun(), saveat=saveat)
    leaves = jtu.tree_leaves(sol.solver_state)
    return sum((jnp.sum(x**2) for x in leaves), jnp.array(0.0))


def _restart(params, adjoint):
    kwargs: dict[str, Any] = dict(stepsize_controller=_adaptive, adjoint=adjoint)
    saveat = diffrax.SaveAt(
        t1=True, solver_state=True, controller_state=True, made_jump=True
    )
    first = solve(params, saveat=saveat, **kwargs)
    again = solve(
        params,
        t0=1.0,
        t1=2.0,
        y0=first.ys[-1],
        solver_state=first.solver_state,
        controller_state=first.controller_state,
        made_jump=first.made_jump,
        **kwargs,
    )
    return jnp.sum(again.ys**2)


def _solution_ts(params, adjoint):
    saveat = diffrax.SaveAt(ts=params["ts"], steps=2)
    ts = solve(params, adjoint, saveat=saveat).ts
    return jnp.sum(jnp.where(jnp.isfinite(ts), ts, 0) ** 2)


def _step_to(params, adjoint):
    ts = params["ts"]
    controller = diffrax.StepTo(ts=ts)
    kwargs = dict(t0=ts[0], t1=ts[-1], dt0=None, stepsize_controller=controller)
    return saved(**kwargs)(params, adjoint)


def _times(*names: str, **kwargs: Any) -> tuple[Callable, Callable]:
    values = {"t0": jnp.array(0.05), "t1": jnp.array(1.02), "dt0": jnp.array(0.45)}

    def loss(params, adjoint):
        times = {n: params[n] for n in names}
        return jnp.sum(solve(params, adjoint, **times, **kwargs).ys ** 2)

    return loss, lambda: PARAMS | {n: values[n] for n in names}


def _ts(params, adjoint):
    saveat = diffrax.SaveAt(ts=params["ts"])
    return jnp.sum(solve(params, adjoint, saveat=saveat).ys ** 2)


def _custom_rule_in_field(params, adjoint):
    # Has no derivative in forward mode.
    sin = jax.custom_vjp(jnp.sin)
    sin.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    field = lambda t, y, args: jnp.stack([y[1], -args[0] * sin(y[0])])
    times = {name: params[name] for name in ("t0", "t1")}
    return saved(terms=diffrax.ODETerm(field), **times)(params, adjoint)


def _nested(params, adjoint):
    def field(t, y, args):
        inner = solve({"y0": y, "a": args}, adjoint, t1=0.2, max_steps=8)
        return -args[0] * inner.ys[-1]

    return saved(terms=diffrax.ODETerm(field), solver=diffrax.Heun())(params, adjoint)


def _control(params, adjoint):
    control = diffrax.LinearInterpolation(jnp.linspace(0.0, 1.0, 5), params["xs"])
    term = diffrax.ControlTerm(lambda t, y, args: jnp.outer(y, args), control)
    return saved(terms=term.to_ode())(params, adjoint)


def _brownian(levy_area: type = diffrax.BrownianIncrement):
    return diffrax.VirtualBrownianTree(
        0.0, 1.0, tol=1e-3, shape=(2,), key=jr.key(0), levy_area=levy_area
    )


def _sde(noise: Callable, path: Any = None, solver: Any = None) -> Callable:
    def loss(params, adjoint):
        control = _brownian() if path is None else path
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(vector_field), diffrax.ControlTerm(noise, control)
        )
        _solver = diffrax.Heun() if solver is None else solver
        return saved(terms=terms, solver=_solver)(params, adjoint)

    return loss


def _langevin(params, adjoint):
    path = _brownian(diffrax.SpaceTimeTimeLevyArea)
    gamma, u = params["a"]
    terms = diffrax.MultiTerm(
        diffrax.UnderdampedLangevinDriftTerm(gamma, u, lambda x, args: 2 * x),
        diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, path),
    )
    y0 = (params["y0"], params["y0"][::-1])
    return saved(terms=terms, solver=diffrax.QUICSORT(), y0=y0)(params, adjoint)


class _OnlyProduct(diffrax.AbstractTerm):
    """A term that only ever is asked for the product of vector field and control."""

    def vf(self, t, y, args):
        # Diffrax looks at its structure.
        return vector_field(t, y, args)

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        raise NotImplementedError

    def vf_prod(self, t, y, args, control):
        return vector_field(t, y, args) * control

    def is_vf_expensive(self, t0, t1, y, args):
        return True


def _complex(params, adjoint):
    field = lambda t, y, args: (1j * args[0] - 0.1) * y * jnp.cos(y)
    y0 = params["y0"] + 0.5j
    return saved(terms=diffrax.ODETerm(field), y0=y0)(params, adjoint)


def _event(cond_fn: Callable, root_finder: Any = None) -> Callable:
    def loss(params, adjoint):
        event = diffrax.Event(cond_fn, root_finder)
        return saved(event=event)(params, adjoint)

    return loss


def _event_time(params, adjoint):
    event = diffrax.Event(_crosses_half, _newton)
    return jnp.sum(solve(params, adjoint, event=event).ts)


def _several_events(params, adjoint):
    conditions = {"a": _never, "b": [_crosses_half, _falls_below_half]}
    event = diffrax.Event(conditions, _newton)
    sol = solve(params, adjoint, event=event)
    return jnp.sum(sol.ys**2) + jnp.sum(sol.ts)


def _event_of_parameters(params, adjoint):
    def condition(t, y, args, **kwargs):
        return y[0] - 0.4 * params["a"][0]

    event = diffrax.Event(condition, _newton)
    sol = solve(params, adjoint, event=event)
    return jnp.sum(sol.ys**2) + jnp.sum(sol.ts)


def _never(t, y, args, **kwargs):
    del kwargs
    return y[0] + 10


def _at_once(t, y, args, **kwargs):
    del kwargs
    return y[0] < 10


def _falls_below_half(t, y, args, **kwargs):
    del kwargs
    return y[0] < 0.5


def _crosses_half(t, y, args, **kwargs):
    del kwargs
    return y[0] - 0.5


_newton = optx.Newton(1e-10, 1e-10)


def _vmap(params, adjoint):
    y0 = jnp.stack([params["y0"], 2 * params["y0"]])
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    one = lambda y0: saved(stepsize_controller=controller)(params | {"y0": y0}, adjoint)
    return jnp.sum(jax.vmap(one)(y0))


def _shard_map(params, adjoint):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(auto,))
    y0 = jnp.stack([params["y0"], 2 * params["y0"]])

    def one(y0, a):
        out = jax.vmap(lambda y0: saved()({"y0": y0, "a": a}, adjoint))(y0)
        return jax.lax.psum(jnp.sum(out), "batch")

    spec = jax.sharding.PartitionSpec
    fn = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(spec("batch"), spec()),
        out_specs=spec(),
        check_vma=False,
    )
    return fn(y0, params["a"])


def _pmap(params, adjoint):
    one = lambda y0, a: saved()({"y0": y0, "a": a}, adjoint)
    return jnp.sum(jax.pmap(one, in_axes=(0, None))(params["y0"][None], params["a"]))


def _custom_rule(params, adjoint):
    def loss(params):
        return 2 * saved()(params, adjoint)

    def forward(params):
        return jax.vjp(loss, params)

    def backward(pull_back, grad):
        return pull_back(grad)

    twice = jax.custom_vjp(loss)
    twice.defvjp(forward, backward)
    return twice(params)


def _remat(params, adjoint):
    return jax.checkpoint(lambda p: saved()(p, adjoint))(params)


def _scan(params, adjoint):
    def body(y, _):
        return solve(params | {"y0": y}, adjoint).ys[-1], None

    y, _ = jax.lax.scan(body, params["y0"], length=3)
    return jnp.sum(y**2)


_adaptive = diffrax.PIDController(rtol=1e-4, atol=1e-6)
_t0, _t0_params = _times("t0", "t1")
_t0_adaptive, _t0_adaptive_params = _times(
    "t0", "t1", "dt0", stepsize_controller=_adaptive
)
_dt0, _dt0_params = _times("dt0")

FEATURES = [
    Feature("Saving", "`SaveAt(t1=True)`", saved()),
    Feature("Saving", "`SaveAt(t0=True, t1=True, ts=...)`", _save(t0=True, ts=TS)),
    Feature("Saving", "`SaveAt(steps=True)`", _save(steps=True), step_bytes=None),
    Feature("Saving", "`SaveAt(steps=n)`", _save(steps=3, t1=True), step_bytes=None),
    Feature("Saving", "`SaveAt(dense=True)`", _dense, step_bytes=None),
    Feature("Saving", "`SaveAt(fn=...)`", _fn_of_args),
    Feature(
        "Saving",
        "`SaveAt(subs=[...])`",
        _save(subs=[diffrax.SubSaveAt(t1=True), diffrax.SubSaveAt(ts=TS)]),
    ),
    Feature(
        "Saving",
        "PyTree of `SubSaveAt`, all at once",
        _save(
            subs={
                "a": diffrax.SubSaveAt(t0=True, t1=True, ts=TS, steps=2),
                "b": [diffrax.SubSaveAt(steps=True, fn=lambda t, y, args: t * y)],
            },
            dense=True,
        ),
        step_bytes=None,
    ),
    Feature("Saving", "`Solution.solver_state`", _solver_state),
    # Of two solves.
    Feature(
        "Saving", "a second solve from the state of the first", _restart, step_bytes=16
    ),
    Feature("Steps", "adaptive", saved(stepsize_controller=_adaptive)),
    Feature(
        "Steps",
        "`StepTo`",
        saved(
            stepsize_controller=diffrax.StepTo(ts=jnp.linspace(0.0, 1.0, 9) ** 2),
            dt0=None,
        ),
    ),
    Feature(
        "Steps",
        "jumps",
        saved(
            stepsize_controller=diffrax.ClipStepSizeController(
                _adaptive, jump_ts=jnp.array([0.35])
            )
        ),
        step_bytes=17,
    ),
    Feature("Steps", "`max_steps=None`, constant steps", saved(max_steps=None)),
    Feature(
        "Steps",
        "`max_steps=None`, `StepTo`",
        saved(
            stepsize_controller=diffrax.StepTo(ts=jnp.linspace(0.0, 1.0, 9) ** 2),
            dt0=None,
            max_steps=None,
        ),
    ),
    Feature(
        "Steps",
        "`max_steps=None`, adaptive",
        saved(stepsize_controller=_adaptive, max_steps=None),
    ),
    Feature("With respect to", "`t0`, `t1`", _t0, params=_t0_params, step_bytes=48),
    Feature("With respect to", "`dt0`", _dt0, params=_dt0_params, step_bytes=24),
    Feature(
        "With respect to", "`SaveAt(ts=...)`", _ts, params=lambda: PARAMS | {"ts": TS}
    ),
    Feature(
        "With respect to",
        "`StepTo(ts=...)`",
        _step_to,
        params=lambda: PARAMS | {"ts": jnp.linspace(0.0, 1.0, 9) ** 2},
        step_bytes=40,
    ),
    Feature(
        "With respect to",
        "`t0`, `t1`, `dt0`, adaptive steps",
        _t0_adaptive,
        params=_t0_adaptive_params,
        step_bytes=32,
    ),
    Feature(
        "With respect to",
        "times, of `Solution.ts`",
        _solution_ts,
        params=lambda: PARAMS | {"ts": TS},
        step_bytes=None,
    ),
    Feature(
        "Equations",
        "implicit solver",
        saved(solver=diffrax.Kvaerno3(), stepsize_controller=_adaptive),
    ),
    Feature("Equations", "complex state", _complex),
    Feature("Equations", "term with `vf_prod` alone", saved(terms=_OnlyProduct())),
    Feature(
        "Equations",
        "CDE, with respect to its control",
        _control,
        params=lambda: PARAMS | {"xs": jnp.sin(jnp.arange(10.0)).reshape(5, 2)},
    ),
    Feature("Equations", "a solve inside the vector field", _nested),
    Feature(
        "Equations",
        "vector field with a `jax.custom_vjp`, with respect to `t0`, `t1`",
        _custom_rule_in_field,
        params=_t0_params,
        step_bytes=48,
    ),
    Feature("Equations", "SDE, diagonal noise", _sde(diagonal_noise)),
    Feature("Equations", "SDE, general noise", _sde(general_noise)),
    Feature(
        "Equations",
        "SDE, additive noise",
        _sde(additive_noise, _brownian(diffrax.SpaceTimeLevyArea), diffrax.SEA()),
    ),
    Feature("Equations", "underdamped Langevin", _langevin),
    Feature(
        "Equations",
        "`UnsafeBrownianPath`",
        _sde(additive_noise, diffrax.UnsafeBrownianPath((2,), key=jr.key(0))),
    ),
    Feature("Events", "boolean", _event(_falls_below_half)),
    Feature("Events", "continuous", _event(_crosses_half)),
    Feature("Events", "with a root finder", _event(_crosses_half, _newton)),
    Feature("Events", "the time of the event", _event_time),
    Feature("Events", "several", _several_events),
    Feature("Events", "that depends on parameters", _event_of_parameters),
    Feature("Events", "on the first step", _event(_at_once, _newton)),
    Feature("Events", "that does not occur", _event(_never, _newton)),
    Feature("Derivatives", "`jax.jvp`", saved(), "forward"),
    Feature("Derivatives", "`jax.hessian`", saved(), "hessian"),
    Feature("Derivatives", "`jax.jvp(jax.grad(...), ...)`", saved(), "product"),
    Feature("Derivatives", "`jax.jacrev(jax.jacrev(...))`", saved(), "reverse twice"),
    # Of two members.
    Feature("Transformations", "`jax.vmap`, adaptive steps", _vmap, step_bytes=16),
    Feature("Transformations", "`jax.checkpoint`", _remat),
    Feature("Transformations", "inside `jax.lax.scan`", _scan),
    Feature("Transformations", "inside `jax.custom_vjp`", _custom_rule),
    Feature("Transformations", "`jax.shard_map`", _shard_map),
    Feature("Transformations", "`jax.pmap`", _pmap),
    Feature(
        "Transformations",
        "with a `TqdmProgressMeter`",
        saved(progress_meter=diffrax.TqdmProgressMeter()),
    ),
]


def derivative(feature: Feature, name: str) -> Callable[[PyTree], PyTree]:
    """The derivative that is asked for, of the loss of a feature."""
    take = {
        "gradient": jax.jacfwd if name == "ForwardMode" else jax.jacrev,
        "forward": jax.jacfwd,
        "hessian": jax.hessian,
        "product": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1],
        "reverse twice": lambda f: jax.jacrev(jax.jacrev(f)),
    }[feature.derivative]
    # Not differentiated are the adjoint and what it was made of.
    loss = lambda params: feature.loss(params, ADJOINTS[name])
    return take(loss)


def step_bytes(feature: Feature) -> float:
    """By how much the scratch memory of `ReversibleAdjoint` grows with each step."""

    def temp_bytes(max_steps):
        token = MAX_STEPS.set(max_steps)
        lowered = jax.jit(derivative(feature, OURS)).lower(feature.params())
        MAX_STEPS.reset(token)
        compiled: Any = lowered.compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = 1024, 5120
    return (temp_bytes(many) - temp_bytes(few)) / (many - few)


def relative_error(x: PyTree, exact: PyTree) -> float:
    leaves = jtu.tree_leaves(exact)
    # Of all leaves: the derivative with respect to a step size is next to nothing.
    largest = max(float(jnp.max(jnp.abs(b))) for b in leaves)
    pairs = zip(jtu.tree_leaves(x), leaves, strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / largest


def first_line(error: Exception) -> str:
    # That of an error at run time comes after a traceback.
    message = str(error).split("EquinoxRuntimeError: ")[-1]
    return message.strip().split("\n")[0] or type(error).__name__


def attempt(feature: Feature, name: str) -> PyTree:
    """The gradient by one adjoint, or what it says in place of one."""
    try:
        return jax.block_until_ready(
            eqx.filter_jit(derivative(feature, name))(feature.params())
        )
    except Exception as e:
        return first_line(e)


def measure(feature: Feature, smoke: bool) -> dict[str, Any]:
    """For each adjoint, the error of its gradient, or what it says in place of one."""
    found = {OURS: attempt(feature, OURS)}
    if not smoke:
        found = {name: found.get(name) or attempt(feature, name) for name in ADJOINTS}
    elif not isinstance(found[OURS], str):
        for name in REFERENCES:
            found[name] = attempt(feature, name)
            if not isinstance(found[name], str):
                break
    works = [n for n in REFERENCES if n in found and not isinstance(found[n], str)]
    results = {
        name: x if isinstance(x, str) else relative_error(x, found[works[0]])
        for name, x in found.items()
    }
    row = {"group": feature.group, "feature": feature.name, "results": results}
    if not smoke:
        fails = isinstance(results[OURS], str)
        row["step_bytes"] = None if fails else step_bytes(feature)
    return row


def measure_one(i: int, smoke: bool) -> dict[str, Any]:
    """`measure`, by number: in another process, as compiling takes one core."""
    row = measure(FEATURES[i], smoke)
    jax.clear_caches()
    return row


def kind(result: str | float) -> str:
    """What of a result must be the same on any machine."""
    if isinstance(result, str):
        return "refused"
    return "exact" if result < EXACT else "not exact"


def differs(row: dict[str, Any], stored: dict[str, Any] | None) -> bool:
    if stored is None:
        return True
    # What ours says is shown on the page, word for word.
    said = row["results"][OURS]
    if isinstance(said, str) and said != stored["results"][OURS]:
        return True
    return any(
        kind(result) != kind(stored["results"][name])
        for name, result in row["results"].items()
    )


def grows(row: dict[str, Any], feature: Feature) -> bool:
    """Whether memory grows by more than it should."""
    measured = row.get("step_bytes")
    if measured is None or feature.step_bytes is None:
        return False
    return measured > feature.step_bytes


def main(names: list[str], output: pathlib.Path | None, smoke: bool) -> int:
    stored = {}
    if smoke:
        rows = [json.loads(line) for line in STORED.read_text().splitlines()]
        stored = {(row["group"], row["feature"]): row for row in rows}
    rows = []
    failed = False
    chosen = []
    for i, feature in enumerate(FEATURES):
        label = f"{feature.group}: {feature.name}".lower()
        if not names or any(name.lower() in label for name in names):
            chosen.append(i)
    if smoke and not names:
        chosen = chosen[::3]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as executor:
        for row in executor.map(measure_one, chosen, [smoke] * len(chosen)):
            rows.append(row)
            print(f"{row['group']}: {row['feature']}")
            for name, result in row["results"].items():
                text = result[:100] if isinstance(result, str) else f"{result:.1e}"
                print(f"    {name:28} {text}", flush=True)
            if smoke and differs(row, stored.get((row["group"], row["feature"]))):
                failed = True
                print(f"    FAILED: {STORED.name} says otherwise")
            if row.get("step_bytes") is not None:
                print(f"    bytes for each step: {row['step_bytes']:g}")
            if grows(row, FEATURES[chosen[len(rows) - 1]]):
                failed = True
                print("    FAILED: memory grows by more than it should")
    if not rows:
        print("There is no such feature.")
        failed = True
    if output is not None:
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--feature", nargs="*", default=[], help="part of the name of it or its group"
    )
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.feature and arguments.output is not None:
        parser.error("`--output` is for the table as a whole, without `--feature`.")
    sys.exit(main(arguments.feature, arguments.output, arguments.smoke))
