"""Pictures alone become pairs: extracts conditions from pictures and lays both out as a folder of pairs.

python -m mcm_jax.data make DATA --extract=sketch,canny

DATA is a flat folder of pictures (and of prompts: NAME.txt beside NAME.jpg, captions.jsonl or metadata.jsonl), or has
them in DATA/image, or in DATA/train/image (and DATA/test/image). What is done is not done again: the same command goes
on after an interruption, and with pictures or extractors that were added.
"""

import argparse
import concurrent.futures
import errno
import json
import os
import pathlib
import shlex
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image
from tqdm import tqdm

from mcm_jax.data import captions
from mcm_jax.data.extract import EXTRACTORS, Extractor, open_extractors
from mcm_jax.data.folder import bare_pictures
from mcm_jax.data.problems import few, printable
from mcm_jax.data.reading import read_image
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, lock, user_path, write_atomically
from mcm_jax.modalities import PICTURES
from mcm_jax.modalities.files import BROKEN, png

RECORD = "extracted.json"
"""In DATA: by modality, how its conditions were extracted."""

SPLITS = ("train", "test")
_SOURCE = "source_bytes"  # PNG text of a condition: how large its picture's file is
_LINES = ("captions.jsonl", f"image/{captions.BESIDE_PICTURES}")  # in a split, where they lie beside the pictures


def make(data: str | os.PathLike, extractors: Sequence[Extractor], workers: int | None = None) -> list[str]:
    """Writes the conditions of all pictures of a folder, those that are not there yet.

    Pictures that lie in DATA itself or in DATA/image, and what belongs to them, are linked (copied, where links fail)
    into DATA/train; they stay where they are.

    Args:
      data: a flat folder of pictures, or one laid out as a split or with train/image and perhaps test/image.
      extractors: what is extracted.
      workers: threads; None for one a core.

    Returns:
      What is wrong with pictures that cannot be read; these have no conditions, all others have.

    Raises:
      UserError: there are no pictures, or conditions of the same name that were made otherwise.
    """
    data = pathlib.Path(data)
    expect(workers is None or workers >= 1, "--workers", "at least 1", workers)
    if not os.path.isdir(data):
        raise UserError(f"{data}: no such folder; expected one of pictures ({', '.join(PICTURES)})")
    check_writable(data, "DATA")
    with lock(data, "extracting conditions there", "DATA"):
        splits = _lay_out(data)
        _check_record(data, splits, extractors)
        work = list(_missing(data, splits, extractors))
        return _extract(work, workers or os.cpu_count() or 1)


