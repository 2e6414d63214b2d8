// What lies between the sums over tokens and the maps: lengths of keys, sums of partial results, lengths of basis rows.
// All three kernels are plain and bound by memory.

constexpr int BLOCK = 256;

__device__ __forceinline__ real warp_sum(real x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// 1 / ||x||, 0 for a row of zeros, which has no direction.
__device__ __forceinline__ real inverse_norm(real squares) { return squares == 0 ? 0 : 1 / sqrt(squares); }

struct unit_norms_params {
    const element* key;  // (B, H, N, D)
    real* inverse;       // (B, H, N): 1 / ||k + eps||
    i64 strides[3];
    i64 heads;           // H
    i64 tokens;          // N
    i64 rows;            // B H N
    i64 dim;             // real components of a key
    double eps;
};

// A warp for every key.
extern "C" __global__ void __launch_bounds__(BLOCK) unit_norms(const __grid_constant__ unit_norms_params p) {
    i64 row = (i64)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    i64 token = row % p.tokens, h = row / p.tokens % p.heads, b = row / p.tokens / p.heads;
    const element* key = p.key + b * p.strides[0] + h * p.strides[1] + token * p.strides[2];
    real squares = 0;
    for (int column = threadIdx.x % 32; column < HEAD_DIM; column += 32) {
        real shifted = widen(key[column]) + (column < p.dim ? (real)p.eps : 0);
        squares += shifted * shifted;
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) p.inverse[row] = inverse_norm(squares);
}

struct finish_basis_params {
    const real* partials;  // (B H, parts, M, D, D), or the given bases with one part
    real* basis;           // (B H, M, D, D); null: not wanted
    real* inverse;         // (B H, M, D): 1 / ||row of G||
    i64 parts;
    i64 rows;              // B H M D
    i64 head_rows;         // M D
};

// Partial sums added in order, and the row norms. A warp for every row.
extern "C" __global__ void __launch_bounds__(BLOCK) finish_basis(const __grid_constant__ finish_basis_params p) {
    i64 row = (i64)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    i64 head = row / p.head_rows, step = p.head_rows * HEAD_DIM;
    const real* partial = p.partials + head * p.parts * step + row % p.head_rows * HEAD_DIM;
    real squares = 0;
    for (int column = threadIdx.x % 32; column < HEAD_DIM; column += 32) {
        real sum = partial[column];
        for (i64 part = 1; part < p.parts; part++) sum += partial[part * step + column];
        if (p.basis) p.basis[row * HEAD_DIM + column] = sum;
        squares += sum * sum;
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) p.inverse[row] = inverse_norm(squares);
}

struct add_parts_params {
    const real* partials;  // (groups, parts, size)
    real* sums;            // (groups, size)
    i64 parts;
    i64 size;
    i64 count;             // groups size
};

// Partial sums added in order. A thread for every sum.
extern "C" __global__ void __launch_bounds__(BLOCK) add_parts(const __grid_constant__ add_parts_params p) {
    i64 at = (i64)blockIdx.x * BLOCK + threadIdx.x;
    if (at >= p.count) return;
    const real* partial = p.partials + at / p.size * p.parts * p.size + at % p.size;
    real sum = partial[0];
    for (i64 part = 1; part < p.parts; part++) sum += partial[part * p.size];
    p.sums[at] = sum;
}
