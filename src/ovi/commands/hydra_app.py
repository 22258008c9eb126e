"""A command whose settings Hydra composes from ``ovi/conf`` and the registries."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from ovi.commands.components import load_components, store_components
from ovi.commands.failure import exit_clearly, traceback_wanted, user_message
from ovi.commands.hints import did_you_mean
from ovi.commands.knobs import check_knobs, unknown_group
from ovi.errors import OviError

CONFIG_PATH = "pkg://ovi.conf"


def run(config_name: str, task: Callable[[DictConfig], Any], argv: list[str]) -> None:
    """Compose ``conf/<config_name>.yaml`` with the overrides and flags in ``argv``, and run the task on it.

    All of Hydra's command line works: groups, ``--config-dir``, ``--cfg job``, ``-m``. Registered components are in
    their groups. The working directory stays.

    Args:
        config_name: the primary config, without ``.yaml``.
        task: called with the composed config, once per job; Hydra's job name is the last part of its module's name.
        argv: overrides and flags, without the program's and the command's name.

    Raises:
        SystemExit: with code 1 after a message on bad input, 130 on an interrupt. A bug keeps its traceback.
    """
    with exit_clearly():
        load_components()
        store_components()
        app = hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=config_name)(_Task(task, sys.argv))
        with _errors_come_out(), _argv([sys.argv[0], *argv]), hydra_errors_as_ours():
            app()


class _Task:
    """The task as Hydra calls it: picklable, checked, with the command line as the user typed it."""

    def __init__(self, task: Callable[[DictConfig], Any], argv: list[str]) -> None:
        functools.update_wrapper(self, task)
        self.task, self.argv = task, argv

    def __call__(self, config: DictConfig) -> Any:
        # In a sweep the sweeper decides what becomes of a failed job, so there the error travels on.
        single = HydraConfig.get().mode == RunMode.RUN
        # Lightning starts further processes by repeating sys.argv: they need the subcommand's name.
        with exit_clearly() if single else nullcontext(), _argv(self.argv), hydra_errors_as_ours():
            check_knobs(config)
            return self.task(config)


@contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _errors_come_out() -> Iterator[None]:
    """Have Hydra raise instead of printing in its own way; what the user wished stays known to ``traceback_wanted``."""
    before = {key: os.environ.get(key) for key in ("OVI_TRACEBACK", "HYDRA_FULL_ERROR")}
    os.environ["OVI_TRACEBACK"] = "1" if traceback_wanted() else "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def hydra_errors_as_ours() -> Iterator[None]:
    """Errors of Hydra, OmegaConf and YAML are about what the user wrote: re-raise them as ``OviError``, readable."""
    try:
        yield
    except (CompactHydraException, OmegaConfBaseException, YAMLError) as error:
        raise OviError(readable(error)) from error


def readable(error: Exception) -> str | None:
    """What a user should read of an exception, Hydra's in our words; None for a bug."""
    if isinstance(error, CompactHydraException | OmegaConfBaseException | YAMLError):
        return user_message(error) or _readable(error)
    return user_message(error)


def _readable(error: Exception) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(cause)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} has no value yet: set it, as in {cause.full_key}=VALUE"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return (
            f"no {group or 'config'} is called {name!r}.{did_you_mean(name, error.options)} "
            f"There are: {', '.join(error.options)}. --config-dir adds a folder of your own"
        )
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the override {error.override!r}: {error.message}\nA value with spaces, brackets, commas, "
            f"equal signs or quotation marks is quoted twice, as in 'source.path=\"my clips (1)\"'"
        )
    if isinstance(error, InstantiationException):
        return f"{error}\nOVI_TRACEBACK=1 shows where"
    return "\n".join(str(e) for e in (error, error.__cause__) if e is not None and str(e) not in ("", "None"))


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """Message for a key that a config does not have: the key and those it has."""
    parent = error.parent_node
    full_key = error.full_key or str(error.key)
    if "/" in full_key:
        return unknown_group(full_key)
    where = full_key.rpartition(".")[0]
    known = [str(k) for k in parent if not str(k).startswith("_") and (where or k != "hydra")]
    settings = [f"{k}={_value(parent, k)}" for k in known]
    return (
        f"no setting {full_key!r}.{did_you_mean(str(error.key), known)} "
        f"{where or 'The config'} has: {', '.join(settings) or 'none'}"
    )


def _value(parent: DictConfig, key: str) -> str:
    node = parent._get_node(key)
    return "{...}" if OmegaConf.is_config(node) else str(node)
