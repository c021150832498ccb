"""What the offsets of the Triton kernels reach."""


def out_of_reach(packed_bytes: int) -> str | None:
    """Why the kernels would not reach all of so many packed bytes, or None.

    Pallas counts elements in signed 32 bits unless an array has more than 2**32 bytes: with wider
    elements that is always enough.
    """
    if not 2**31 < packed_bytes <= 2**32:
        return None
    return f"packed has {packed_bytes} bytes; Triton's offsets end at 2**31 of up to 2**32 bytes"
