"""CUDA devices without a GPU: whatever is done on them is done on the CPU, but in streams, and with memory of their own.

Importing :mod:`simulated_cuda.patches` before torch makes a torch that was built for the CPU believe that it has devices.
Each stream is a thread (device.cpp), and:

- copies, fills and events are done in the order of their streams, later than the host goes on. A copy to pinned memory takes
  as long as ``SIMULATED_CUDA_DELAY`` says (microseconds). All else is done by the CPU's kernels, when the current streams
  have come to it, while the host waits.
- memory that is freed is overwritten at once, in the order of the stream that it was made on.
- random numbers, pinned memory, GradScaler, DDP, FSDP and FSDP2 work; NCCL is gloo that takes tensors of devices alone.

So a missing wait, a tensor on the wrong device, or memory that goes too early shows. How fast a GPU is does not.

It needs a compiler, a torch without CUDA of its own (PyPI's has it, on a machine without a GPU too), and what torch calls
its backends' interfaces, which may change: ``test_simulated_cuda.py`` skips without the first two, and says what is missing
of the last.
"""
