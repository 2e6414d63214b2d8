// d bias[m, m'] = sum of sums[i][m'] over the queries i of modality m (the sums are those of `attend_rows`). A block for each row of
// a table; every thread adds queries in order, then the threads' sums are added in order.

struct attend_bias_params {
    const real* sums;     // (B, Hq, Nq, M)
    const u8* codes;      // of the queries
    real* bias_gradient;  // (B, Hq, M, M)
    i64 queries;
    i64 modalities;       // M
    i64 heads;            // Hq
};

extern "C" __global__ void __launch_bounds__(128) attend_bias(const __grid_constant__ attend_bias_params p) {
    __shared__ real shares[128];
    const i64 unit_of_rows = blockIdx.x / p.modalities;
    const int own = blockIdx.x % p.modalities;
    const u8* codes = codes_of(p.codes, unit_of_rows / p.heads, p.queries);
    const real* sums = p.sums + unit_of_rows * p.queries * p.modalities;
    for (int other = 0; other < p.modalities; other++) {
        real sum = 0;
        for (i64 query = threadIdx.x; query < p.queries; query += 128) {
            if (codes[query] == own) sum += sums[query * p.modalities + other];
        }
        shares[threadIdx.x] = sum;
        __syncthreads();
        for (int half = 64; half > 0; half /= 2) {
            if (threadIdx.x < half) shares[threadIdx.x] += shares[threadIdx.x + half];
            __syncthreads();
        }
        if (threadIdx.x == 0) p.bias_gradient[blockIdx.x * p.modalities + other] = shares[0];
        __syncthreads();
    }
}
