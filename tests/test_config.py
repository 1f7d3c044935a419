"""Laws of settings: one generic function reads any, every mistake names its key, and old configs keep their meaning."""

import dataclasses
import json
import re
import typing

import pytest
import tiny

from configs import default
from mcm_jax import config as config_lib
from mcm_jax.errors import UserError, expect
from mcm_jax.training import RunSettings, read_run
from tools.config_docs import table

DOCS = tiny.ROOT / "docs/config.md"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
      name: its key.
      weight: in grams,
        of any size.
      spare: how many.
    """

    name: str
    weight: float
    spare: int = 0


@dataclasses.dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
      size: how large.
    """

    size: int = 3
    young: str = config_lib.setting("new", before="as it was")

    def __post_init__(self):
        expect(self.size >= 1, "size", "at least 1", self.size)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Named parts."""

    all_of_them: tuple[Part, ...] = ()
    glue: bool = False


@dataclasses.dataclass(frozen=True)
class Whole:
    """Everything."""

    seed: int = 0
    section: Section = Section()
    parts: Parts = Parts()
    notes: typing.Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = (1, 2)


GIVEN = {"seed": 1, "section": {"size": 2}, "parts": {"b": {"weight": 1}, "a": {"weight": 2.5}, "glue": True}}


def test_settings_come_from_a_config_and_go_back():
    found = config_lib.read(Whole, GIVEN)
    assert found.section.size == 2 and found.parts.all_of_them == (Part("a", 2.5), Part("b", 1.0))
    assert found.section.young == "as it was"  # a config that lacks the key is older than it
    assert Whole().section.young == "new"
    assert config_lib.read(Whole, config_lib.to_dict(found)) == found
    assert config_lib.read(Whole, json.loads(json.dumps(config_lib.to_dict(found)))) == found
    flat = config_lib.flatten(found)
    assert flat["parts.a.weight"] == 2.5 and flat["sizes"] == [1, 2] and flat["section.size"] == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": "many"}, ["config.seed", "whole number", "'many'"]),
        ({"seed": True}, ["config.seed", "whole number", "True"]),
        ({"seed": 1.5}, ["config.seed", "whole number", "1.5"]),
        ({"section": {"size": 0}}, ["config.section.size", "at least 1", "got 0"]),
        ({"section": 3}, ["config.section", "a section with size, young", "3"]),
        ({"section": {"sise": 1}}, ["config.section", "sise", "size, young"]),
        ({"sect": {}}, ["config", "sect", "section"]),
        ({"parts": {"a": {"weight": float("inf")}}}, ["config.parts.a.weight", "finite", "inf"]),
        ({"parts": {"a": {"weight": 10**321}}}, ["config.parts.a.weight", "finite"]),
        ({"parts": {"a": {"wait": 1}}}, ["config.parts.a", "weight", "may have spare", "wait"]),
        ({"parts": {"a": {"weight": 1, "wait": 1}}}, ["config.parts.a", "weight", "may have spare", "wait"]),
        ({"parts": {"a": {"weight": 1, "spare": None}}}, ["config.parts.a.spare", "whole number", "None"]),
        ({"parts": {"glu": True}}, ["config.parts.glu", "unknown key", "True"]),
        ({"parts": {"glue": 1}}, ["config.parts.glue", "True or False", "1"]),
        ({"notes": {"a": 1}}, ["config.notes.a", "a text", "1"]),
        ({"sizes": (1, "2")}, ["config.sizes[1]", "whole number", "'2'"]),
        ({"sizes": "12"}, ["config.sizes", "a list", "'12'"]),
    ],
    ids=str,
)
def test_every_mistake_names_its_key(changes, words):
    with pytest.raises(UserError) as error:
        config_lib.read(Whole, GIVEN | changes)
    assert all(word in str(error.value) for word in words), error.value


def test_keys_are_overridden_wherever_a_name_may_stand():
    changes = {"section.size": 5, "parts.c.weight": 3.0, "parts.glue": False, "notes.x": "y"}
    found = config_lib.read(Whole, config_lib.override(Whole, GIVEN, changes))
    assert found.section.size == 5 and found.notes == {"x": "y"} and not found.parts.glue
    assert found.parts.all_of_them[-1] == Part("c", 3.0) and GIVEN["section"]["size"] == 2
    for key in (
        "section",
        "section.sise",
        "section.size.x",
        "parts.c",
        "parts.c.wait",
        "parts.all_of_them",
        "notes.a.b",
    ):
        with pytest.raises(UserError, match=f"config.{key}: unknown key"):
            config_lib.override(Whole, GIVEN, {key: 1})


def test_a_missing_section_is_named():
    with pytest.raises(UserError, match="lacks section.size, section.young, parts.all_of_them, parts.glue"):
        config_lib.read(Whole, {"seed": 1})


def test_meanings_come_from_the_docstring():
    assert config_lib.describe(Part) == {"name": "its key.", "weight": "in grams, of any size.", "spare": "how many."}


def test_the_default_config_is_the_defaults():
    config = default.get_config()
    assert config_lib.read(RunSettings, config) == RunSettings()
    config.train.steps = 7
    with pytest.raises(TypeError):
        config.train.steps = "seven"
    config.modalities.segmentation.channels = 6
    assert config_lib.read(RunSettings, config).train.steps == 7


def sections(cls=RunSettings, prefix=""):
    """(key, meaning, default) of every key."""
    meanings = config_lib.describe(cls)
    for f in dataclasses.fields(cls):
        value = getattr(cls(), f.name)
        if dataclasses.is_dataclass(value):
            yield from sections(type(value), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, meanings.get(f.name), value


def test_every_key_is_explained():
    assert not [key for key, meaning, _ in sections() if not meaning]


def test_the_docs_list_every_key():
    """docs/config.md is what `python -m tools.config_docs` prints."""
    assert DOCS.read_text() == table()
    listed = set(re.findall(r"^\| `([\w.]+)` \|", DOCS.read_text(), re.MULTILINE))
    keys = config_lib.flatten(default.get_config())
    assert {
        re.sub(r"^(modalities|evaluation.judges|evaluation.expected)[.][a-z]+(?=[.]|$)", r"\1.NAME", k) for k in keys
    } - {"modalities.NAME"} | {"modalities.drop_rate"} == listed


def test_any_name_of_a_mapping_can_be_set():
    """As the command line does it: judges of modalities that configs/default.py has not."""
    c = default.get_config()
    c.evaluation.judges = dict(sketch="edges")  # a config may set it as a whole
    c.evaluation.expected = dict(both="at least 0.9")
    whole = default.get_config()
    whole.evaluation = dict(maps=4, judges=dict(sketch="edges"))  # and what it is in
    whole.evaluation.judges.depth = "none"
    assert whole.evaluation.judges.to_dict() == {"sketch": "edges", "depth": "none"}
    assert c.evaluation.judges.get("depth", "x") == "x" and "depth" not in c.evaluation.judges
    c.lock()
    c.evaluation.judges.depth = "none"
    assert c.evaluation.judges.sketch == "edges"
    c.evaluation.judges.sketch = ""
    assert c.evaluation.judges.sketch == ""
    found = config_lib.read(RunSettings, c).evaluation.judges
    assert found["depth"] == "none" and found["sketch"] == ""
    with pytest.raises(UserError, match="judges.depth: no modality of this run; expected one of segmentation, sketch"):
        read_run(c)
    with pytest.raises(AttributeError):
        c.evaluation.judge.depth = "none"


OLD = tiny.ROOT / "tests/fixtures/v0_1/mcm"


def test_a_config_of_an_old_version_means_what_it_meant():
    """Keys that it lacks are the younger ones, and each is as the old version did it."""
    found = config_lib.load(RunSettings, OLD)
    old = json.loads((OLD / "config.json").read_text())
    flat = config_lib.flatten(found)
    assert {k: flat[k] for k in config_lib.flatten(old)} == config_lib.flatten(old)
    younger = {k: v for k, v in flat.items() if k not in config_lib.flatten(old)}
    assert younger == {
        **{"draws.offset": 0.0, "loss.snr_gamma": 5.0, "mcm.remat": False, "mcm.conditions": "grid"},
        **{"mesh.data": 0, "mesh.fsdp": 1},
        **{"train.accumulate": 1, "train.best": "", "train.decay_steps": 1000, "train.evaluate_every": 0},
        **{"train.held_out": 64, "train.init_from": "", "train.optimizer": "adamw", "train.schedule": "cosine"},
        **{f"evaluation.judges.{name}": "" for name in ("segmentation", "sketch", "caption", "fidelity")},
        **{"modalities.segmentation.ignore": -1, "modalities.sketch.ignore": -1},
        **{
            "data.partial": False,
            "data.held_out_share": 0.0,
            "data.discover": False,
            "data.jitter": 0.0,
            "data.unreadable": "fail",
            "data.stream": "auto",
        },
        **{"sampling.spacing": "", "sampling.timesteps": [], "sampling.start": 0.0, "sampling.end": 1.0},
        **{"sampling.guidance_schedule": [], "sampling.text_rescale": 0.0, "sampling.image_strength": 0.8},
        **{"sampling.height": 0, "sampling.width": 0},
        **{"train.wandb": "", "evaluation.seeds": 1, "evaluation.references": 0, "evaluation.strengths": []},
    }


@pytest.mark.parametrize("name", ["scenes-mcm", "scenes-sd-mcm"])
def test_shipped_configs_read(name):
    folder = tiny.ROOT / "mcm_jax/assets" / name
    assert config_lib.load(RunSettings, folder).base.path.startswith("scenes-")


def test_a_key_of_a_newer_version_is_named(tmp_path):
    content = json.loads((OLD / "config.json").read_text())
    content["train"]["warp"] = 9
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: config\.train: unknown key warp"):
        config_lib.load(RunSettings, tmp_path)


def test_a_part_of_the_settings_reads_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"section": {"size": 4}, "others": {"a": 1}}))
    part = dataclasses.make_dataclass("Part", [("section", Section)], frozen=True)
    assert config_lib.load(part, tmp_path, others=True).section.size == 4
    with pytest.raises(UserError, match="unknown key others"):
        config_lib.load(part, tmp_path)
