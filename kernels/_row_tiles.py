"""How Triton kernels that need a whole row at once cut their work."""

from dataclasses import dataclass

MAX_WIDTH = 16384  # 16 warps then hold 32 values a thread


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Rows of a step, values of a row rounded up to a power of two, rows of a program that sums over rows, warps."""

    block_rows: int
    block_width: int
    rows_per_program: int
    num_warps: int


def row_tiles(
    *, num_rows: int, width: int, capability: tuple[int, int] | None, num_groups: int = 1, num_sms: int = 132
) -> RowTiles:
    """Tiles for num_groups groups of num_rows rows each, whose sums stay apart; capability None is the interpreter."""
    block_width = 1 << max(width - 1, 0).bit_length()
    if capability is None:  # a step takes 5 ms whatever its size: few and large ones
        block_rows = min(64, 1 << max(num_rows - 1, 0).bit_length())
        return RowTiles(block_rows, block_width, -(-num_rows // block_rows) * block_rows, 4)
    # 16 values a thread: two vectors of 16 bytes in bf16, enough in flight to fill the memory's pipeline.
    values = max(block_width, 2048)
    block_rows = values // block_width
    steps = -(-num_rows // block_rows)
    # Sums over rows: a partial sum costs a row of fp32, so not more programs than keep the chip busy.
    programs = min(steps, max(1, 4 * num_sms // max(num_groups, 1)))
    num_warps = min(16, values // 512)
    if capability >= (12, 0) and block_width == 8192:
        # With 16 warps ptxas aims at 64 registers for the backward of GELU by erf and spills 8 bytes (sm_120, aot); 8 warps
        # take 130 and spill nothing.
        num_warps = 8
    return RowTiles(block_rows, block_width, -(-steps // max(programs, 1)) * block_rows, num_warps)


def check_width(operation: str, width: int) -> None:
    """Raises ValueError for rows that no program can hold."""
    if width > MAX_WIDTH:
        raise ValueError(
            f"{operation} in Triton takes rows of up to {MAX_WIDTH} values, got {width}; use implementation='reference'"
        )
