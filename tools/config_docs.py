"""Prints docs/config.md: every key of a config with its default and meaning, from the dataclasses of settings.

python -m tools.config_docs > docs/config.md
"""

import dataclasses
import re
from collections.abc import Mapping

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
            if field.name == "shown":  # a section by each one's name
                of_each, each = describe(type(default[0])), {f"modalities.{m.name}": m for m in default}
                for key in ("kind", "channels", "ignore"):
                    said = ", ".join(f"{getattr(m, key)!r} of `{name}`" for name, m in each.items())
                    lines.append(f"| `modalities.NAME.{key}` | {said} | {_markdown(of_each[key])} |")
                continue
            key = f"{section.name}.{field.name}"
            if isinstance(default, Mapping):
                key, default = f"{key}.NAME", ""
            lines.append(f"| `{key}` | `{default!r}` | {_markdown(meanings[field.name])} |")
    return "\n".join(lines) + "\n"


def _markdown(meaning: str) -> str:
    return re.sub(r":\w+:`(\w+)`", r"`\1`", meaning.replace("``", "`")).replace("|", "\\|")


if __name__ == "__main__":
    print(table(), end="")
