"""A family of models elsewhere: which settings and which parameters are whose, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .weights import ModelShape, Weight

Settings = dict[str, Any]
"""Our settings, under the names of the programs' flags."""


class NotExpressible(ValueError):
    """A model has something that the other side's classes of models do not."""


@dataclass(frozen=True)
class Family:
    """One kind of model of the `transformers` package, and the same model here.

    A family is data: to add one, write a module in `megatron.core.export.families` that makes one, and list it in
    that package's `FAMILIES`. `--load hf:DIR`, `--save-hf`, `tools/checkpoint/convert.py` and
    `tools/checkpoint/inspect.py` then know it.
    """

    model_type: str
    """`model_type` of its config.json."""
    architecture: str
    """Class that is named in a config.json that we write."""
    our_type: str
    """The program that trains it: gpt, bert, t5 or mamba."""
    weights: Callable[[ModelShape], Iterable[Weight]]
    """The key map."""
    fixed: Mapping[str, Any]
    """Our settings that all models of the family have."""
    renamed: Mapping[str, str]
    """Our setting -> their key, of the same value."""
    expected: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Their key -> the values of it that our model computes; we write the first, and it is what a missing key means."""
    read: Callable[[Mapping[str, Any]], Settings] = lambda config: {}
    """Further settings of ours, from config.json; raises `NotExpressible`."""
    write: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda settings: {}
    """Further keys of config.json, from our settings; raises `NotExpressible`."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Our setting -> their key, where a run may well have another value (lengths, dropout)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Their key -> what it means that it is missing."""
    root: str = ""
    """Prefix that tensors lose where the model was saved without its head."""
    optional: tuple[str, ...] = ()
    """Beginnings of our names that a model without heads lacks; such parameters keep their initial values."""

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Our settings of the model that a config.json describes: those that must be so.

        Raises:
            NotExpressible: the model computes something that ours does not, or config.json lacks a size.
        """
        problems = [
            f"{key} is {config[key]!r}, only {' or '.join(map(repr, values))} can be computed"
            for key, values in self.expected.items()
            if key in config and config[key] not in values
        ]
        known = {**self.defaults, **{k: v for k, v in config.items() if v is not None}}
        problems += [f"{key} is missing" for key in self.renamed.values() if key not in known]
        if problems:
            raise NotExpressible(f"{self.model_type}: {'; '.join(problems)}")
        renamed = {ours: known[theirs] for ours, theirs in self.renamed.items()}
        return {**self.fixed, **renamed, **self.read(config)}

    def suggestions(self, config: Mapping[str, Any]) -> Settings:
        """Our settings that config.json gives a value for, from which a run may differ."""
        return {ours: config[theirs] for ours, theirs in self.hints.items() if config.get(theirs) is not None}

    def misfits(self, settings: Mapping[str, Any]) -> list[str]:
        """Why a model of ours is not of this family; empty if it is."""
        found = [
            f"{name} is {settings.get(name)!r}, not {value!r}"
            for name, value in self.fixed.items()
            if not same_value(settings.get(name), value)
        ]
        try:
            self.write(settings)
        except NotExpressible as error:
            found.append(str(error))
        return found

    def config(self, settings: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """config.json of a model of ours.

        Raises:
            NotExpressible: it is not of this family.
        """
        misfits = self.misfits(settings)
        if misfits:
            raise NotExpressible(f"this is no {self.model_type} model: {'; '.join(misfits)}")
        names = {**self.hints, **self.renamed}
        known = {theirs: settings[ours] for ours, theirs in names.items() if settings.get(ours) is not None}
        known = {key: value for key, value in known.items() if not isinstance(value, list)}  # what has one value there
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            **{key: values[0] for key, values in self.expected.items()},
            **known,
            **self.write(settings),
        }


def same_value(found: Any, wanted: Any) -> bool:
    """Whether two settings are the same; what is off is the same as what is not there."""
    if wanted in (None, False):
        return not found
    if isinstance(wanted, (list, tuple)):
        return isinstance(found, (list, tuple)) and list(found) == list(wanted)
    return bool(found == wanted)


def require(condition: object, message: str) -> None:
    """Raise `NotExpressible` unless `condition` holds."""
    if not condition:
        raise NotExpressible(message)
