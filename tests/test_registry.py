"""What a registry promises, on made-up components; then the same promises of every component there is."""

import functools
import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

import ovi
from ovi.commands.components import component_modules, load_components, store_components
from ovi.commands.list import argument_docs
from ovi.errors import OviError
from ovi.registry import REGISTRIES, DuplicateNameError, Registry, UnknownNameError

load_components()
# Those that other tests register for themselves come and go.
ENTRIES = [
    (registry, name)
    for _, registry in sorted(REGISTRIES.items())
    for name in registry
    if registry[name].__module__.startswith("ovi.")
]
entries = pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=[f"{r.name}={n}" for r, n in ENTRIES])


class Gadget:
    """A thing to register.

    Args:
        video: wiring.
        audio: wiring.
        gate: whether a gate is learnt.
        size: rows and columns.
        rate: in Hz, has no default.
    """

    def __init__(self, video, audio, *, gate: bool = False, size: tuple[int, int] = (2, 3), rate: float) -> None:
        self.given = (video, audio, gate, size, rate)


class Whole:
    """A thing without wiring."""

    def __init__(self, *, depth: int = 2) -> None:
        self.depth = depth


@pytest.fixture
def gadgets():
    registry = Registry("gadget", group="model/gadget", doc="test things")
    registry.register("gadget")(Gadget)
    registry.register("whole")(Whole)
    yield registry
    del REGISTRIES["gadget"]


def test_is_a_mapping_in_alphabetical_order(gadgets):
    gadgets.register("a")(Gadget)
    assert list(gadgets) == ["a", "gadget", "whole"]
    assert len(gadgets) == 3
    assert gadgets["gadget"] is Gadget
    assert "gadget" in gadgets
    assert "gizmo" not in gadgets


def test_a_registered_component_is_still_itself(gadgets):
    assert gadgets.register("same")(Gadget) is Gadget


def test_duplicates_raise_with_the_list(gadgets):
    with pytest.raises(DuplicateNameError, match=r"gadget 'gadget' is already .*Gadget; registered are gadget, whole"):
        gadgets.register("gadget")(Whole)
    assert gadgets["gadget"] is Gadget
    with pytest.raises(DuplicateNameError, match="a registry called 'gadget' exists"):
        Registry("gadget", group="x", doc="")


def test_a_cell_run_again_replaces_its_class(gadgets):
    again = type("Gadget", (), {"__module__": Gadget.__module__})
    gadgets.register("gadget")(again)
    assert gadgets["gadget"] is again


def test_unknown_names_raise_with_hint_and_list(gadgets):
    with pytest.raises(UnknownNameError, match=r"^no gadget is called 'gadgt'\. Did you mean 'gadget'\?") as caught:
        gadgets["gadgt"]
    assert str(caught.value).endswith("Registered: gadget, whole")
    assert isinstance(caught.value, OviError)
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownNameError) as caught:
        gadgets["zzzz"]
    assert "Did you mean" not in str(caught.value)


def test_positional_is_wiring_and_keyword_only_is_a_knob(gadgets):
    assert gadgets.wiring("gadget") == ["video", "audio"]
    assert list(map(str, gadgets.knobs("gadget").values())) == ["gate=False", "size=(2, 3)", "rate"]
    assert gadgets.knobs("gadget")["rate"].required
    assert gadgets.knobs("gadget")["gate"].annotation == "bool"
    assert gadgets.wiring("whole") == []
    assert gadgets.summary("gadget") == "A thing to register."


def test_functions_have_wiring_and_knobs_too(gadgets):
    @gadgets.register("function")
    def function(sigma, *, shift: float = 1.0):
        """Shift."""

    assert gadgets.wiring("function") == ["sigma"]
    assert gadgets.node("function")["shift"] == 1.0


def test_node_is_partial_exactly_with_wiring_and_lists_tuples(gadgets):
    assert gadgets.node("gadget") == {
        "_target_": f"{__name__}.Gadget",
        "_partial_": True,
        "gate": False,
        "size": [2, 3],
        "rate": "???",
    }
    assert gadgets.node("whole") == {"_target_": f"{__name__}.Whole", "depth": 2}


