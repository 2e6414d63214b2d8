// Aligned keys k' = k keep_a + k^ X^a with a the key's modality, X^a = T^a mix_a (maps.cu); padding passes through.
// A block for every tile of tokens; it meets each modality in its tile once, with the other tokens' rows zero.

struct align_keys_params {
    const element* key;   // (B, H, N, D)
    element* aligned;     // (B, H, N, D) contiguous
    const real* inverse;  // (B, H, N): 1 / ||k + eps||
    const real* keep;     // (M, D, D)
    const real* maps;     // (B, H, M, D, D)
    const u8* codes;
    i64 strides[3];       // of key
    i64 heads;            // H
    i64 tokens;           // N
    i64 blocks;           // blocks of codes in a row
    i64 modalities;       // M
    i64 dim;              // real components of a key
    double eps;
};

extern "C" __global__ void __launch_bounds__(THREADS) align_keys(const __grid_constant__ align_keys_params p) {
    __shared__ Panels<ROWS, COLUMNS> panels;
    __shared__ alignas(4) u8 codes[ROWS];
    i64 tiles = (p.tokens + ROWS - 1) / ROWS;
    i64 head = blockIdx.x / tiles, first = blockIdx.x % tiles * ROWS, b = head / p.heads, h = head % p.heads;
    const element* key = p.key + b * p.strides[0] + h * p.strides[1] + first * p.strides[2];
    const real* inverse = p.inverse + head * p.tokens + first;
    Shift shift = {(real)p.eps, (int)p.dim};
    load_codes(codes, p.codes + b * p.blocks * TOKENS, first, p.blocks * TOKENS);
    __syncthreads();

    Sums<ROWS, COLUMNS> sums;
    clear(sums);
    for (int a = next_modality(codes, -1); a != PADDING; a = next_modality(codes, a)) {
        const real* keep = p.keep + (i64)a * (HEAD_DIM * HEAD_DIM);
        const real* map = p.maps + (head * p.modalities + a) * (HEAD_DIM * HEAD_DIM);
        add_product<ACROSS, ALONG, EXACT, ROUNDED>(
            sums, panels, HEAD_DIM,
            [&](int row, int column) { return codes[row] == a && column < HEAD_DIM ? load_four(key + row * p.strides[2] + column) : zeros(); },
            [&](int row, int column) { return matrix_four(keep, row, column); });
        add_product<ACROSS, ALONG, ROUNDED, ROUNDED>(
            sums, panels, HEAD_DIM,
            [&](int row, int column) {
                if (codes[row] != a || column >= HEAD_DIM) return zeros();
                return unit_four(key + row * p.strides[2], column, inverse[row], shift);
            },
            [&](int row, int column) { return matrix_four(map, row, column); });
    }

    element* aligned = p.aligned + (head * p.tokens + first) * HEAD_DIM;
    store_tokens(sums, panels, aligned, p.tokens - first, [&](int row) { return codes[row] == PADDING ? key + row * p.strides[2] : nullptr; });
}
