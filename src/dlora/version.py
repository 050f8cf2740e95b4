"""The version of dlora, which runs, logs and adapters name."""

__version__ = "0.1.0"
