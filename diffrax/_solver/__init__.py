from ._upstream_init import *  # noqa: F403
from .asynchronous_leapfrog import AsynchronousLeapfrog as AsynchronousLeapfrog
from .base import AbstractReversibleSolver as AbstractReversibleSolver
from .ees import EES25 as EES25, EES27 as EES27
from .fixed_point_reversible import FixedPointReversible as FixedPointReversible
from .gauss_legendre import (
    GaussLegendre4 as GaussLegendre4,
    ImplicitMidpoint as ImplicitMidpoint,
)
from .reversible import UReversible as UReversible
