"""A machine in NumPy that runs the project's GPU kernels on a CPU, in the PTX that their compilers emit.

program.py reads PTX; arithmetic.py and instructions.py have what each opcode does; machine.py runs a cluster of thread
blocks; memory.py, races.py and barriers.py are its memories and synchronization, and check them. launch.py runs all
clusters of a grid; triton.py and cuda.py put the machine in the place of a device.

docs/ptx.md says what it proves and what it cannot.
"""
