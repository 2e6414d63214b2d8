// out = parts[0] + parts[1]: the outputs of the two softmaxes of "split", added (paper, equations 7 and 8).

struct attend_sum_params {
    const real* parts;  // (B, Hq, 2, Nq, D) contiguous
    element* out;       // (B, Hq, Nq, D) contiguous
    i64 count;          // elements of out
    i64 row;            // Nq D
};

extern "C" __global__ void attend_sum(const __grid_constant__ attend_sum_params p) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < p.count; at += step) {
        const real* own = p.parts + at / p.row * 2 * p.row + at % p.row;
        p.out[at] = narrow(own[0] + own[p.row]);
    }
}
