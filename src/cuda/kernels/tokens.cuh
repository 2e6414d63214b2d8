// What the kernels that work on tiles of tokens share: a tile is ROWS tokens of one head, all of its D columns.

constexpr int COLUMNS = (HEAD_DIM + 31) / 32 * 32;
#if DTYPE >= 2
constexpr int ROWS = HEAD_DIM > 128 ? 64 : 128;
#else
constexpr int ROWS = 32;
#endif

// The smallest modality above `after` among the tokens of a tile, PADDING where there is none.
__device__ __forceinline__ int next_modality(const u8 (&codes)[ROWS], int after) {
    int next = PADDING;
    for (int at = 0; at < ROWS; at += 4) {
        u32 four = *(const u32*)(codes + at);
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
            int code = four >> (8 * byte) & 255;
            if (code > after && code < next) next = code;
        }
    }
    return next;
}

// The codes of a tile's tokens; PADDING past the end of the row of `count` codes.
__device__ __forceinline__ void load_codes(u8 (&codes)[ROWS], const u8* row, i64 first, i64 count) {
    for (int at = threadIdx.x; at < ROWS; at += THREADS) codes[at] = first + at < count ? row[first + at] : PADDING;
}

// Writes a tile's sums to `target`, the first `count` rows of it. Where passed(row) is a row of elements and not null, that is
// copied instead. On tensor cores a thread holds scattered pairs: they are gathered in shared memory, where the panels were.
template <class Passed>
__device__ __forceinline__ void store_tokens(Sums<ROWS, COLUMNS>& sums, Panels<ROWS, COLUMNS>& panels, element* target, i64 count, Passed passed) {
#if DTYPE >= 2
    constexpr int PITCH = COLUMNS + 8, UNITS = HEAD_DIM / 8;
    static_assert(ROWS * PITCH * sizeof(element) <= sizeof(panels), "a tile of elements fits where the panels were");
    element* gathered = (element*)&panels;
    __syncthreads(); // the panels have been read
    each(sums, [&](int row, int column, real sum) { gathered[row * PITCH + column] = narrow(sum); });
    __syncthreads();
    for (int at = threadIdx.x; at < ROWS * UNITS && at / UNITS < count; at += THREADS) {
        int row = at / UNITS, column = at % UNITS * 8;
        const element* source = passed(row);
        *(uint4*)(target + row * HEAD_DIM + column) = *(const uint4*)((source ? source : gathered + row * PITCH) + column);
    }
#else
    each(sums, [&](int row, int column, real sum) {
        if (row >= count || column >= HEAD_DIM) return;
        const element* source = passed(row);
        target[row * HEAD_DIM + column] = source ? source[column] : narrow(sum);
    });
#endif
}
