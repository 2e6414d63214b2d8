// What the kernels that work on the D x D matrices of a head share.

constexpr int TILE = 64;
constexpr int TILES = (HEAD_DIM + TILE - 1) / TILE;

// Four numbers of T^a = sum over m != a of ||G^m|| (paper, equation 6), G^m with rows divided by their norms.
// `bases` and `inverse` are one head's.
__device__ __forceinline__ Four others_four(const real* bases, const real* inverse, int modalities, int a, int row, int column) {
    Four sum = zeros();
    if (row >= HEAD_DIM || column >= HEAD_DIM) return sum;
    for (int m = 0; m < modalities; m++) {
        if (m == a) continue;
        real factor = inverse[m * HEAD_DIM + row];
        Four four = load_four(bases + ((i64)m * HEAD_DIM + row) * HEAD_DIM + column);
#pragma unroll
        for (int e = 0; e < 4; e++) sum.at[e] += four.at[e] * factor;
    }
    return sum;
}

// A tile of sums into a D x D matrix.
__device__ __forceinline__ void store_tile(Sums<TILE, TILE>& sums, real* matrix, int top, int side) {
    each(sums, [&](int row, int column, real sum) {
        if (top + row < HEAD_DIM && side + column < HEAD_DIM) matrix[(top + row) * HEAD_DIM + side + column] = sum;
    });
}
