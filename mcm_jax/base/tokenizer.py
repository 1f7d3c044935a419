"""CLIP's tokenizer, run by transformers and held against what the text encoder expects.

transformers comes with the extra ``text`` and is imported when a tokenizer is loaded, not before.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mcm_jax.base.weights import BaseLoadError, read_json, some

_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_ENDING = "</w>"  # marks a token at the end of a word
_BYTES = 512  # tokens of single bytes in a vocabulary that can spell any text: each within and at the end of a word


@dataclasses.dataclass
class Cuts:
    """Prompts of which a text encoder sees the beginning only, counted for one warning on all of them.

    Attributes:
        total: how many prompts there were, each as often as it came.
        count: how many of them were cut.
        first: what there is to say about the first of these; empty if there was none.
    """

    total: int = 0
    count: int = 0
    first: str = ""

    def add(self, prompts: Iterable[str], cut: Mapping[str, str]) -> None:
        """Counts prompts; `cut` is what a :class:`Tokenizer` said about those that it cut."""
        for prompt in prompts:
            self.total += 1
            self.count += prompt in cut
            self.first = self.first or cut.get(prompt, "")

    def warn(self, stacklevel: int) -> None:
        """Warns if a prompt was cut, as at the code that is `stacklevel` calls above this one."""
        if self.count:
            many = f"{self.count} of {self.total} are too long and were cut. The first: " if self.total > 1 else ""
            warnings.warn(f"prompts: {many}{self.first}", stacklevel=1 + stacklevel)


class Tokenizer:
    """Prompts to tokens, all of one length.

    Args:
        folder: the tokenizer's folder.
        vocab_size: the text encoder's; all tokens are below it.
        max_length: the most tokens that the text encoder takes.
        encoder: the text encoder's config file, named in messages.

    Attributes:
        length: tokens per prompt: the folder's own choice.
        facts: what decides the tokens of a prompt, for a fingerprint.

    Raises:
        BaseLoadError: a file is missing, damaged, or does not fit the text encoder; or transformers is not installed.
    """

    def __init__(self, folder: Path, vocab_size: int, max_length: int, encoder: Path):
        file = folder / "tokenizer_config.json"
        config = read_json(file, "; it says how prompts are padded and cut")
        if config.get("tokenizer_class") not in _CLASSES:
            found = config.get("tokenizer_class")
            raise BaseLoadError(f"{file}: tokenizer_class: found {found!r}, supported: {', '.join(_CLASSES)}")
        _check_special_tokens(folder / "special_tokens_map.json")
        merges = _read_merges(folder)
        self._tokenizer = _clip_tokenizer(folder)

        length = self._tokenizer.model_max_length
        self.length = max_length if length > 1e9 else length  # transformers' number for a file that says nothing
        if not (isinstance(self.length, int) and 2 < self.length <= max_length):
            raise BaseLoadError(
                f"{file}: model_max_length: found {length!r}, supported: 3..{max_length}, max_position_embeddings of "
                f"{encoder}"
            )
        vocab = self._tokenizer.get_vocab()
        ends = {name: getattr(self._tokenizer, name) for name in ("pad_token", "bos_token", "eos_token")}
        if strange := [f"{name} {token!r}" for name, token in ends.items() if token not in vocab]:
            raise BaseLoadError(f"{file}: found {', '.join(strange)}, expected tokens of the vocabulary")
        if max(vocab.values()) >= vocab_size:
            raise BaseLoadError(
                f"{folder}: found tokens up to {max(vocab.values())}, but vocab_size is {vocab_size} in {encoder}"
            )
        self.facts = {
            "vocabulary": _digest(sorted(vocab.items())),
            "merges": _digest(merges),
            "ends": {name: vocab[token] for name, token in ends.items()},
            "length": self.length,
        }

    def __call__(self, prompts: Sequence[str], cut: dict[str, str] | None = None) -> np.ndarray:
        """Tokens of prompts, int32 ``[B, L]``: start, text, end, padding. What does not fit is cut, with a warning.

        Args:
            prompts: the texts.
            cut: receives what there is to say about each prompt that is cut, by prompt, in place of the warning.

        Raises:
            ValueError: not a sequence of texts, or an empty one.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts: found the text {prompts!r}, expected a list of texts: [{prompts!r}]")
        prompts = list(prompts)
        if odd := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(f"prompts: found {odd[0]!r} ({type(odd[0]).__name__}), expected texts")
        if not prompts:
            raise ValueError("prompts: found none, expected at least one")
        found = {}
        for prompt, ids in zip(prompts, self._tokenizer(prompts, verbose=False)["input_ids"], strict=True):
            if len(ids) > self.length:
                lost = self._tokenizer.decode(ids[self.length - 1 : -1])
                found[prompt] = (
                    f"{prompt!r} has {len(ids)} tokens, the text encoder takes {self.length}; cut off: {lost!r}"
                )
        if cut is None:
            cuts = Cuts()
            cuts.add(prompts, found)
            cuts.warn(stacklevel=4)
        else:
            cut |= found
        fixed = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=self.length)
        return np.asarray(fixed["input_ids"], np.int32)


