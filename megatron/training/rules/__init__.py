"""What a program's settings derive and refuse. One function a rule, in the order of `RULES`.

A rule reads and sets arguments and touches nothing else: no process group, device or file exists yet. Its
docstring is its reason; where this program departs from the public rule, it says how.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable

from megatron.training.capabilities import refuse_capabilities_not_built
from megatron.training.config.flags import in_terms_of_flags
from megatron.training.rules.batch import BATCH_RULES, TRAINING_LENGTH_RULES
from megatron.training.rules.checkpoint import CHECKPOINT_EXPORT_RULES, CHECKPOINT_RULES, CHECKPOINT_SOURCE_RULES
from megatron.training.rules.data import DATA_RULES
from megatron.training.rules.family import FAMILY_RULES
from megatron.training.rules.hybrid import HYBRID_RULES
from megatron.training.rules.layout import LAYOUT_RULES
from megatron.training.rules.model import MODEL_RULES
from megatron.training.rules.nearest import suggestions, variant
from megatron.training.rules.objects import require_valid_library_configs
from megatron.training.rules.pipeline import PIPELINE_CHUNK_RULES
from megatron.training.rules.precision import PRECISION_RULES
from megatron.training.rules.replaced import REPLACED_RULES
from megatron.training.rules.runtime import RUNTIME_RULES
from megatron.training.rules.schedule import SCHEDULE_RULES
from megatron.training.rules.sharding import SHARDING_RULES
from megatron.training.settings import ConfigurationError, Settings, Source

Rule = Callable[[argparse.Namespace], None]

RULES: tuple[Rule, ...] = (
    *REPLACED_RULES,
    refuse_capabilities_not_built,
    *FAMILY_RULES,
    *CHECKPOINT_SOURCE_RULES,
    *CHECKPOINT_RULES,
    *LAYOUT_RULES,
    *DATA_RULES,
    *BATCH_RULES,
    *PIPELINE_CHUNK_RULES,
    *SHARDING_RULES,
    *PRECISION_RULES,
    *TRAINING_LENGTH_RULES,
    *MODEL_RULES,
    *HYBRID_RULES,
    *SCHEDULE_RULES,
    *RUNTIME_RULES,
    *CHECKPOINT_EXPORT_RULES,
    require_valid_library_configs,
)


def apply_rules(args: argparse.Namespace, rules: Iterable[Rule] = RULES) -> None:
    """Run `rules` in order; `Settings` note which rule made which value.

    Raises:
        ConfigurationError: a rule refuses; the message speaks of flags, not of fields. Where other parallel sizes
            would have passed all `rules`, it names the nearest ones.
    """
    rules = tuple(rules)
    as_given = variant(args, {})
    for rule in rules:
        before = dict(vars(args))
        try:
            _apply(rule, args)
        except ConfigurationError as error:
            advice = suggestions(as_given, lambda other: passes(other, rules)) if rules == RULES else ""
            raise ConfigurationError("\n".join(filter(None, (str(error), advice)))) from error
        if isinstance(args, Settings):
            args.note_changes(before, Source("rule", rule.__name__))


def passes(args: argparse.Namespace, rules: Iterable[Rule] = RULES) -> bool:
    """Whether no rule refuses `args`, which are changed by those that derive something."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for rule in rules:
                _apply(rule, args)
    except ConfigurationError:
        return False
    return True


def _apply(rule: Rule, args: argparse.Namespace) -> None:
    try:
        rule(args)
    except ConfigurationError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ConfigurationError(in_terms_of_flags(str(error))) from error
