"""Makes data sets, and checks them.

python -m mcm_jax.data make DATA --extract=sketch,canny
python -m mcm_jax.data check DATA --out=runs/check
python -m mcm_jax.data synthesise --base=scenes-ddpm --out=DATA --count=2000 --extract=sketch,canny
"""

import argparse
import signal
import sys

from mcm_jax.data import check, make, synthesise
from mcm_jax.errors import UserError

_COMMANDS = {"make": make, "check": check, "synthesise": synthesise}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 1 and one message on bad input, 130 on Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m mcm_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, module in _COMMANDS.items():
        add = commands.add_parser(
            name,
            help=module.__doc__.partition("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(add)
        add.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(args.main(args))
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is complete", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
