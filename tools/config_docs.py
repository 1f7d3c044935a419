"""Prints docs/config.md: every key of a config with its default and meaning, from the dataclasses of settings.

python -m tools.config_docs > docs/config.md
"""

import dataclasses

from mcm_jax.config import describe
from mcm_jax.training import RunSettings


def table() -> str:
    """All keys with their defaults and meanings, in Markdown."""
    lines = [
        "# Every key of a config",
        "",
        "Made by `python -m tools.config_docs > docs/config.md` from the dataclasses beside the code that uses them.",
        "Set in a config file (`c.train.steps = 500`) or on the command line (`--config.train.steps=500`).",
    ]
    top = describe(RunSettings)
    lines += ["", "| key | default | |", "| --- | --- | --- |", f"| `seed` | `0` | {top['seed']} |"]
    for section in dataclasses.fields(RunSettings):
        value = getattr(RunSettings(), section.name)
        if not dataclasses.is_dataclass(value):
            continue
        meanings = describe(type(value))
        lines += [
            "",
            f"## {section.name}",
            "",
            f"{(type(value).__doc__ or '').splitlines()[0].split(' The config')[0]}",
        ]
        lines += ["", "| key | default | |", "| --- | --- | --- |"]
        for field in dataclasses.fields(value):
            default = getattr(value, field.name)
            if field.name == "shown":
                default = {m.name: {"kind": m.kind, "channels": m.channels, "ignore": m.ignore} for m in default}
            meaning = meanings[field.name].replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{section.name}.{field.name}` | `{default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
