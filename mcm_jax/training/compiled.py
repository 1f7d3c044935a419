"""The compiled training step: what it costs, and a word whenever it is compiled again."""

import time
import warnings
from typing import Any

import jax

from mcm_jax.base import attention


class CompiledStep:
    """A jitted function, compiled ahead for its first arguments. Others compile it anew, with a warning that says why.

    Args:
      jitted: the function, from :func:`jax.jit`.
      arguments: the first ones; they are not used up.
      repeats: how often the loop that does the work goes round: the compiler counts it once.

    Attributes:
      seconds: that compiling took.
      flops: of a call, by the compiler's count, over all devices; None where it does not tell, as on one CPU device,
        whose attention is a loop.
      bytes: of memory that a call takes on a device, its arguments included; None where the compiler does not tell.
    """

    def __init__(self, jitted: Any, *arguments: Any, repeats: int = 1):
        self._jitted, self._repeats = jitted, repeats
        self._compile(arguments)

    def _compile(self, arguments: Any) -> None:
        began = time.perf_counter()
        self._compiled = self._jitted.lower(*arguments).compile()
        self.seconds = time.perf_counter() - began
        cost, memory = self._compiled.cost_analysis(), self._compiled.memory_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        devices = {d for leaf in jax.tree.leaves(arguments) for d in getattr(leaf.sharding, "device_set", ())}
        known = cost and "flops" in cost and not attention.loops_over_heads()  # the compiler counts a loop's body once
        self.flops = cost["flops"] * max(1, len(devices)) * self._repeats if known else None
        self.bytes = None
        if memory:
            kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            self.bytes = kept + memory.temp_size_in_bytes

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        try:
            return self._compiled(*arguments)
        except (TypeError, ValueError) as e:  # before anything ran, so nothing was donated
            self._compile(arguments)
            cause = " ".join(str(e).split())
            warnings.warn(f"the training step was compiled again, in {self.seconds:.1f} s: {cause}", stacklevel=2)
            return self._compiled(*arguments)

    def __str__(self) -> str:
        """For people: FLOPs and memory, as far as they are known."""
        parts = [f"{self.flops / 1e9:,.2f} GFLOP"] if self.flops else []
        parts += [f"{self.bytes / 2**20:,.0f} MiB on each device"] if self.bytes else []
        return f"a step takes {', '.join(parts) or 'what this device does not tell'}; compiled in {self.seconds:.1f} s"
