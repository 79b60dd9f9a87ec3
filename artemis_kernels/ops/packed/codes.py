"""From stored bytes to numbers: tiles of a packed weight in registers.

    int8   the byte is the number               w = byte · scale[n]
    fp8    e4m3, read from its bits             w = number · scale[n]
    int4   byte j of a group holds code j in its low bits and code j + g/2 in its high ones
                                                w = code · scale[n, group] + offset[n, group]

An e4m3 number's bits, moved into fp16, are the number times 2⁻⁸ (subnormals too), so no chip and no
interpreter needs to know the format. The two codes of nan, which `QuantizedWeight.quantize` never
writes, read as ±480: telling them apart would cost every weight a comparison and a selection.
"""

import triton
import triton.language as tl


@triton.jit
def numbers(codes, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """What the bytes of an int8 or fp8 tile stand for, without the row scale: exact in 16 bits."""
    if FORMAT == "int8":
        return codes.to(dtype)
    else:
        tl.static_assert(FORMAT == "fp8")
        bits = codes.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)


@triton.jit
def numbers_in_fp32(codes, FORMAT: tl.constexpr):
    """`numbers` in float32, of signed bytes of fp8 2⁻⁸ times as large; a tensor's as they are."""
    if FORMAT == "fp8":
        # The sign, which fills what the byte is extended by, is taken out of fp16's first exponent.
        return ((codes.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return codes.to(tl.float32)


@triton.jit
def low_columns(offs_byte, HALF: tl.constexpr):
    """The column of each byte's low code; its high code is HALF = g/2 columns further on."""
    return offs_byte // HALF * (2 * HALF) + offs_byte % HALF


@triton.jit
def group_values(ptr, offs_n, start_byte, mask_n, columns, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Scales or offsets [rows, BLOCK or 1] in fp32 for bytes `start_byte + [0, BLOCK)` of rows n.

    `columns` bytes a row; where BLOCK divides HALF, the whole step lies in one group.
    """
    groups = columns // HALF
    if HALF % BLOCK == 0:
        ptrs = ptr + offs_n * groups + start_byte // HALF
        return tl.load(ptrs, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    else:
        offs = start_byte + tl.arange(0, BLOCK)
        ptrs = ptr + offs_n[:, None] * groups + (offs // HALF)[None, :]
        mask = mask_n[:, None] & (offs < columns)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pair_of_weights(codes, scale, offset, dtype: tl.constexpr):
    """The weights of the low and of the high codes of a tile of bytes, rounded once to `dtype`."""
    low = (codes & 15).to(tl.float32) * scale + offset
    high = (codes >> 4).to(tl.float32) * scale + offset
    return low.to(dtype), high.to(dtype)
