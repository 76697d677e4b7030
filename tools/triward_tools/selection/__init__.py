"""Selection by scores: the best of N, data without its outliers, preference pairs."""

from triward_tools.selection.best import best_of, best_of_n_curve
from triward_tools.selection.columns import Columns
from triward_tools.selection.files import best_of_n_file, filter_file, pairs_file
from triward_tools.selection.limits import Limits
from triward_tools.selection.pairing import (
    Pair,
    Pairing,
    length_correlation,
    length_slope,
    make_pairs,
)
from triward_tools.selection.rows import best_of_n, filter_rows, pair_rows
from triward_tools.selection.rules import LengthConditioned, Quantile, RobustOutliers, Threshold
from triward_tools.selection.summary import Summary

__all__ = [
    "Columns",
    "LengthConditioned",
    "Limits",
    "Pair",
    "Pairing",
    "Quantile",
    "RobustOutliers",
    "Summary",
    "Threshold",
    "best_of",
    "best_of_n",
    "best_of_n_curve",
    "best_of_n_file",
    "filter_file",
    "filter_rows",
    "length_correlation",
    "length_slope",
    "make_pairs",
    "pair_rows",
    "pairs_file",
]
