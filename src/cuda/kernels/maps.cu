// X^a = T^a mix_a: what modality a's unit keys are mapped by. A block for every tile of every (b, h, a).

struct maps_params {
    const real* bases;    // (B H, M, D, D)
    const real* inverse;  // (B H, M, D)
    const real* mix;      // (M, D, D)
    real* maps;           // (B H, M, D, D)
    i64 modalities;       // M
};

extern "C" __global__ void __launch_bounds__(THREADS) maps(const __grid_constant__ maps_params p) {
    __shared__ Panels<TILE, TILE> panels;
    int tile = blockIdx.x % (TILES * TILES);
    int top = tile / TILES * TILE, side = tile % TILES * TILE;
    i64 at = blockIdx.x / (TILES * TILES); // (b, h, a)
    int a = at % p.modalities;
    i64 of_head = at - a; // (b, h, 0)
    const real* bases = p.bases + of_head * (HEAD_DIM * HEAD_DIM);
    const real* inverse = p.inverse + of_head * HEAD_DIM;
    const real* mix = p.mix + (i64)a * (HEAD_DIM * HEAD_DIM);

    Sums<TILE, TILE> sums;
    clear(sums);
    add_product<ACROSS, ALONG, SPLIT, SPLIT>(
        sums, panels, HEAD_DIM,
        [&](int row, int column) { return others_four(bases, inverse, p.modalities, a, top + row, column); },
        [&](int row, int column) { return matrix_four(mix, row, side + column); });
    store_tile(sums, p.maps + at * (HEAD_DIM * HEAD_DIM), top, side);
}
