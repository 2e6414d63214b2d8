// delta_i = dO_i . o_i of every softmax, and d sink_i = -exp(z_i - L_i) delta_i. A warp a row.
// PART 0: o is `out`; 1 and 2: the part of "split" in `parts`.

struct attend_delta_params {
    attend_inputs inputs;
    const element* out_gradient;  // (B, Hq, Nq, D)
    const element* out;           // (B, Hq, Nq, D) contiguous
    const real* parts;            // (B, Hq, 2, Nq, D) contiguous
    const real* logsumexp;        // (B, Hq, parts, Nq)
    real* delta;                  // (B, Hq, parts, Nq)
    real* sink_gradient;          // (B, Hq, Nq, parts) or null
    i64 out_gradient_strides[3];
    i64 count;                    // B Hq Nq
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) attend_delta(const __grid_constant__ attend_delta_params p) {
    const attend_inputs& in = p.inputs;
    const i64 flat = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (flat >= p.count) return;
    const int query = flat % in.queries;
    const i64 unit_of_rows = flat / in.queries;  // b Hq + head
    const int b = unit_of_rows / in.heads, head = unit_of_rows % in.heads;
    const i64 softmax = PART == 0 ? flat : (2 * unit_of_rows + (PART == 2)) * in.queries + query;
    const i64* strides = p.out_gradient_strides;
    const element* gradient = p.out_gradient + b * strides[0] + head * strides[1] + query * strides[2];
    const bool is_padding = codes_of(in.query_codes, b, in.queries)[query] == PADDING;

    real sum = 0;
#pragma unroll
    for (int start = 0; start < HEAD_DIM; start += 64) {
        const int column = start + 2 * lane();
        if (column >= HEAD_DIM || is_padding) continue;
        const pair g = *(const pair*)(gradient + column);
#if PART == 0
        const pair o = *(const pair*)(p.out + flat * HEAD_DIM + column);
        sum += widen(g.at[0]) * widen(o.at[0]) + widen(g.at[1]) * widen(o.at[1]);
#else
        const real* o = p.parts + softmax * HEAD_DIM + column;
        sum += widen(g.at[0]) * o[0] + widen(g.at[1]) * o[1];
#endif
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(EVERY, sum, other);
    if (lane() != 0) return;
    p.delta[softmax] = sum;
    if (p.sink_gradient) {
        // L = +inf: an empty softmax, or a sink that took it all. The output is zero wherever that sink goes.
        const real logsumexp = p.logsumexp[softmax];
        const real weight = logsumexp == INFINITE ? (real)0 : power2((sink_at(in, b, head, query) - logsumexp) * LOG2_E);
        p.sink_gradient[PART == 0 ? flat : 2 * flat + (PART == 2)] = -(weight * sum);
    }
}
