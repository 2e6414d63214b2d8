// Aligned keys of few tokens with their bases given, as in a decoding step: k' = k keep_a + (k^ T^a) mix_a in one launch, with
// no product of two D x D matrices. A block for every head; bases, keep and mix are read where they lie.
// COUNT: the tokens, up to 8 (4 in float64), in whole powers of two.

struct align_few_params {
    const element* key;   // (B, H, N, D)
    element* aligned;     // (B, H, N, D) contiguous
    const void* ids;      // (B, N), any integer dtype
    const real* bases;    // (B, H, M, D, D)
    const real* keep;     // (M, D, D)
    const real* mix;      // (M, D, D)
    u64* record;          // the first offender among the ids
    i64 strides[3];       // of key
    i64 ids_strides[2];
    i64 heads;            // H
    i64 tokens;           // N
    i64 modalities;       // M
    i64 dim;              // real components of a key
    double eps;
    i64 kind;             // of the ids, as read_integer takes it
};

constexpr int QUADS = HEAD_DIM / 4;
constexpr int GROUPS = THREADS / QUADS; // threads that share four columns, each with some rows of a matrix

struct Rows {
    real at[COUNT][HEAD_DIM];
};

__device__ __forceinline__ real warp_sum(real x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

__device__ __forceinline__ void add_scaled(Four& sum, real factor, const Four& four) {
#pragma unroll
    for (int e = 0; e < 4; e++) sum.at[e] += factor * four.at[e];
}

// Adds the sums of the groups, in order, into `rows`.
__device__ __forceinline__ void add_groups(const Four (&sums)[COUNT], Rows& rows, real (&partial)[GROUPS][HEAD_DIM]) {
    int group = threadIdx.x / QUADS, column = threadIdx.x % QUADS * 4;
    for (int token = 0; token < COUNT; token++) {
        __syncthreads();
#pragma unroll
        for (int t = 0; t < COUNT; t++)
            if (t == token && group < GROUPS) *(Four*)&partial[group][column] = sums[t];
        __syncthreads();
        for (int at = threadIdx.x; at < HEAD_DIM; at += THREADS) {
            real sum = 0;
            for (int g = 0; g < GROUPS; g++) sum += partial[g][at];
            rows.at[token][at] = sum;
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) align_few(const __grid_constant__ align_few_params p) {
    __shared__ Rows key, unit, mapped;
    __shared__ alignas(16) real partial[GROUPS][HEAD_DIM];
    __shared__ real factors[HEAD_DIM]; // 1 / ||row of G||
    __shared__ int codes[COUNT];
    i64 head = blockIdx.x, b = head / p.heads, h = head % p.heads;
    const element* keys = p.key + b * p.strides[0] + h * p.strides[1];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / QUADS, column = threadIdx.x % QUADS * 4;

    // a warp for every token
    if (warp < COUNT) {
        real squares = 0;
        for (int c = lane; c < HEAD_DIM; c += 32) {
            real number = warp < p.tokens ? widen(keys[warp * p.strides[2] + c]) : 0;
            real shifted = number + (c < p.dim ? (real)p.eps : 0);
            key.at[warp][c] = number;
            unit.at[warp][c] = shifted;
            squares += shifted * shifted;
        }
        squares = warp_sum(squares);
        real inverse = squares == 0 ? 0 : 1 / sqrt(squares);
        for (int c = lane; c < HEAD_DIM; c += 32) unit.at[warp][c] *= inverse;
        if (lane == 0) {
            codes[warp] = PADDING;
            if (warp < p.tokens) {
                i64 id = read_integer(p.ids, b * p.ids_strides[0] + warp * p.ids_strides[1], (int)p.kind);
                codes[warp] = checked_modality(id, p.modalities, p.record, 0, b, warp);
            }
        }
    }
    __syncthreads();

    // k^ T^a
    Four sums[COUNT];
#pragma unroll
    for (int t = 0; t < COUNT; t++) sums[t] = zeros();
    for (int m = 0; m < p.modalities; m++) {
        bool wanted = false;
        for (int t = 0; t < COUNT; t++) wanted |= codes[t] != m && codes[t] != PADDING;
        if (!wanted) continue;
        const real* basis = p.bases + (head * p.modalities + m) * (HEAD_DIM * HEAD_DIM);
        for (int row = warp; row < HEAD_DIM; row += THREADS / 32) {
            real squares = 0;
            for (int c = lane; c < HEAD_DIM; c += 32) squares += basis[row * HEAD_DIM + c] * basis[row * HEAD_DIM + c];
            squares = warp_sum(squares);
            if (lane == 0) factors[row] = squares == 0 ? 0 : 1 / sqrt(squares);
        }
        __syncthreads();
        for (int row = group; row < HEAD_DIM && group < GROUPS; row += GROUPS) {
            Four four = load_four(basis + row * HEAD_DIM + column);
#pragma unroll
            for (int t = 0; t < COUNT; t++)
                if (codes[t] != m && codes[t] != PADDING) add_scaled(sums[t], unit.at[t][row] * factors[row], four);
        }
        __syncthreads();
    }
    add_groups(sums, mapped, partial);

    // k keep + (k^ T) mix
#pragma unroll
    for (int t = 0; t < COUNT; t++) sums[t] = zeros();
    for (int a = 0; a < p.modalities; a++) {
        bool wanted = false;
        for (int t = 0; t < COUNT; t++) wanted |= codes[t] == a;
        if (!wanted) continue;
        const real* keep = p.keep + (i64)a * (HEAD_DIM * HEAD_DIM);
        const real* mix = p.mix + (i64)a * (HEAD_DIM * HEAD_DIM);
        for (int row = group; row < HEAD_DIM && group < GROUPS; row += GROUPS) {
            Four straight = load_four(keep + row * HEAD_DIM + column), across = load_four(mix + row * HEAD_DIM + column);
#pragma unroll
            for (int t = 0; t < COUNT; t++)
                if (codes[t] == a) {
                    add_scaled(sums[t], key.at[t][row], straight);
                    add_scaled(sums[t], mapped.at[t][row], across);
                }
        }
    }
    add_groups(sums, unit, partial);

    for (int at = threadIdx.x; at < p.tokens * HEAD_DIM; at += THREADS) {
        int token = at / HEAD_DIM, c = at % HEAD_DIM;
        element* aligned = p.aligned + (head * p.tokens + token) * HEAD_DIM + c;
        *aligned = codes[token] == PADDING ? keys[token * p.strides[2] + c] : narrow(unit.at[token][c]);
    }
}
