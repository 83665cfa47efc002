"""Forms of the kernels for CUDA, in Triton. Nothing here is imported before the first call on a CUDA tensor.

Each module has a function `run` with the arguments of the readable form, a `torch.library.custom_op` with its
gradient and its shapes, so that `torch.compile` takes it as it is. Inputs may be narrow; states are at least float32.

What has many steps is cut into tiles of steps, and within a tile the recurrence is an associative scan. Pieces of
time that go on from each other, where streams and channels alone leave most of the machine idle, take three passes:
what each piece does to a state, the states before each piece, and then all of it again from there.
"""
