"""Settings of all tests: JAX on the CPU with two devices, and no silent promotion of ranks or dtypes."""

import os
import pathlib
from importlib.metadata import version

# Read when JAX is first imported. Two devices, so that sharding is tested on any machine. The older of XLA's two
# generators of code compiles in half the time, to programs that round otherwise; jaxlib 0.12 has the newer one alone.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith(("0.10.", "0.11.")) else ""),
)

import jax

# Fixtures of a tiny base and a run on it, for the tests of whole runs.
pytest_plugins = ["tiny"]

CACHE = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling is most of the suite's time: a second run on the same machine reads the programs back.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
