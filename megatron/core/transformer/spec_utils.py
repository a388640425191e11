"""Modules described by data: which class, which arguments, which parts (design: models are composed by
spec)."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModuleSpec:
    """How to build one module: what is called, with which extra keyword arguments, from which parts."""

    module: tuple[str, str] | Callable[..., Any]
    """A class, a function that returns a module, or where to import one from: `("package.module",
    "Name")`."""
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments known when the spec is written."""
    submodules: Any = None
    """Specs of the parts, handed to the module as `submodules`."""


def import_module(module_path: tuple[str, str]) -> Any:
    """The object `name` of the module `path`, for `module_path = (path, name)`."""
    path, name = module_path
    return getattr(importlib.import_module(path), name)


def get_module(spec_or_module: ModuleSpec | type | Callable[..., Any], **additional_kwargs: Any) -> Any:
    """The class or function that a spec stands for, not called yet."""
    if not isinstance(spec_or_module, ModuleSpec):
        return spec_or_module
    module = spec_or_module.module
    return import_module(module) if isinstance(module, tuple) else module


def build_module(spec_or_module: ModuleSpec | type | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what the spec names with its `params` and the given arguments, and return the module.

    A bare function is not a module class but the finished part itself (such as `get_bias_dropout_add`): it is
    returned as it is.
    """
    if isinstance(spec_or_module, types.FunctionType):
        return spec_or_module
    module = get_module(spec_or_module)
    if isinstance(spec_or_module, ModuleSpec):
        if spec_or_module.submodules is not None:
            kwargs["submodules"] = spec_or_module.submodules
        return module(*args, **spec_or_module.params, **kwargs)
    return module(*args, **kwargs)
