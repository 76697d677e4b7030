"""Evaluation of a judge: pairs of a benchmark's public files, scored by a server, as a report."""
