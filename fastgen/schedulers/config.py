"""A scheduler's settings as diffusers keeps them: a read-only mapping, written as scheduler_config.json."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastgen.atomic import atomic_file
from fastgen.errors import UsageError

FILE = "scheduler_config.json"
FORMAT = "0.42.0"  # the version of diffusers whose settings these are
# What from_pretrained takes for the sake of downloads, of which there are none here.
DOWNLOADS = {
    "cache_dir", "force_download", "local_files_only", "output_loading_info", "proxies", "revision", "token",
}  # fmt: skip
Self = TypeVar("Self", bound="Configurable")


class Config(dict):
    """Settings by key and by attribute. Read-only; `Configurable.from_config` makes a scheduler with others."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("config: is read-only; make another scheduler with from_config(config, setting=value)")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return Config, (dict(self),)


def registered(init: Callable[..., None]) -> Callable[..., None]:
    """An __init__ whose arguments are the settings: they become ``self.config`` before it runs.

    The names of those that were left at their defaults are its `_use_default_values`, since another class made from
    that config takes its own. Names that begin with an underscore are dropped, so that ``Class(**config)`` works.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Configurable, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **{k: v for k, v in kwargs.items() if not k.startswith("_")})
        given = set(bound.arguments)
        bound.apply_defaults()
        settings = dict(list(bound.arguments.items())[1:])
        left = [name for name in settings if name not in given]
        self._internal_dict = Config(settings | ({"_use_default_values": left} if left else {}))
        init(*bound.args, **bound.kwargs)

    return wrapper


class Configurable:
    """What is made from a config, and written as one."""

    config_name = FILE
    _internal_dict: Config  # by diffusers' name: pipelines put corrected configs there

    @property
    def config(self) -> Config:
        self._join_diffusers()
        return self._internal_dict

    def register_to_config(self, **settings: Any) -> None:
        """Settings that go before those of the config. Betas are made once; all else counts from the next
        set_timesteps on."""
        self._internal_dict = Config({**self._internal_dict, **settings})

    @classmethod
    @functools.cache
    def settings(cls) -> list[str]:
        """The names of the settings that the class takes."""
        return list(inspect.signature(cls.__init__).parameters)[1:]

    @classmethod
    def _join_diffusers(cls) -> None:
        """Makes the schedulers subclasses of diffusers' SchedulerMixin where that is loaded: it is by their type that
        a pipeline knows what it can save, and lets through. Every method stays ours."""
        loaded = sys.modules.get("diffusers.schedulers.scheduling_utils")
        mixin = getattr(loaded, "SchedulerMixin", None)
        base = next(c for c in cls.__mro__ if Configurable in c.__bases__)
        if mixin is not None and mixin not in base.__bases__:
            base.__bases__ = (*base.__bases__, mixin)

    @classmethod
    def from_config(
        cls: type[Self], config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The scheduler of a config: a dict, diffusers' FrozenDict or a `Config`, of this or of another class.

        kwargs: settings that go before those of the config. As in diffusers, what the class does not take is kept in
        the new config and changes nothing, and what the config's own class had at its default gets the default of
        this one. Returns the scheduler, or with ``return_unused_kwargs`` (scheduler, what was not used).
        Raises UsageError, naming the setting, for a value that is not supported.
        """
        if not isinstance(config, Mapping):
            raise UsageError(
                f"config: must be a mapping such as scheduler.config, not {type(config).__name__}; "
                "from_pretrained reads a folder"
            )
        defaults = {*(config.get("_use_default_values") or ()), "_use_default_values"}
        given = {k: v for k, v in config.items() if k not in defaults}
        chosen = {k: kwargs.pop(k, given.get(k)) for k in cls.settings() if k in kwargs or k in given}
        hidden = {k: v for k, v in given.items() if k not in chosen}
        if kwargs and not return_unused_kwargs:
            warnings.warn(f"{cls.__name__} has no setting {', '.join(kwargs)}: it changes nothing", stacklevel=2)
        scheduler = cls(**chosen)
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        scheduler._internal_dict = Config({**scheduler._internal_dict, **hidden})
        return (scheduler, {**kwargs, **hidden}) if return_unused_kwargs else scheduler

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The scheduler of a scheduler_config.json: the file, its folder, or the ``subfolder`` of a pipeline's folder.

        kwargs as in `from_config`. Raises UsageError where there is none: nothing is downloaded.
        """
        path = Path(pretrained_model_name_or_path)
        places = [path / (subfolder or "") / cls.config_name, path / cls.config_name, path]
        file = next((p for p in places if p.is_file()), None)
        if file is None:
            raise UsageError(
                f"pretrained_model_name_or_path: there is no {places[0]}; "
                "give the folder that holds it (nothing is downloaded)"
            )
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"pretrained_model_name_or_path: {file} is not JSON ({error})") from None
        kwargs = {k: v for k, v in kwargs.items() if k not in DOWNLOADS}
        return cls.from_config(config, return_unused_kwargs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes scheduler_config.json, which diffusers reads too, into a folder that is made if need be; the file is
        there whole or not at all. Raises UsageError for a file in the folder's place."""
        if push_to_hub:
            raise UsageError("push_to_hub: is not supported; save, and upload the folder")
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"save_directory: {folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / self.config_name) as file:
            file.write_text(self.to_json_string(), encoding="utf-8")

    save_config = save_pretrained

    def to_json_string(self) -> str:
        """The config as diffusers writes it."""
        plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in self._internal_dict.items()}
        plain.pop("_use_default_values", None)
        plain = {"_diffusers_version": FORMAT, **plain, "_class_name": type(self).__name__}
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
