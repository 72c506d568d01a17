"""Tools for testing attention: inputs from a case, an exact oracle, an error budget."""

from tandem_attn.testing.budget import assert_right, assert_within_budget, exact, low_precision
from tandem_attn.testing.inputs import Case, Inputs, make, run

__all__ = ["Case", "Inputs", "assert_right", "assert_within_budget", "exact", "low_precision", "make", "run"]
