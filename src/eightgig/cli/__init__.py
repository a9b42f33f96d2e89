"""The command `eightgig`: parses, calls one function of `app` for each verb, draws. Imports nothing heavy to start."""

from eightgig.cli.entry import main

__all__ = ["main"]
