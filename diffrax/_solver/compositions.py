from typing import ClassVar

from .splitting import AbstractSplitting


def _mirror(half: tuple[float, ...]) -> tuple[float, ...]:
    """The palindrome that starts with `half`, the last of which is in the middle."""
    return (*half, *half[-2::-1])


def _compose(sizes: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients of steps of [`diffrax.PositionVerlet`][] one after the other, of
    these sizes. The last move of each and the first one of the next are made at once.
    """
    out = [sizes[0] / 2]
    for size, next_size in zip(sizes, (*sizes[1:], 0.0)):
        out += [size, (size + next_size) / 2]
    return tuple(out)


class PositionVerlet(AbstractSplitting):
    r"""Position Verlet method, which is also called leapfrog, drift--kick--drift, or
    Strang splitting.

    Symplectic, symmetric method of 2nd order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    Evaluates the first term twice and the second one once for each step.

    Stable for $h \omega < 2.000$, with $\omega$ the frequency of a harmonic oscillator:
    for the same work, no splitting takes larger steps.

    Best at large steps, where the error need not be small; then nothing is cheaper.
    [`diffrax.VelocityVerlet`][] is the same with the two halves exchanged, and
    evaluates each term once, at the price of a state. For small errors, use a method of
    higher order, such as [`diffrax.BlanesMoan4`][]. Not for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{tuckerman1992reversible,
            author={Tuckerman, M. and Berne, B. J. and Martyna, G. J.},
            title={{R}eversible multiple time scale molecular dynamics},
            journal={The Journal of Chemical Physics},
            volume={97},
            number={3},
            pages={1990--2001},
            year={1992},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = (1 / 2, 1.0, 1 / 2)

    def order(self, terms):
        del terms
        return 2


PositionVerlet.__init__.__doc__ = """**Arguments:** None"""


class Ruth3(AbstractSplitting):
    r"""Ruth's method.

    Symplectic method of 3rd order, for a pair of states each of which drives the other:
    see [`diffrax.AbstractSplitting`][] for the form of the equations, how they may
    depend on time, and what undoing a step takes. Does not support adaptive step
    sizing. Uses 1st order local linear interpolation for dense/ts output.

    Evaluates each of the two terms three times for each step; also at times after the
    end of the step, by a 24th of it. Not symmetric: a step of the opposite size does
    not undo a step. (`backward_step` does, as for any splitting.)

    Stable for $h \omega < 2.507$, with $\omega$ the frequency of a harmonic oscillator.

    For the same work it is more accurate than [`diffrax.ForestRuth`][] where errors may
    be large, but less than [`diffrax.PEFRL`][] and [`diffrax.BlanesMoan4`][] wherever
    we have looked. Use it for few evaluations per step. Not for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{ruth1983canonical,
            author={Ruth, Ronald D.},
            title={{A} {C}anonical {I}ntegration {T}echnique},
            journal={IEEE Transactions on Nuclear Science},
            volume={30},
            number={4},
            pages={2669--2671},
            year={1983},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = (
        *(0.0, 7 / 24),
        *(2 / 3, 3 / 4),
        *(-2 / 3, -1 / 24),
        1.0,
    )

    def order(self, terms):
        del terms
        return 3


Ruth3.__init__.__doc__ = """**Arguments:** None"""


_forest_ruth = 1 / (2 - 2 ** (1 / 3))


class ForestRuth(AbstractSplitting):
    r"""Forest--Ruth method, which is also known as Yoshida's, and as that of Candy and
    Rozmus.

    Symplectic, symmetric method of 4th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is three steps of [`diffrax.PositionVerlet`][], of which that in the middle goes
    back by 1.7 times the step. Evaluates the first term four times and the second one
    three times for each step; also at times outside of the step, by up to a third of
    it.

    Stable for $h \omega < 1.573$, with $\omega$ the frequency of a harmonic oscillator.

    The fewest evaluations per step of this order, but not for the same error: there
    [`diffrax.PEFRL`][] and [`diffrax.BlanesMoan4`][] are more accurate. Use it
    to reproduce what others have computed with it. Not for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{forest1990fourth,
            author={Forest, Etienne and Ruth, Ronald D.},
            title={{F}ourth-order symplectic integration},
            journal={Physica D: Nonlinear Phenomena},
            volume={43},
            number={1},
            pages={105--117},
            year={1990},
        }
        ```

        ```bibtex
        @article{yoshida1990construction,
            author={Yoshida, Haruo},
            title={{C}onstruction of higher order symplectic integrators},
            journal={Physics Letters A},
            volume={150},
            number={5--7},
            pages={262--268},
            year={1990},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _compose(
        (_forest_ruth, 1 - 2 * _forest_ruth, _forest_ruth)
    )

    def order(self, terms):
        del terms
        return 4


ForestRuth.__init__.__doc__ = """**Arguments:** None"""


_suzuki = 1 / (4 - 4 ** (1 / 3))


class Suzuki4(AbstractSplitting):
    r"""Suzuki's method, with five steps of Verlet's.

    Symplectic, symmetric method of 4th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is five steps of [`diffrax.PositionVerlet`][], of which that in the middle goes
    back. Evaluates the first term six times and the second one five times for each
    step, and never outside of the step.

    Stable for $h \omega < 2.720$, with $\omega$ the frequency of a harmonic oscillator.

    On Kepler's problem and on that of Hénon and Heiles it is 7 and 10 times as accurate
    as [`diffrax.ForestRuth`][] for the same number of evaluations of the second term;
    but [`diffrax.BlanesMoan4`][] is 25 and 350 times as accurate, and is what to use
    instead. Not for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{suzuki1990fractal,
            author={Suzuki, Masuo},
            title={{F}ractal decomposition of exponential operators with applications to
                   many-body theories and {M}onte {C}arlo simulations},
            journal={Physics Letters A},
            volume={146},
            number={6},
            pages={319--323},
            year={1990},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _compose(
        (_suzuki, _suzuki, 1 - 4 * _suzuki, _suzuki, _suzuki)
    )

    def order(self, terms):
        del terms
        return 4


Suzuki4.__init__.__doc__ = """**Arguments:** None"""


# The notation of Omelyan, Mryglod and Folk.
_xi = 0.1786178958448091
_lambda = -0.2123418310626054
_chi = -0.06626458266981849


class PEFRL(AbstractSplitting):
    r"""Position extended Forest--Ruth-like method, of Omelyan, Mryglod and Folk.

    Symplectic, symmetric method of 4th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    Evaluates the first term five times and the second one four times for each step, and
    never outside of the step.

    Stable for $h \omega < 2.989$, with $\omega$ the frequency of a harmonic oscillator.

    Best at moderate errors, of the methods of 4th order: on Kepler's problem and on
    that of Hénon and Heiles it is 4 and 190 times as accurate as
    [`diffrax.ForestRuth`][] for the same number of evaluations of the second term. At
    smaller errors [`diffrax.BlanesMoan4`][] or a method of higher order takes less
    work. Not for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{omelyan2002optimized,
            author={Omelyan, I. P. and Mryglod, I. M. and Folk, R.},
            title={{O}ptimized {F}orest--{R}uth- and {S}uzuki-like algorithms for
                   integration of motion in many-body systems},
            journal={Computer Physics Communications},
            volume={146},
            number={2},
            pages={188--202},
            year={2002},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _mirror(
        (_xi, 1 / 2 - _lambda, _chi, _lambda, 1 - 2 * (_chi + _xi))
    )

    def order(self, terms):
        del terms
        return 4


PEFRL.__init__.__doc__ = """**Arguments:** None"""


def _blanes_moan(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients of a symmetric method from those that Blanes and Moan print: the
    last one of `a` and of `b` follows from each half moving by the whole step."""
    a = (*a, 1 - 2 * sum(a))
    b = (*b, 1 / 2 - sum(b))
    half = [x for pair in zip(a, b) for x in pair]
    return _mirror((*half, a[-1]))


class BlanesMoan4(AbstractSplitting):
    r"""Blanes and Moan's method of 4th order, with six stages.

    Symplectic, symmetric method of 4th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is the method that its authors call $S_6$. Evaluates the first term seven times
    and the second one six times for each step, and never outside of the step.

    Stable for $h \omega < 3.132$, with $\omega$ the frequency of a harmonic oscillator.

    The most accurate method of 4th order for its work, and the one to begin with: on
    Kepler's problem and on that of Hénon and Heiles it is 6 and 1.8 times as accurate
    as [`diffrax.PEFRL`][], and 25 and 350 times as accurate as
    [`diffrax.ForestRuth`][],
    for the same number of evaluations of the second term. Not for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{blanes2002practical,
            author={Blanes, S. and Moan, P. C.},
            title={{P}ractical symplectic partitioned {R}unge--{K}utta and
                   {R}unge--{K}utta--{N}ystr{\"o}m methods},
            journal={Journal of Computational and Applied Mathematics},
            volume={142},
            number={2},
            pages={313--330},
            year={2002},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _blanes_moan(
        (0.0792036964311957, 0.353172906049774, -0.0420650803577195),
        (0.209515106613362, -0.143851773179818),
    )

    def order(self, terms):
        del terms
        return 4


BlanesMoan4.__init__.__doc__ = """**Arguments:** None"""


class BlanesMoan6(AbstractSplitting):
    r"""Blanes and Moan's method of 6th order, with ten stages.

    Symplectic, symmetric method of 6th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is the method that its authors call $S_{10}$. Evaluates the first term eleven
    times and the second one ten times for each step, and never outside of the step.

    Stable for $h \omega < 3.134$, with $\omega$ the frequency of a harmonic oscillator.

    Best at small errors, for systems that are not of second order. (For those, see
    [`diffrax.BlanesMoanRKN6`][].) On the problem of Hénon and Heiles it is 350 times as
    accurate as [`diffrax.KahanLi6`][] for the same number of evaluations of the second
    term; on Kepler's problem it is a third as accurate. Not for 32-bit precision, the
    rounding errors of which are reached by methods of 4th order as cheaply; nor for
    systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{blanes2002practical,
            author={Blanes, S. and Moan, P. C.},
            title={{P}ractical symplectic partitioned {R}unge--{K}utta and
                   {R}unge--{K}utta--{N}ystr{\"o}m methods},
            journal={Journal of Computational and Applied Mathematics},
            volume={142},
            number={2},
            pages={313--330},
            year={2002},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _blanes_moan(
        (
            *(0.0502627644003922, 0.413514300428344, 0.0450798897943977),
            *(-0.188054853819569, 0.541960678450780),
        ),
        (
            *(0.148816447901042, -0.132385865767784, 0.067307604692185),
            0.432666402578175,
        ),
    )

    def order(self, terms):
        del terms
        return 6


BlanesMoan6.__init__.__doc__ = """**Arguments:** None"""


class BlanesMoanRKN6(AbstractSplitting):
    r"""Blanes and Moan's Runge--Kutta--Nyström method of 6th order, with 14 stages.

    Symplectic, symmetric method of 6th order for equations of second order, $q'' = g(t,
    q)$: the first term has to be linear in $v$ and, if it depends on time at all, in
    $v$ and $t$ together. The usual case is `lambda t, v, args: v`, or `v` divided by a
    mass. For other systems it is of 4th order. See [`diffrax.AbstractSplitting`][] for
    the form of the equations and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is the method that its authors call $SRKN_{14}^a$. Evaluates the first term 15
    times and the second one 14 times for each step, and never outside of the step.

    Stable for $h \omega < 3.140$, with $\omega$ the frequency of a harmonic oscillator.

    The most accurate method of 6th order for its work: on Kepler's problem and on that
    of Hénon and Heiles it is 20 and 4 times as accurate as [`diffrax.BlanesMoan6`][]
    for the same number of evaluations of the second term. Not for kinetic energies that
    are not quadratic, as that of a relativistic particle or of a neural network: see
    [`diffrax.BlanesMoan6`][]. Not for 32-bit precision, nor for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{blanes2002practical,
            author={Blanes, S. and Moan, P. C.},
            title={{P}ractical symplectic partitioned {R}unge--{K}utta and
                   {R}unge--{K}utta--{N}ystr{\"o}m methods},
            journal={Journal of Computational and Applied Mathematics},
            volume={142},
            number={2},
            pages={313--330},
            year={2002},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _blanes_moan(
        (
            *(0.0378593198406116, 0.102635633102435, -0.0258678882665587),
            *(0.314241403071447, -0.130144459517415, 0.106417700369543),
            -0.00879424312851058,
        ),
        (
            *(0.09171915262446165, 0.183983170005006, -0.05653436583288827),
            *(0.004914688774712854, 0.143761127168358, 0.328567693746804),
        ),
    )

    def order(self, terms):
        del terms
        return 6


BlanesMoanRKN6.__init__.__doc__ = """**Arguments:** None"""


class KahanLi6(AbstractSplitting):
    r"""Kahan and Li's method of 6th order, with nine stages.

    Symplectic, symmetric method of 6th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is nine steps of [`diffrax.PositionVerlet`][], with the sizes that its authors
    call s9odr6a. Evaluates the first term ten times and the second one nine times for
    each step, and never outside of the step.

    Stable for $h \omega < 2.532$, with $\omega$ the frequency of a harmonic oscillator.

    On Kepler's problem it is three times as accurate as [`diffrax.BlanesMoan6`][] for
    the same number of evaluations of the second term; on that of Hénon and Heiles, and
    where steps are large, it is far less accurate. Not for 32-bit precision, nor for
    systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{kahan1997composition,
            author={Kahan, William and Li, Ren-Cang},
            title={{C}omposition constants for raising the orders of unconventional
                   schemes for ordinary differential equations},
            journal={Mathematics of Computation},
            volume={66},
            number={219},
            pages={1089--1099},
            year={1997},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _compose(
        _mirror(
            (
                *(0.39216144400731413928, 0.33259913678935943860),
                *(-0.70624617255763935981, 0.082213596293550800230),
                0.79854399093482996340,
            )
        )
    )

    def order(self, terms):
        del terms
        return 6


KahanLi6.__init__.__doc__ = """**Arguments:** None"""


class KahanLi8(AbstractSplitting):
    r"""Kahan and Li's method of 8th order, with 17 stages.

    Symplectic, symmetric method of 8th order, for a pair of states each of which drives
    the other: see [`diffrax.AbstractSplitting`][] for the form of the equations, how
    they may depend on time, and what undoing a step takes. Does not support adaptive
    step sizing. Uses 1st order local linear interpolation for dense/ts output.

    It is 17 steps of [`diffrax.PositionVerlet`][], with the sizes that its authors call
    s17odr8a. Evaluates the first term 18 times and the second one 17 times for each
    step, and never outside of the step.

    Stable for $h \omega < 3.096$, with $\omega$ the frequency of a harmonic oscillator.

    Best at errors near rounding in 64-bit precision: for the same number of evaluations
    of the second term it is more accurate than [`diffrax.BlanesMoanRKN6`][] on Kepler's
    problem where errors are below about 1e-6, and on that of Hénon and Heiles nowhere
    above rounding. (The method of this order with 15 stages, by Suzuki and Umeno, has a
    larger error constant: it is a seventh and three quarters as accurate on these two.)
    Each stage is compiled by itself, so that compiling takes long. Not for large steps
    or 32-bit precision, nor for systems with damping.

    ??? cite "Reference"

        ```bibtex
        @article{kahan1997composition,
            author={Kahan, William and Li, Ren-Cang},
            title={{C}omposition constants for raising the orders of unconventional
                   schemes for ordinary differential equations},
            journal={Mathematics of Computation},
            volume={66},
            number={219},
            pages={1089--1099},
            year={1997},
        }
        ```
    """

    coefficients: ClassVar[tuple[float, ...]] = _compose(
        _mirror(
            (
                *(0.13020248308889008088, 0.56116298177510838456),
                *(-0.38947496264484728641, 0.15884190655515560090),
                *(-0.39590389413323757734, 0.18453964097831570709),
                *(0.25837438768632204729, 0.29501172360931029887),
                -0.60550853383003451170,
            )
        )
    )

    def order(self, terms):
        del terms
        return 8


KahanLi8.__init__.__doc__ = """**Arguments:** None"""
