"""Trainers' own packages, in the environment that `make trainers` makes, around Triward."""
