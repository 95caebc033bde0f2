"""What the scripts share: a user's mistake ends in one line and exit code 2, never in a traceback.

Config overrides (`--config.optim.learning_rate=1e-3`) are looked at before absl sees them, because its own words for a
wrong one are a usage page or a bare KeyError.
"""

import ast
import dataclasses
import functools
import re
import runpy
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from clip_jax.checked import build, leaves, type_name
from clip_jax.config import Config
from clip_jax.errors import UserError, nearest


def run(main: Callable[[], None]) -> None:
    """Parses the command line, calls `main`, and exits: 0 done, 2 the user's mistake, anything else our bug."""
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        print(sys.modules[main.__module__].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
        nones = check_config_flags(sys.argv[1:])
        sys.argv = _without(sys.argv, [f"config.{path}" for path in nones])  # config_flags reads it again
        _parse(sys.argv)
        for path in nones:
            *parents, name = path.split(".")
            setattr(functools.reduce(getattr, parents, flags.FLAGS["config"].value), name, None)
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(argv: list[str]) -> None:
    try:
        extra = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise UserError(f"{error} (--help lists the flags)") from error
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; flags are written --name=value (--help lists them)")


def require(*names: str) -> None:
    """Raises UserError when one of the flags was not given."""
    for name in names:
        if flags.FLAGS[name].value in (None, []):
            raise UserError(f"--{name} is missing (--help lists the flags)")


def checked(config: Any) -> Config:
    """Returns the config made anew, with every rule checked: flags set fields past their `__post_init__`."""
    return build(Config, dataclasses.asdict(config))


def _without(argv: list[str], names: list[str]) -> list[str]:
    """Returns the arguments without some flags."""
    kept, arguments = [], iter(argv)
    for arg in arguments:
        name, equals, _ = arg.partition("=")
        if name.lstrip("-") not in names or not arg.startswith("-"):
            kept.append(arg)
        elif not equals:
            next(arguments, None)
    return kept


def check_config_flags(args: list[str]) -> list[str]:
    """Returns the fields that are set to None; refuses a config file that is none, and a wrong override."""
    given, nones = dict(_pairs(args)), []
    if "config" not in given:
        return nones
    config = load_config(Path(given["config"]))
    fields = {path: hint for path, hint, _ in leaves(config)}
    for name, text in given.items():
        if not name.startswith("config."):
            continue
        path = name.removeprefix("config.")
        if path not in fields:
            raise UserError(f"--{name}: no such field{nearest(path, fields)}")
        if not _readable(text, fields[path]):
            raise UserError(f"--{name}={text}: should be {type_name(fields[path])}")
        if text.lower() == "none" and type(None) in typing.get_args(fields[path]):
            nones.append(path)  # absl has no word for None: it would take the text, or refuse it
    return nones


def _pairs(args: list[str]):
    """Yields (name, value) of `--name=value` and `--name value`."""
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            name, equals, value = arg.lstrip("-").partition("=")
            yield name, value if equals else (args[i + 1] if i + 1 < len(args) else "")


def load_config(path: Path) -> Config:
    """Returns what a config file's `get_config` returns."""
    if not path.is_file():
        there = {
            str(file) for folder in (Path("configs"), path.parent) for file in folder.glob("*.py") if folder != Path()
        }
        raise UserError(f"no config file {str(path)!r}{nearest(str(path), there) if there else ''}")
    try:
        config = runpy.run_path(str(path)).get("get_config", lambda: None)()
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"{path}: {_explained(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path} should have a function get_config() that returns a clip_jax.config.Config")
    return config


def _explained(error: Exception) -> str:
    """Returns what a config file did wrong, in one line; a field that does not exist with the nearest that does."""
    if isinstance(error, UserError):
        return str(error)
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        fields = [path.rpartition(".")[2] for path, _, _ in leaves(Config())]
        return f"no such field {unknown[1]!r}{nearest(unknown[1], fields)}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _readable(text: str, hint: Any) -> bool:
    """Returns whether a flag's text is a value of the type."""
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return False
        return isinstance(values, tuple) and len(values) == len(kinds) and all(map(_readable, map(str, values), kinds))
    if kinds := typing.get_args(hint):  # `X | None`
        return text.lower() == "none" or _readable(text, kinds[0])
    if hint is bool:
        return text.lower() in ("true", "false", "0", "1")
    try:
        hint(text)
    except ValueError:
        return False
    return True
