"""What is said of validation losses."""

from __future__ import annotations

import math

import pytest

from megatron.training.evaluation import perplexities_of


def test_only_losses_have_a_perplexity() -> None:
    found = perplexities_of({"lm loss": 2.0, "loss": 30.0, "top1_acc": 12.5})
    assert found == {"lm loss": pytest.approx(math.exp(2)), "loss": pytest.approx(math.exp(20))}
