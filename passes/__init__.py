"""Passes: from a model to a lowered program."""

if __name__ != "bincompile.passes":
    raise ImportError(f"import bincompile.passes, not {__name__}")
