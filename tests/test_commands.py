"""The command line: what it answers, how fast, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from importlib.resources import files

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from torch._utils import ExceptionWrapper

from ovi.commands import components
from ovi.commands import main as main_module
from ovi.commands.hydra_app import run
from ovi.commands.list import argument_docs
from ovi.commands.list import main as list_main
from ovi.errors import OviError
from ovi.registry import REGISTRIES, Registry


class Gadget:
    """A gadget over [B, C] that is no markup.

    Longer words about it.

    Args:
        video: what it is wired to.
        gate: whether a gate is learnt; a text long enough that it has to go over
            two lines.
        size: rows and columns.

    Raises:
        OviError: for a negative size.
    """

    def __init__(self, video, *, gate: bool = False, size: tuple[int, int] = (2, 3)) -> None:
        if size[0] < 0:
            raise OviError(f"gadget: size must be positive, got {list(size)}: set model.gadget.size")
        if size[0] == 0:
            raise ZeroDivisionError("a bug")


@pytest.fixture
def gadgets():
    registry = Registry("gadget", group="model/gadget", doc="test things")
    registry.register("small")(Gadget)
    registry.register("large")(Gadget)
    yield registry
    del REGISTRIES["gadget"]


@pytest.fixture
def app(gadgets, tmp_path, monkeypatch):
    """Runs a small Hydra app made of a config folder and a task; returns what the task's calls returned."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "app.yaml").write_text(
        "defaults:\n  - model/gadget: small\n  - experiment: null\n  - _self_\n"
        "  - override hydra/job_logging: disabled\n  - override hydra/hydra_logging: disabled\n"
        'steps: 3\nseed: 1\ndata: {path: "???"}\n'
        f"hydra:\n  run: {{dir: {tmp_path}/run}}\n  sweep: {{dir: {tmp_path}/sweep}}\n"
    )
    (folder / "experiment" / "typo.yaml").write_text("# @package _global_\nmodel: {gadget: {gaet: true}}\n")
    monkeypatch.setattr(sys, "argv", ["ovi", "app", "as typed"])
    monkeypatch.setattr(components, "component_modules", lambda of=None: [])  # our own are of no use here
    for key in ("OVI_TRACEBACK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(key, raising=False)

    def call(task, *argv):
        results = []
        run("app", lambda config: results.append(task(config)), ["--config-dir", str(folder), *argv])
        return results

    return call


@pytest.fixture
def fails(app, capsys):
    """Runs the app and returns its one message."""

    def call(*argv, task=lambda config: None, code=1):
        with pytest.raises(SystemExit) as stop:
            app(task, *argv)
        assert stop.value.code == code
        err = capsys.readouterr().err
        assert err.startswith("ovi: "), err
        assert "Traceback" not in err
        assert err.count("ovi: ") == 1
        return err.removeprefix("ovi: ").removesuffix("\n")

    return call


def build(config):
    return instantiate(config.model.gadget)("video")


def ovi(*argv, **env):
    return subprocess.run(
        [sys.executable, "-c", "from ovi.commands.main import main; main()", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


class TestMain:
    def test_help_is_quick_and_light(self):
        code = (
            "import sys; from ovi.commands.main import main; main(['--help']);"
            "print({m.split('.')[0] for m in sys.modules} & "
            "{'torch', 'hydra', 'omegaconf', 'lightning', 'numpy', 'rich', 'diffusers', 'transformers'})"
        )
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert time.perf_counter() - start < 3  # a tenth of that, on a machine with nothing else to do
        *text, heavy = done.stdout.splitlines()
        assert heavy == "set()"
        for name, command in main_module.COMMANDS.items():
            assert any(line.split() == [name, *command.help.split()] for line in text)

    def test_no_argument_is_help(self, capsys):
        main_module.main([])
        assert capsys.readouterr().out == main_module.usage() + "\n"

    def test_version(self, capsys):
        main_module.main(["--version"])
        assert capsys.readouterr().out.split() == ["ovi", main_module._version()]

    def test_unknown_command(self):
        done = ovi("trian")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "ovi: no command 'trian'. Did you mean 'train'? "
            "Commands: train, sweep, encode, data, sample, evaluate, report, compare, convert, demo, list\n"
        )

    def test_dispatch_imports_only_the_module_asked_for(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "asked.py").write_text("def main(argv): print('got', argv)")
        monkeypatch.syspath_prepend(tmp_path)
        commands = {name: main_module.Command(name, "") for name in ("asked", "absent")}
        monkeypatch.setattr(main_module, "COMMANDS", commands)
        main_module.main(["asked", "a=1", "--help"])
        assert capsys.readouterr().out == "got ['a=1', '--help']\n"


class TestList:
    def test_all(self):
        done = ovi("list")
        assert done.returncode == 0, done.stderr
        assert "fusion: " in done.stdout
        assert "(model/fusion=NAME)" in done.stdout
        assert "…" not in done.stdout, "nothing is cut"
        assert max(map(len, done.stdout.splitlines())) <= 120

    def test_one_registry(self, gadgets, capsys):
        list_main(["gadget"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "gadget: test things   (model/gadget=NAME)"
        assert lines[1].split("   ")[0].split() == ["large"]
        for line in lines[1:3]:
            assert "A gadget over [B, C] that is no markup." in line
            assert "gate=False, size=(2, 3)" in line

    def test_long_texts_wrap_and_lose_nothing(self, gadgets, capsys):
        def wordy(*, first: str = "x" * 70, second: str = "y" * 200):
            """Some words about the whole of it."""

        gadgets.register("wordy")(wordy)
        list_main(["gadget"])
        out = capsys.readouterr().out
        assert out.count("x") >= 70
        assert out.count("y") >= 200

    def test_one_entry(self, gadgets, capsys):
        list_main(["gadget=small"])
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == f"gadget=small   {__name__}.Gadget"
        text = " ".join(" ".join(lines).split())
        for part in (
            "Longer words about it.",
            "Raises: OviError: for a negative size.",
            "wiring, given by the code video what it is wired to.",
            "gate: bool = False whether a gate is learnt; a text long enough that it has to go over two lines.",
            "size: tuple[int, int] = (2, 3) rows and columns.",
            "model/gadget=small model.gadget.gate=... model.gadget.size=...",
        ):
            assert part in text
        assert "Args:" not in text

    def test_json(self, gadgets, capsys):
        list_main(["--json"])
        everything = json.loads(capsys.readouterr().out)
        assert set(everything) == set(REGISTRIES)
        list_main(["gadget", "--json"])
        assert json.loads(capsys.readouterr().out) == everything["gadget"]
        list_main(["--json", "gadget=small"])
        entry = json.loads(capsys.readouterr().out)
        assert entry == everything["gadget"]["entries"]["small"]
        assert entry["wiring"] == {"video": "what it is wired to."}
        assert entry["override"] == "model/gadget=small"
        assert entry["target"] == f"{__name__}.Gadget"
        assert entry["knobs"]["size"] == {
            "default": [2, 3],
            "required": False,
            "annotation": "tuple[int, int]",
            "doc": "rows and columns.",
        }

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("gadgte", "no registry is called 'gadgte'. Did you mean 'gadget'? There are: "),
            ("gadget=smal", "no gadget is called 'smal'. Did you mean 'small'? Registered: large, small"),
            ("gadget=", "no gadget is called ''. Registered: large, small"),
        ],
    )
    def test_unknown_names(self, gadgets, capsys, what, message):
        for argv in ([what], [what, "--json"]):
            with pytest.raises(SystemExit) as stop:
                main_module.main(["list", *argv])
            assert stop.value.code == 1
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(f"ovi: {message}")
            assert err.count("\n") == 1

    def test_args_of_an_init_count_too(self):
        class Late:
            """Words."""

            def __init__(self, *, a=1, b=2):
                """Make it.

                Args:
                    a: first
                        and more: even this.
                    b (int): second.

                Returns:
                    c: no argument.
                """

        assert argument_docs(Late) == {"a": "first and more: even this.", "b": "second."}


class TestHydraApp:
    def test_composes_components_and_leaves_the_folder_alone(self, app, tmp_path):
        def task(config):
            return dict(config.model.gadget), os.getcwd(), sys.argv, HydraConfig.get().job.name

        (result,) = app(task, "model/gadget=large", "model.gadget.gate=true", "steps=5")
        node, cwd, argv, name = result
        assert node == {"_target_": f"{__name__}.Gadget", "_partial_": True, "gate": True, "size": [2, 3]}
        assert cwd == os.getcwd()
        assert argv == ["ovi", "app", "as typed"], "Lightning starts more processes with this"
        assert name == __name__.split(".")[-1]
        assert (tmp_path / "run" / ".hydra" / "config.yaml").exists()
        assert sys.argv == ["ovi", "app", "as typed"]
        assert not {"OVI_TRACEBACK", "HYDRA_FULL_ERROR"} & set(os.environ)

    def test_packaged_configs_are_a_package(self):
        assert files("ovi.conf").joinpath("__init__.py").is_file()

    def test_misspelt_knob(self, fails):
        message = fails("model.gadget.gaet=1")
        assert message == (
            "no setting 'model.gadget.gaet'. Did you mean 'gate'? model.gadget has: gate=False, size={...}"
        )

    def test_misspelt_top_level_key(self, fails):
        message = fails("stpes=1")
        assert message.startswith("no setting 'stpes'. Did you mean 'steps'? The config has: ")
        assert "hydra" not in message

    @pytest.mark.parametrize("argv", ["+model.gadget.gaet=1", "++model.gadget.gaet=1", "experiment=typo"])
    def test_misspelt_knob_that_hydra_lets_pass(self, fails, argv):
        assert fails(argv) == (
            "model.gadget.gaet: gadget 'small' has no knob 'gaet'. Did you mean 'gate'? "
            "Its knobs: gate=False, size=(2, 3)"
        )

    def test_wiring_is_no_knob(self, fails):
        assert fails("+model.gadget.video=1").startswith("model.gadget.video is not a knob")

    def test_unknown_component(self, fails):
        message = fails("model/gadget=smal")
        assert message.startswith("no model/gadget is called 'smal'. Did you mean 'small'? There are: large, small")

    @pytest.mark.parametrize("plus", ["", "+"])
    def test_unknown_group(self, fails, plus):
        message = fails(f"{plus}model/gadgte=small")
        assert message == "no config group 'model/gadgte'. Did you mean 'model/gadget'? `ovi list` shows them"

    def test_malformed_yaml(self, fails, tmp_path):
        (tmp_path / "conf" / "experiment" / "broken.yaml").write_text("a: {b: ???}\n")
        message = fails("experiment=broken")
        assert "broken.yaml" in message
        assert "line 1" in message

    def test_malformed_override(self, fails):
        assert "steps=[1" in fails("steps=[1")

    def test_value_that_nobody_set(self, fails):
        message = fails(task=lambda config: config.data.path)
        assert message == "data.path has no value yet: set it, as in data.path=VALUE"

    def test_config_folder_that_is_not_there(self, fails):
        assert "nowhere" in fails("--config-dir", "nowhere")

    def test_bad_input_inside_the_task(self, fails):
        def task(config):
            raise OviError("no clips in x/: give data.path a folder with mp4 files")

        assert fails(task=task) == "no clips in x/: give data.path a folder with mp4 files"

    def test_bad_input_behind_an_instantiation(self, fails):
        def task(config):
            instantiate(config.model.gadget, "video", _partial_=False)

        assert fails("model.gadget.size=[-1,1]", task=task) == (
            "gadget: size must be positive, got [-1, 1]: set model.gadget.size"
        )

    def test_instantiation_that_fails_otherwise_says_where_to_look(self, fails):
        message = fails("model.gadget.size=[0,1]", task=lambda c: instantiate(c.model.gadget, "v", _partial_=False))
        assert "a bug" in message
        assert "OVI_TRACEBACK=1" in message

    def test_bad_input_from_a_loader_worker(self, fails):
        def task(config):
            try:
                raise OviError("shard 3 is damaged:\nencode it again")
            except OviError:
                wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
            wrapped.reraise()

        assert fails(task=task) == "shard 3 is damaged:\nencode it again"

    def test_full_disk(self, fails):
        def task(config):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.ckpt")

        message = fails(task=task)
        assert "runs/a.ckpt" in message
        assert "No space left on device" in message

    def test_bugs_keep_their_traceback(self, app):
        def task(config):
            return 1 / 0

        with pytest.raises(ZeroDivisionError):
            app(task)

    @pytest.mark.parametrize("key", ["OVI_TRACEBACK", "HYDRA_FULL_ERROR"])
    def test_traceback_on_demand(self, app, monkeypatch, key):
        monkeypatch.setenv(key, "1")
        with pytest.raises(OviError):
            app(build, "model.gadget.gaet=1")
        assert os.environ[key] == "1"

    def test_interrupt(self, fails):
        def task(config):
            raise KeyboardInterrupt

        assert fails(task=task, code=130) == "interrupted"

    def test_interrupt_that_lightning_turned_into_an_exit(self, fails):
        def task(config):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)

        assert fails(task=task, code=130) == "interrupted"

    def test_exit_codes_of_the_task_pass(self, app):
        with pytest.raises(SystemExit) as stop:
            app(lambda config: sys.exit(7))
        assert stop.value.code == 7

    def test_multirun(self, app, tmp_path):
        assert app(lambda config: (config.seed, config.steps), "-m", "seed=1,2", "steps=5") == [(1, 5), (2, 5)]
        assert (tmp_path / "sweep" / "1" / ".hydra").is_dir()

    def test_multirun_that_fails(self, app, capsys):
        def task(config):
            if config.seed == 2:
                raise OviError("seed 2 is no good")

        with pytest.raises(SystemExit) as stop:
            app(task, "-m", "seed=1,2")
        assert stop.value.code == 1
        err = capsys.readouterr().err
        assert err.endswith("ovi: seed 2 is no good\n")
        assert "Traceback" not in err
        assert "seed=2" in err, "which of the jobs"


class TestPlugins:
    @pytest.fixture
    def install(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)

        def call(module, source):
            (tmp_path / f"{module}.py").write_text(source)
            plugin = EntryPoint(name="mine", value=module, group=components.PLUGINS)
            monkeypatch.setattr(components, "entry_points", lambda group: [plugin] if group == plugin.group else [])

        return call

    def test_registers(self, gadgets, install):
        install(
            "ovi_plugin_good",
            "from ovi.registry import REGISTRIES\n@REGISTRIES['gadget'].register('plugged')\n"
            "def plugged(*, a=1):\n    'Words.'\n",
        )
        components.load_components()
        assert gadgets["plugged"].__module__ == "ovi_plugin_good"

    @pytest.mark.parametrize("source", ["import not_there_at_all", "raise SyntaxError('x')", "1 / 0"])
    def test_that_fails_is_named(self, install, source):
        install("ovi_plugin_bad", source)
        sys.modules.pop("ovi_plugin_bad", None)
        with pytest.raises(OviError, match=r"the plug-in 'mine' cannot be imported from 'ovi_plugin_bad' \(\w+: "):
            components.load_components()
