"""A module that imports what there is not, though its package is installed."""

from gymnasium import nothing  # noqa: F401
