"""What the offsets of the Triton kernels reach."""


def out_of_reach(name: str, elements: int, itemsize: int) -> str | None:
    """Why the kernels would not reach all of an array, or None.

    Pallas counts elements in signed 32 bits unless an array has more than 2**32 bytes.
    """
    if not 2**31 < elements <= 2**32 // itemsize:
        return None
    return f"{name} has {elements} elements; Triton's offsets end at 2**31 of up to 2**32 bytes"
