"""Marks of single parameters of a test."""

import pytest


def slow(*values):
    """Parameters that `make proofs` tries and `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)
