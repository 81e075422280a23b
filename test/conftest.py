import gc
import zlib

import equinox as eqx
import equinox.internal as eqxi
import jax
import pytest

from .compiling import compile_quickly


compile_quickly()
jax.config.update("jax_enable_x64", True)
# Nothing may be promoted in silence: a mix of dtypes or ranks is stated or is a bug.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# JAX's defaults, so that a variable in the environment changes no random number.
jax.config.update("jax_default_prng_impl", "threefry2x32")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture
def getkey(request):
    """Random keys: a sequence of each test's own, the same in every run and order."""
    return eqxi.GetKey(seed=zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="module")
def _clear_caches():
    # On CPU each compiled program holds some memory maps, of which a process may have
    # only so many (65530 on Linux): after some thousands of programs JAX would crash.
    yield
    eqx.clear_caches()
    jax.clear_caches()
    gc.collect()
