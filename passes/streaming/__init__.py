"""Streaming: a model becomes a program for one token, with what it remembers as tensors."""
