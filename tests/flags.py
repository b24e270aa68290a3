"""What the compiler is told in `XLA_FLAGS`, which each process reads once."""

_SHARED = (
    # Until JAX 0.10: machine code is made in half the time, by the emitters before the
    # default ones. Later compilers have only one kind, and take no notice.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # Each program in one piece: the tests themselves run side by side.
    "--xla_cpu_parallel_codegen_split_count=1",
)
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
"""Of child processes, what `quick.jit` is in this one."""


def flags(devices: int, *more: str) -> str:
    """For a process with so many virtual devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return " ".join((count, *_SHARED, *more))