def test_spec_and_build_are_inverse(gadgets):
    node = {**gadgets.node("gadget"), "rate": 5.0}
    spec = gadgets.spec(node)
    assert spec == {"name": "gadget", "knobs": {"gate": False, "size": [2, 3], "rate": 5.0}}
    assert gadgets.build(spec, "v", "a").given == ("v", "a", False, [2, 3], 5.0)
    assert gadgets.build({"name": "whole"}).depth == 2


def test_build_refuses_what_is_unknown(gadgets):
    with pytest.raises(UnknownNameError, match="gadget 'whole' has no knob dpeth; it has depth"):
        gadgets.build({"name": "whole", "knobs": {"dpeth": 3}})
    with pytest.raises(UnknownNameError, match=r"no gadget is called 'hole'\. Did you mean 'whole'"):
        gadgets.build({"name": "hole"})
    with pytest.raises(UnknownNameError, match=r"'collections\.OrderedDict' is not a registered gadget"):
        gadgets.spec({"_target_": "collections.OrderedDict"})


def test_temporary_entries_leave_even_after_an_error(gadgets):
    def use_it():
        with gadgets.temporary("new", Gadget):
            gadgets["new"](1, 2)  # rate is missing

    with pytest.raises(TypeError, match="rate"):
        use_it()
    assert "new" not in gadgets
    with gadgets.temporary("new", Gadget):
        assert gadgets["new"] is Gadget


def test_the_parts_that_researchers_swap_are_there():
    assert {"fusion", "tower", "rope_alignment", "guidance", "sampler", "video_codec", "text_encoder"} <= set(
        REGISTRIES
    )
    assert {"none", "ovi"} <= set(REGISTRIES["fusion"])


def test_groups_are_distinct():
    groups = [registry.group for registry in REGISTRIES.values()]
    assert len(set(groups)) == len(groups)


def test_every_registration_is_found():
    """The search over sources finds exactly the modules whose components are registered."""
    registered = {REGISTRIES[r.name][n].__module__ for r, n in ENTRIES}
    assert registered <= set(component_modules())


@entries
def test_composes_to_its_node_and_resolves_to_itself(registry, name):
    store_components()
    key = registry.group.replace("/", ".")
    with initialize_config_module("hydra.conf", version_base="1.3"):  # any folder without a config of ours
        config = compose(overrides=[f"+{registry.group}={name}"])
    node = OmegaConf.select(config, key)
    assert OmegaConf.to_container(node) == registry.node(name)
    assert get_object(node._target_) is registry[name]
    assert registry.spec(OmegaConf.to_container(node))["name"] == name

    if registry.wiring(name):
        required = [knob.name for knob in registry.knobs(name).values() if knob.required]
        made = instantiate(node, **dict.fromkeys(required, 1))
        assert isinstance(made, functools.partial)
        assert made.func is registry[name]
        assert set(made.keywords) == set(registry.knobs(name))
        inspect.signature(made.func).bind(*registry.wiring(name), **made.keywords)
    elif not OmegaConf.missing_keys(node):
        try:
            made = instantiate(node, _convert_="all")
        except InstantiationException as error:
            if isinstance(error.__cause__, OviError):
                pytest.skip(f"an optional package is not installed: {error.__cause__}")
            raise
        assert not inspect.isclass(registry[name]) or type(made) is registry[name]


@entries
def test_the_store_holds_it_once_and_no_yaml_shadows_it(registry, name):
    """Hydra would silently merge a yaml file of the same name with the registered node."""
    store_components()
    assert f"{name}.yaml" in ConfigStore.instance().list(registry.group)
    for ending in ("yaml", "yml"):
        assert not (Path(ovi.__file__).parent / "conf" / registry.group / f"{name}.{ending}").exists()


@entries
def test_is_described_in_full(registry, name):
    assert registry.summary(name).endswith("."), "the docstring's first line is one sentence"
    described = argument_docs(registry[name])
    undescribed = [knob for knob in registry.knobs(name) if not described.get(knob)]
    assert not undescribed, f"{registry.name}={name}: no Args text for {', '.join(undescribed)}"


@entries
def test_knobs_can_be_written_in_yaml(registry, name):
    defaults = registry.node(name)
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(defaults)))) == defaults
