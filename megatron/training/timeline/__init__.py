"""A picture of one training step: what every rank did when, below what its schedule planned (`--timeline`)."""

from __future__ import annotations
