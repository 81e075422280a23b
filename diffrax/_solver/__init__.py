from ._upstream_init import *  # noqa: F403
from .base import AbstractReversibleSolver as AbstractReversibleSolver
from .bit_exact import BitExact as BitExact
from .fixed_point_reversible import FixedPointReversible as FixedPointReversible
from .reversible import UReversible as UReversible
