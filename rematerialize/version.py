"""The package's version, stated once: packaging and ``rematerialize --version`` read it here."""

__version__ = "0.1.0"
