"""What the scripts at the top level share: errors that a user can mend end in one message, not a traceback."""

import contextlib
import dataclasses
import gc
import os
import pathlib
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from mcm_jax import config, distributed, sharding
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.mcm import DTYPES

_CLUSTER = ("coordinator", "num_processes", "process_id")


def define_distributed_flags() -> None:
    """Defines --coordinator, --num_processes and --process_id, of a script that runs on several hosts (on import)."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, or auto; for several hosts")
    flags.DEFINE_integer("num_processes", None, "How many processes there are")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0")


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; a config key that does not exist, or of the wrong type, is a flag's error."""
    try:
        remaining = flags.FLAGS(argv)
        if len(remaining) > 1:
            sys.exit(
                f"error: found {' '.join(remaining[1:])!r}, expected flags only (--name=value); try {argv[0]} --help"
            )
        for name in flags.FLAGS:  # ml_collections reports a missing config file when its value is first used: now
            getattr(flags.FLAGS[name].value, "lock", None)
        return remaining
    except flags.Error as e:
        sys.exit(f"error: {e}\nTry {argv[0]} --help")
    except (AttributeError, KeyError, TypeError, ValueError) as e:  # what ml_collections raises for overrides
        key = e.args[0] if e.args else e
        sys.exit(f"error: config key {key}\nconfigs/default.py has every key, docs/config.md says what each means")
    except (OSError, ImportError, SyntaxError) as e:
        sys.exit(f"error: the config file cannot be read: {e}")


class _Numbers(flags.ArgumentParser):
    """Reads numbers with commas between them."""

    def parse(self, argument: str) -> tuple[float, ...]:
        return tuple(float(part) for part in argument.split(",") if part)


class _Named(flags.ArgumentParser):
    """Reads NAME=NUMBER, or NAME=NUMBER:NUMBER, of one of several names."""

    def __init__(self, form: str):
        self._form = form

    def parse(self, argument: str) -> tuple[str, Any]:
        name, _, text = argument.partition("=")
        try:
            value = tuple(map(float, text.split(":"))) if ":" in self._form else float(text)
        except ValueError as e:
            raise ValueError(f"expected NAME={self._form}") from e
        return name, value


def define_flags(
    cls: type, names: Sequence[str] = (), default: str = " Default: the config's"
) -> Callable[[], dict[str, Any]]:
    """Defines a flag for each field of a dataclass of settings, explained by its docstring.

    Numbers by name are a flag that may be repeated, NAME=NUMBER; pairs of them NAME=NUMBER:NUMBER.

    Args:
      cls: the dataclass.
      names: of the fields; none for all.
      default: what the explanations end with.

    Returns:
      A function that gives, by name, the values that were typed; None where nothing was.
    """
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    define[tuple[float, ...]] = lambda *args: flags.DEFINE(_Numbers(), *args)
    named = {Mapping[str, float]: "NUMBER", Mapping[str, tuple[float, ...]]: "START:END"}
    for kind, form in named.items():
        define[kind] = lambda name, default, text, form=form: flags.DEFINE_multi(
            _Named(form), None, name, default, f"NAME={form}: {text}"
        )
    meanings, types = config.describe(cls), typing.get_type_hints(cls)
    chosen = names or [f.name for f in dataclasses.fields(cls)]
    holders = {name: define[types[name]](name, None, meanings[name] + default) for name in chosen}

    def typed(name: str) -> Any:
        value = holders[name].value
        return dict(value) if value is not None and types[name] in named else value

    return lambda: {name: typed(name) for name in chosen}


def define_base_flags() -> Callable[[], dict[str, Any]]:
    """Defines --base, --accept_base, --dtype, of a script that samples with a trained MCM; returns what was typed."""
    base = flags.DEFINE_string("base", None, "Where the MCM's base is. Default: as its config says, base.path")
    accept = flags.DEFINE_bool(
        "accept_base", False, "Take a base that is a fine-tune of the MCM's own: same noise schedule and latents"
    )
    dtype = flags.DEFINE_enum("dtype", None, DTYPES, "What base and MCM compute in. Default: as trained")
    return lambda: {"base": base.value, "accept_base": accept.value, "dtype": dtype.value}


def allow_only_with(flag: str, others: Sequence[str]) -> None:
    """Refuses flags that mean nothing where another one is not given."""
    for name in others:

        @flags.multi_flags_validator([flag, name], message=f"--{name} goes with --{flag} only")
        def _(values: Mapping[str, Any], name: str = name) -> bool:
            return values[flag] is not None or values[name] is None


def command(script: str, config_holder: flags.FlagHolder) -> list[str]:
    """Words of a command that runs a script with a flag's config as it is, with what was overridden."""
    flag = flags.FLAGS[config_holder.name]  # of ml_collections
    changes = [f"--config.{key}={value}" for key, value in flag.override_values.items()]
    return ["python", script, f"--config={flag.config_filename}", *changes]


def span(text: str | None, flag: str) -> tuple[int, int] | None:
    """The steps of a flag's START:STOP; None where it was not given. Raises UserError where it is something else."""
    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"{flag}={text}: expected START:STOP, two numbers of steps, e.g. {flag}=100:110")
    return int(start), int(stop)


def use_compilation_cache() -> None:
    """Compiled programs are read back from ``~/.cache/mcm_jax/compiled``, or where JAX_COMPILATION_CACHE_DIR says."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "mcm_jax" / "compiled"))


@contextlib.contextmanager
def _stops_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. The training loop has a handler of its own, which saves first."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main under absl, as one of several processes where its flags say so.

    Exit status: 0 done, 1 or 2 bad input, or another process failed (one message on stderr), 130 stopped by SIGINT or
    SIGTERM, with the state saved where there is one.
    """

    def joined(argv: list[str]) -> None:
        known = [flags.FLAGS[name].value if name in flags.FLAGS else None for name in _CLUSTER]
        with distributed.cluster(*known), contextlib.ExitStack() as stack:
            if not distributed.is_first():  # what all would say is said once; errors come from whoever has them
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            way_out = "config.base.dtype=bfloat16" if "config" in flags.FLAGS else "--dtype=bfloat16"
            way_out = f"Smaller numbers, {way_out}; a smaller base; or more devices"
            with sharding.memory_errors("what this command needs", way_out):  # where nothing else is said
                main(argv)

    use_compilation_cache()
    logging.set_verbosity(logging.WARNING)  # Orbax reports a page for every checkpoint; --verbosity=0 shows it
    try:
        with _stops_by_sigterm():
            app.run(joined, flags_parser=_parse)
        return
    except UserError as e:
        status = f"error: {e}"
    except Interrupted as e:
        print(f"\n{e}", file=sys.stderr)
        status = 130
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is complete", file=sys.stderr)
        status = 130
    gc.collect()  # what Orbax left half done on a full disk would print tracebacks while Python shuts down
    sys.exit(status)
