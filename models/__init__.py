"""Models to compile, measure and test with; each gives build(), example_inputs(), evaluate()."""

if __name__ != "bincompile.models":
    raise ImportError(f"import bincompile.models, not {__name__}")

NAMES = ("digits", "minilm", "bert", "audio_stream", "action_stream")
