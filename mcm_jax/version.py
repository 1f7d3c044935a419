"""The version, for code, records and setup.py."""

__version__ = "0.1.0"
