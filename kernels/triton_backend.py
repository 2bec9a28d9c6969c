"""Whether Triton can be imported, and on which devices its kernels run in this process."""

import functools


@functools.cache
def triton_missing() -> str | None:
    """Return why triton cannot be imported, None where it can be; asked only when an op may need it."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not importable ({error})"
    if not hasattr(triton, "knobs"):  # 3.4 has them first
        return f"triton is {triton.__version__}, the kernels need 3.4"
    return None


@functools.cache
def triton_devices() -> tuple[str, ...]:
    """Return "cuda", and "cpu" too where the kernels are interpreted.

    TRITON_INTERPRET=1 counts when triton is first imported: it decides what @triton.jit makes of a kernel.
    """
    import triton

    return ("cpu", "cuda") if triton.knobs.runtime.interpret else ("cuda",)
