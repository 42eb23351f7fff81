"""The kernels, one file each; every file here that holds a `Kernel` is found by itself."""
