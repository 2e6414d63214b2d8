// Backward of the maps: from dX^a, with X^a = T^a mix_a and T^a = sum over m != a of ||G^m||,
//
//   d mix_a = sum over heads of T^a^T dX^a,   dT^a = dX^a mix_a^T,   d||G^m|| = sum over a != m of dT^a,   and that of the row norm

struct mix_gradient_params {
    const real* bases;     // (B H, M, D, D)
    const real* inverse;   // (B H, M, D)
    const real* d_maps;    // (B H, M, D, D)
    real* partials;        // (parts, M, D, D)
    i64 heads;             // B H
    i64 part_heads;        // of a part
    i64 modalities;        // M
};

// A block for every tile of every (part, a).
extern "C" __global__ void __launch_bounds__(THREADS) mix_gradient(const __grid_constant__ mix_gradient_params p) {
    __shared__ Panels<TILE, TILE> panels;
    int tile = blockIdx.x % (TILES * TILES);
    int top = tile / TILES * TILE, side = tile % TILES * TILE;
    i64 at = blockIdx.x / (TILES * TILES); // (part, a)
    int a = at % p.modalities;
    i64 first = at / p.modalities * p.part_heads, last = min(first + p.part_heads, p.heads);

    Sums<TILE, TILE> sums;
    clear(sums);
    for (i64 head = first; head < last; head++) {
        i64 of_head = head * p.modalities;
        const real* bases = p.bases + of_head * (HEAD_DIM * HEAD_DIM);
        const real* inverse = p.inverse + of_head * HEAD_DIM;
        const real* d_map = p.d_maps + (of_head + a) * (HEAD_DIM * HEAD_DIM);
        add_product<ALONG, ALONG, ROUNDED, ROUNDED>(
            sums, panels, HEAD_DIM,
            [&](int row, int column) { return others_four(bases, inverse, p.modalities, a, row, top + column); },
            [&](int row, int column) { return matrix_four(d_map, row, side + column); });
    }
    store_tile(sums, p.partials + at * (HEAD_DIM * HEAD_DIM), top, side);
}

struct others_gradient_params {
    const real* d_maps;  // (B H, M, D, D)
    const real* mix;     // (M, D, D)
    real* d_others;      // (B H, M, D, D): dT^a
    i64 modalities;      // M
};

// A block for every tile of every (b, h, a).
extern "C" __global__ void __launch_bounds__(THREADS) others_gradient(const __grid_constant__ others_gradient_params p) {
    __shared__ Panels<TILE, TILE> panels;
    int tile = blockIdx.x % (TILES * TILES);
    int top = tile / TILES * TILE, side = tile % TILES * TILE;
    i64 at = blockIdx.x / (TILES * TILES);
    const real* d_map = p.d_maps + at * (HEAD_DIM * HEAD_DIM);
    const real* mix = p.mix + at % p.modalities * (HEAD_DIM * HEAD_DIM);

    Sums<TILE, TILE> sums;
    clear(sums);
    add_product<ACROSS, ACROSS, ROUNDED, ROUNDED>(
        sums, panels, HEAD_DIM,
        [&](int row, int column) { return matrix_four(d_map, top + row, column); },
        [&](int row, int column) { return matrix_four(mix, side + row, column); });
    store_tile(sums, p.d_others + at * (HEAD_DIM * HEAD_DIM), top, side);
}

struct basis_gradient_params {
    const real* bases;       // (B H, M, D, D)
    const real* inverse;     // (B H, M, D)
    const real* d_others;    // (B H, M, D, D)
    const real* d_returned;  // (B H, M, D, D): gradient of the returned basis; null: none
    real* d_bases;           // (B H, M, D, D)
    i64 rows;                // B H M D
    i64 modalities;          // M
};

// A warp for every row: dG = (dn - n (n . dn)) / ||G|| with n = G / ||G||, and the gradient that came from outside.
extern "C" __global__ void __launch_bounds__(THREADS) basis_gradient(const __grid_constant__ basis_gradient_params p) {
    constexpr int EACH = (HEAD_DIM + 31) / 32;
    i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    int r = row % HEAD_DIM, m = row / HEAD_DIM % p.modalities;
    i64 of_head = row / HEAD_DIM / p.modalities * p.modalities;
    real factor = p.inverse[row], normed[EACH], gradient[EACH], along = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = threadIdx.x % 32 + 32 * i;
        normed[i] = gradient[i] = 0;
        if (column >= HEAD_DIM) continue;
        normed[i] = p.bases[row * HEAD_DIM + column] * factor;
        for (int a = 0; a < p.modalities; a++)
            if (a != m) gradient[i] += p.d_others[((of_head + a) * HEAD_DIM + r) * HEAD_DIM + column];
        along += normed[i] * gradient[i];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) along += __shfl_xor_sync(0xffffffffu, along, distance);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = threadIdx.x % 32 + 32 * i;
        if (column >= HEAD_DIM) continue;
        i64 at = row * HEAD_DIM + column;
        real returned = p.d_returned ? p.d_returned[at] : 0;
        p.d_bases[at] = (gradient[i] - normed[i] * along) * factor + returned;
    }
}
