"""Measurements, side by side in one run. Ratios count; absolute numbers belong to their machine."""
