"""The first hour on a GPU: one model checked and timed, step by step (docs/gpu.md)."""
