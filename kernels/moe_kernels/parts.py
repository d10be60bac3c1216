"""Device functions that several kernels share: the order of tiles, the activations and their gradients.

Each activation has a plain twin in moe_kernels.activation.
"""
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from moe_kernels import launch

GROUP = tl.constexpr(8)  # row tiles that share the columns of one expert before the next columns are begun
RAGGED = tl.constexpr(launch.RAGGED)
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SLOPE = tl.constexpr(1.702)  # spec.GPT_OSS_SLOPE
LIMIT = tl.constexpr(7.0)  # spec.GPT_OSS_LIMIT


@triton.jit
def tile_place(tile, num_row_tiles, num_column_tiles):
    """Return (row tile, column tile) of the tile-th tile: groups of GROUP row tiles, each over all columns.

    Row tiles stand in the order of experts, so that programs that run at the same time read few experts' weights.
    """
    per_group = GROUP * num_column_tiles
    first = tile // per_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def load_segment(desc, start, num_rows, row, column):
    """Return a block of the segment of num_rows rows at start, from its row and column on: zeros past its end.

    `desc` is one of launch.describe_segments: the end of the segment is where its third dimension ends.
    """
    block = desc.load([RAGGED, start + num_rows, RAGGED - num_rows + row, column])
    return block.reshape(block.shape[2], block.shape[3])


@triton.jit
def halve(x):
    """Return the left and the right half of the columns of x."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def split_columns(acc, SUB_TILES: tl.constexpr):
    """Return the columns of acc in 1, 2, 4 or 8 pieces, from left to right."""
    if SUB_TILES == 1:
        pieces = (acc,)
    elif SUB_TILES == 2:
        left, right = halve(acc)
        pieces = (left, right)
    elif SUB_TILES == 4:
        left, right = halve(acc)
        a, b = halve(left)
        c, d = halve(right)
        pieces = (a, b, c, d)
    else:
        tl.static_assert(SUB_TILES == 8)
        left, right = halve(acc)
        a, b = halve(left)
        c, d = halve(right)
        a0, a1 = halve(a)
        b0, b1 = halve(b)
        c0, c1 = halve(c)
        d0, d1 = halve(d)
        pieces = (a0, a1, b0, b1, c0, c1, d0, d1)
    return pieces


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """Return the activation of the products before it; `up` is ignored where there is no gate."""
    if ACTIVATION == "swiglu":
        return gate * sigmoid(gate) * up
    elif ACTIVATION == "geglu":
        return 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF)) * up
    elif ACTIVATION == "gpt_oss":
        held = tl.minimum(gate, LIMIT)
        return (tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0) * held * sigmoid(held * SLOPE)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(gate, 0.0)
        return positive * positive


@triton.jit
def activate_backward(da, gate, up, ACTIVATION: tl.constexpr):
    """Return the gradients of gate and up, given that of the activation."""
    if ACTIVATION == "swiglu":
        chance = sigmoid(gate)
        silu = gate * chance
        return da * up * (chance + silu * (1.0 - chance)), da * silu
    elif ACTIVATION == "geglu":
        below = 0.5 * (1.0 + tl.erf(gate * SQRT_HALF))
        density = tl.exp2(gate * gate * (-0.5 * LOG2_E)) * INV_SQRT_2PI
        return da * up * (below + gate * density), da * gate * below
    elif ACTIVATION == "gpt_oss":
        held = tl.minimum(gate, LIMIT)
        chance = sigmoid(held * SLOPE)
        swish = held * chance
        shifted = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        dgate = da * shifted * (chance + SLOPE * swish * (1.0 - chance))
        # at the limit itself the gradient passes, as torch.clamp has it
        is_inside = (up >= -LIMIT) & (up <= LIMIT)
        return tl.where(gate <= LIMIT, dgate, 0.0), tl.where(is_inside, da * swish, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        slope = 2.0 * da * tl.maximum(gate, 0.0)
        return slope, slope
