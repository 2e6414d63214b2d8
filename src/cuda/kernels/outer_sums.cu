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

// The tokens of a block, which hold modality m among others or alone.
struct Block {
    const element* left;
    const element* right;
    const real* inverse;
    const u8* codes;
    i64 tokens; // fewer than TOKENS at the end of a row
};

// So many blocks are looked through at a time for those that hold the modality.
constexpr int LISTED = 32;

template <bool UNIT>
__device__ __forceinline__ Four operand(const element* row, int column, const real* inverse, Shift shift) {
    return UNIT ? unit_four(row, column, *inverse, shift) : load_four(row + column);
}

// Four numbers of a token, zeros where it has another modality. The row is loaded without waiting for the code.
template <bool UNIT>
__device__ __forceinline__ Four operand_of(const Block& block, const element* rows, i64 stride, int token, int column, int m, Shift shift) {
    if (column >= HEAD_DIM || token >= block.tokens) return zeros();
    Four four = operand<UNIT>(rows + token * stride, column, block.inverse + token, shift);
    return block.codes[token] == m ? four : zeros();
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

    __shared__ Block blocks[LISTED];
    __shared__ bool holds[LISTED];
    __shared__ int listed;
    Sums<TILE, TILE> sums;
    clear(sums);
    for (i64 start = first; start < last; start += LISTED) {
        __syncthreads(); // the list has been used
        i64 block = start + threadIdx.x;
        Block candidate;
        if (threadIdx.x < LISTED) {
            holds[threadIdx.x] = false;
            if (block < last) {
                i64 head = block / p.blocks, b = head / p.heads, h = head % p.heads, token = block % p.blocks * TOKENS;
                int modality = modality_of(p.summaries[b * p.blocks + block % p.blocks]);
                holds[threadIdx.x] = modality == m || modality == MIXED;
                candidate.left = p.left + b * p.left_strides[0] + h * p.left_strides[1] + token * p.left_strides[2];
                candidate.right = p.right + b * p.right_strides[0] + h * p.right_strides[1] + token * p.right_strides[2];
                candidate.inverse = p.inverse + head * p.tokens + token;
                candidate.codes = p.codes + b * p.blocks * TOKENS + token;
                candidate.tokens = p.tokens - token;
            }
        }
        __syncthreads();
        if (threadIdx.x < LISTED) {
            int place = 0;
            for (int before = 0; before < threadIdx.x; before++) place += holds[before];
            if (holds[threadIdx.x]) blocks[place] = candidate;
            if (threadIdx.x == LISTED - 1) listed = place + holds[threadIdx.x];
        }
        __syncthreads();
        if (listed == 0) continue;
        add_product<ALONG, ALONG, LEFT_UNIT ? SPLIT : EXACT, RIGHT_UNIT ? SPLIT : EXACT>(
            sums, panels, listed * TOKENS,
            [&](int token, int column) {
                const Block& block = blocks[token / TOKENS];
                return operand_of<LEFT_UNIT>(block, block.left, p.left_strides[2], token % TOKENS, top + column, m, shift);
            },
            [&](int token, int column) {
                const Block& block = blocks[token / TOKENS];
                return operand_of<RIGHT_UNIT>(block, block.right, p.right_strides[2], token % TOKENS, side + column, m, shift);
            });
    }
    real* partial = p.partials + at * (HEAD_DIM * HEAD_DIM);
    each(sums, [&](int row, int column, real sum) {
        if (top + row < HEAD_DIM && side + column < HEAD_DIM) partial[(top + row) * HEAD_DIM + side + column] = sum;
    });
}