def pictures_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The pictures in a folder by name, sorted. Raises UserError where two have one name but for their endings."""
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in PICTURES or not path.is_file():
            continue
        name = unicodedata.normalize("NFC", path.stem)
        if name in found:
            raise UserError(
                f"{folder}: files of one name are one example, but there are {found[name].name} and {path.name}. "
                f"Rename or remove one"
            )
        found[name] = path
    return found


def _lay_out(data: pathlib.Path) -> list[str]:
    """Brings what lies in a folder without splits to train; returns the splits that there are."""
    bare = bare_pictures(data)
    own = pictures_in(bare) if bare else {}
    if not any((data / split).is_dir() for split in SPLITS):
        if not own:
            raise UserError(
                f"{data}: found no pictures ({', '.join(PICTURES)}) there, in {data / 'image'} or in "
                f"{data / 'train' / 'image'}; expected them in one of these"
            )
        partial = data / ".train"  # all or none
        shutil.rmtree(partial, ignore_errors=True)
        for place, path in _belonging(data, bare, own).items():
            (partial / place).parent.mkdir(parents=True, exist_ok=True)
            _link(path, partial / place)
        partial.rename(data / "train")
    splits = [split for split in SPLITS if (data / split / "image").is_dir()]
    if not splits:
        raise UserError(f"{data}: has no {pathlib.Path('train', 'image')}; expected the pictures there")
    there = {name: path for split in splits for name, path in pictures_in(data / split / "image").items()}
    if late := [name for name, path in own.items() if name not in there or _is_another(there[name], path)]:
        print(
            f"note: left out {len(late)} new or changed picture(s) of {bare} ({printable(few(late))}), since there is "
            f"{data / splits[0] / 'image'} already: move them there"
        )
    return splits


def _belonging(
    data: pathlib.Path, bare: pathlib.Path, own: Mapping[str, pathlib.Path]
) -> dict[pathlib.Path, pathlib.Path]:
    """Where in a split what belongs, of a folder without splits: its pictures and what there is of theirs."""
    files = {pathlib.Path("image", path.name): path for path in own.values()}
    prompts = {unicodedata.normalize("NFC", p.stem): p for p in bare.iterdir() if p.suffix == ".txt"}
    files |= {pathlib.Path(captions.FOLDER, f"{p.stem}.txt"): prompts[n] for n, p in own.items() if n in prompts}
    files |= {pathlib.Path(file): bare / pathlib.Path(file).name for file in _LINES}
    if bare != data:  # laid out as a split is
        files |= {pathlib.Path(file): data / file for file in captions.LINES if (data / file).is_file()}
        beside = [f for f in data.iterdir() if f.is_dir() and f != bare and not f.name.startswith(".")]
        theirs = (path for folder in beside for path in folder.iterdir())
        files |= {p.relative_to(data): p for p in theirs if unicodedata.normalize("NFC", p.stem) in own}
    return {place: path for place, path in files.items() if path.is_file()}


def _is_another(path: pathlib.Path, than: pathlib.Path) -> bool:
    """Whether a file is not, or no more, the copy of another: older, or of another size."""
    there, here = than.stat(), path.stat()
    return here.st_mtime_ns < there.st_mtime_ns or here.st_size != there.st_size


def _link(path: pathlib.Path, to: pathlib.Path) -> None:
    try:
        to.hardlink_to(path.resolve())
    except OSError:  # another file system, or one without links
        shutil.copy2(path, to)


def _check_record(data: pathlib.Path, splits: Sequence[str], extractors: Sequence[Extractor]) -> None:
    """Notes how conditions are made; refuses a folder with others, which would be mixed with these."""
    path = data / RECORD
    try:
        record = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({e}); remove it, and the folders of extracted conditions") from e
    for e in extractors:
        folders = [data / split / e.modality for split in splits]
        there = [f for f in folders if f.is_dir() and any(pictures_in(f))]
        if there and record.get(e.modality) != e.record:
            before = record.get(e.modality)
            how = (
                f"made by {_said(before)}, not by {_said(e.record)}"
                if isinstance(before, dict)
                else "not made by this command"
            )
            raise UserError(
                f"{there[0]}: holds conditions that were {how}. Extract into another folder, "
                f"--extract={e.modality}_2=..., or remove {' and '.join(map(str, there))}"
            )
        record[e.modality] = e.record
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def _said(record: Mapping[str, object]) -> str:
    return f"{record.get('by')} ({', '.join(f'{k}={v}' for k, v in record.items() if k != 'by')})"


def _missing(
    data: pathlib.Path, splits: Sequence[str], extractors: Sequence[Extractor]
) -> Iterator[tuple[pathlib.Path, dict[pathlib.Path, Extractor]]]:
    """Pictures, and the files that they lack, that are older than the picture or of another one that was there."""
    for split in splits:
        for e in extractors:
            (data / split / e.modality).mkdir(exist_ok=True)
        for path in pictures_in(data / split / "image").values():
            there, files = path.stat(), {}
            for e in extractors:
                file = data / split / e.modality / f"{path.stem}.png"
                if not (file.exists() and file.stat().st_mtime_ns >= there.st_mtime_ns and _is_of(file, there)):
                    files[file] = e
            if files:
                yield path, files


def _is_of(file: pathlib.Path, picture: os.stat_result) -> bool:
    """Whether a condition says of no other picture than this that it is its: one moved here may have an older time."""
    try:
        with Image.open(file) as condition:
            return condition.info.get(_SOURCE) in (None, str(picture.st_size))
    except BROKEN:
        return True


def write_png(path: pathlib.Path, picture: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Writes a picture that is either complete or not there, with texts. Raises UserError where it cannot."""
    try:
        write_atomically(path, png(picture, texts))
    except OSError as e:
        fix = "Shorten its picture's name" if e.errno == errno.ENAMETOOLONG else "Free space or permissions there"
        raise UserError(f"{path}: cannot be written ({e.strerror or e}). {fix}") from e


def _extract(work: Sequence[tuple[pathlib.Path, dict[pathlib.Path, Extractor]]], workers: int) -> list[str]:
    def one(path: pathlib.Path, files: Mapping[pathlib.Path, Extractor]) -> str | None:
        try:
            source = {_SOURCE: str(path.stat().st_size)}
            picture = read_image(path)
        except UserError as e:
            return str(e)
        name = unicodedata.normalize("NFC", path.stem)
        for file, extractor in files.items():
            try:
                condition = extractor(picture, name)
            except UserError as e:
                return f"{path}: {e}"
            except Exception as e:  # of a user's own function
                e.add_note(f"while it had {path}")
                raise
            write_png(file, condition, source)
        return None

    # Threads: what takes time (SciPy, Pillow, nets) lets go of the interpreter.
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(one, *item) for item in work]
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, "conditions", len(futures), unit=" pictures", leave=False, disable=not futures):
            future.result()  # an extractor that fails ends it here
        return [wrong for future in futures if (wrong := future.result())]
    finally:
        pool.shutdown(cancel_futures=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :func:`main`."""
    parser.add_argument("data", type=user_path, metavar="DATA", help="pictures, or a folder with train/image")
    add_extract_argument(parser)


def add_extract_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --extract and --workers."""
    parser.add_argument(
        "--extract",
        required=True,
        metavar="A,B",
        help=f"which conditions: {', '.join(EXTRACTORS)}, NAME=module:function, NAME=FILE.onnx (docs/extract.md)",
    )
    parser.add_argument("--workers", type=int, help="threads that extract (default: one a core)")


def main(args: argparse.Namespace) -> None:
    """Runs the command; raises UserError where something is wrong, also with single pictures."""
    extract(args.data, open_extractors(args.extract), args.workers)


def extract(data: pathlib.Path, extractors: Sequence[Extractor], workers: int | None) -> None:
    """:func:`make`, and says what to type next. Raises UserError, at the end, where pictures cannot be read."""
    wrong = make(data, extractors, workers)
    for e in extractors:
        count = [f"{len(pictures_in(f))} in {f}" for s in SPLITS if (f := data / s / e.modality).is_dir()]
        print(f"{e.modality}: {', '.join(count)}")
    if wrong:
        listed = "\n".join(wrong)
        raise UserError(f"{len(wrong)} picture(s) have no conditions, all others do:\n{listed}")
    print(f"\nNext: python -m mcm_jax.data check {shlex.quote(str(data))}")
