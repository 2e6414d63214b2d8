// Sums over tokens: the bases G^m (paper, equation 5) and the gradients of keep and of the maps are all of the form
//
//   sum over the tokens j of modality m of left_j^T right_j           (D x D)
//
// Blocks of 64 tokens, of all heads one after the other, are summed by groups of `group_blocks` (one head's for a basis, all
// for a parameter); each group is cut into parts, whose partial sums are added later, in order (row_norms.cu, add_parts.cu).
// LEFT_UNIT, RIGHT_UNIT: the operand is the unit key k^ = (k + eps) / ||k + eps|| made of it.

#if DTYPE >= 2 && HEAD_DIM > 64
constexpr int TILE = 128;
#else
constexpr int TILE = 64;
#endif

struct outer_sums_params {
    const element* left;    // (B, H, N, D)
    const element* right;   // (B, H, N, D)
    const real* inverse;    // (B, H, N): 1 / ||k + eps||
    const u8* codes;
    const u16* summaries;
    real* partials;         // (groups, parts, M, D, D)
    i64 left_strides[3];
    i64 right_strides[3];
    i64 heads;              // H
    i64 tokens;             // N
    i64 blocks;             // of a row of tokens
    i64 group_blocks;
    i64 part_blocks;
    i64 parts;              // of a group
    i64 modalities;         // M
    i64 dim;                // real components of a key
    double eps;
};

template <bool UNIT>
__device__ __forceinline__ Four operand(const element* row, int column, const real* inverse, Shift shift) {
    return UNIT ? unit_four(row, column, *inverse, shift) : load_four(row + column);
}

extern "C" __global__ void __launch_bounds__(THREADS) outer_sums(const __grid_constant__ outer_sums_params p) {
    __shared__ Panels<TILE, TILE> panels;
    constexpr int TILES = (HEAD_DIM + TILE - 1) / TILE;
    int tile = blockIdx.x % (TILES * TILES);
    int top = tile / TILES * TILE, side = tile % TILES * TILE;
    i64 at = blockIdx.x / (TILES * TILES); // (group, part, m)
    int m = at % p.modalities;
    i64 part = at / p.modalities % p.parts, group = at / p.modalities / p.parts;
    i64 first = group * p.group_blocks + part * p.part_blocks;
    i64 last = min(first + p.part_blocks, (group + 1) * p.group_blocks);

    Shift shift = {(real)p.eps, (int)p.dim};

    Sums<TILE, TILE> sums;
    clear(sums);
    for (i64 block = first; block < last; block++) {
        i64 head = block / p.blocks, b = head / p.heads, h = head % p.heads, of_row = block % p.blocks;
        int summary = p.summaries[b * p.blocks + of_row];
        if (modality_of(summary) != m && modality_of(summary) != MIXED) continue;
        const u8* codes = p.codes + (b * p.blocks + of_row) * TOKENS;
        const real* inverse = p.inverse + head * p.tokens + of_row * TOKENS;
        const element* left = p.left + b * p.left_strides[0] + h * p.left_strides[1] + of_row * TOKENS * p.left_strides[2];
        const element* right = p.right + b * p.right_strides[0] + h * p.right_strides[1] + of_row * TOKENS * p.right_strides[2];
        add_product<ALONG, ALONG, LEFT_UNIT ? SPLIT : EXACT, RIGHT_UNIT ? SPLIT : EXACT>(
            sums, panels, TOKENS,
            [&](int token, int column) {
                if (codes[token] != m || top + column >= HEAD_DIM) return zeros();
                return operand<LEFT_UNIT>(left + token * p.left_strides[2], top + column, inverse + token, shift);
            },
            [&](int token, int column) {
                if (codes[token] != m || side + column >= HEAD_DIM) return zeros();
                return operand<RIGHT_UNIT>(right + token * p.right_strides[2], side + column, inverse + token, shift);
            });
    }
    real* partial = p.partials + at * (HEAD_DIM * HEAD_DIM);
    each(sums, [&](int row, int column, real sum) {
        if (top + row < HEAD_DIM && side + column < HEAD_DIM) partial[(top + row) * HEAD_DIM + side + column] = sum;
    });
}