def _clip_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of the folder's files."""
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise BaseLoadError(
            f"{folder}: prompts need transformers for their tokenizer: pip install 'mcm-jax[text]' ({error})"
        ) from error
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, by what is wrong in which file
        raise BaseLoadError(f"{folder}: transformers cannot read this tokenizer ({error})") from error


def _check_special_tokens(file: Path) -> None:
    """A file of special tokens by role; transformers would take any JSON for one."""
    if file.is_file() and (strange := [role for role in read_json(file) if not role.endswith(("_token", "_tokens"))]):
        raise BaseLoadError(f"{file}: found {some(strange)}, expected special tokens such as pad_token")


def _read_merges(folder: Path) -> list[str]:
    """The pairs of tokens that are merged, in order; from the files that transformers prefers, which are checked."""
    whole = folder / "tokenizer.json"
    vocab_file, merges_file = (whole, whole) if whole.is_file() else (folder / "vocab.json", folder / "merges.txt")
    if whole.is_file():
        model = read_json(whole).get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise BaseLoadError(f"{whole}: found no model of type BPE, expected CLIP's tokenizer")
        vocab, merges = model.get("vocab"), model.get("merges")
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges or ()]
    else:
        vocab = read_json(vocab_file, ", and no tokenizer.json: either is expected")
        if not merges_file.is_file():
            raise BaseLoadError(f"{merges_file}: no such file; it belongs to {vocab_file.name}")
        try:
            merges = merges_file.read_text(encoding="utf-8").split("\n")  # the text may hold other line breaks
        except ValueError as error:
            raise BaseLoadError(f"{merges_file}: damaged, not UTF-8 ({error})") from error
        merges = [line.rstrip("\r") for line in merges if line.strip() and not line.startswith("#version")]
    if not isinstance(vocab, dict) or not vocab or not all(type(v) is int and v >= 0 for v in vocab.values()):
        raise BaseLoadError(f"{vocab_file}: found no vocabulary, expected a number for each token")
    pairs = [pair.split(" ") if isinstance(pair, str) else [] for pair in merges]
    made = {"".join(pair) for pair in pairs}
    strange = [pair for pair in merges if not isinstance(pair, str) or len(pair.split(" ")) != 2]
    strange += sorted(token for token in made - vocab.keys())
    if strange or not merges:
        raise BaseLoadError(
            f"{merges_file}: damaged or truncated, found {some(list(map(repr, strange)), 3) or 'no merges'}, expected "
            f"pairs of tokens that make a token of {vocab_file.name}"
        )
    single = sum(len(token.removesuffix(_ENDING)) == 1 for token in vocab)
    # A truncated file of merges is still one, but leaves tokens that nothing makes; some toy vocabularies do so too.
    if single >= _BYTES and len(unmade := vocab.keys() - made) > single + 16:
        raise BaseLoadError(
            f"{merges_file}: truncated, {len(unmade) - single} tokens of {vocab_file.name} are made by no pair"
        )
    return merges


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
