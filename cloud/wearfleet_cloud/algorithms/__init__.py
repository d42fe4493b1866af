"""Algorithms for models that survive new people, positions, devices and days; one paper a file."""
