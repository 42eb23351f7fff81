"""What TVM compiles: each file here holds `build(**parameters)`, which gives an IRModule.

A file is part of the name under which its kernels are cached, so nothing here depends on
anything but its own parameters and `common.py`. TVM is imported only when `build` is called.
"""
