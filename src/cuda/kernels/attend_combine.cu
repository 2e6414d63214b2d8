// The running softmaxes that the key splits of `attend_forward` left behind, joined in their order. A warp a row.

struct attend_combine_params {
    attend_inputs inputs;
    const real* partial_sums;    // (B, Hkv, splits, rows, D), rows = group Nq
    const real* partial_totals;  // (B, Hkv, splits, rows, 3)
    element* out;                // as attend_forward
    real* parts;
    real* logsumexp;
    real* mass;
    i64 splits;
    i64 count;                   // B Hkv rows
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) attend_combine(const __grid_constant__ attend_combine_params p) {
    const attend_inputs& in = p.inputs;
    const i64 flat = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (flat >= p.count) return;
    const int rows = in.group * in.queries, row = flat % rows;
    const i64 unit_of_heads = flat / rows;  // b Hkv + key head
    const int query = row % in.queries;
    const i64 unit_of_rows = unit_of_heads * in.group + row / in.queries;  // b Hq + head
    const int b = unit_of_rows / in.heads, head = unit_of_rows % in.heads;

    row_total total = {-INFINITE, 0, 0};
    real sums[(HEAD_DIM + 31) / 32] = {};
    const bool is_padding = codes_of(in.query_codes, b, in.queries)[query] == PADDING;
    for (int split = 0; split < p.splits && !is_padding; split++) {
        const i64 at = (unit_of_heads * p.splits + split) * rows + row;
        const row_total next = ((const row_total*)p.partial_totals)[at];
        if (next.own + next.cross == 0) continue;
        const real top = larger(total.top, next.top);
        const real kept = total.top == top ? (real)1 : power2(total.top - top);
        const real share = next.top == top ? (real)1 : power2(next.top - top);
        total = {top, total.own * kept + next.own * share, total.cross * kept + next.cross * share};
#pragma unroll
        for (int d = 0; d < (HEAD_DIM + 31) / 32; d++) {
            int column = 32 * d + lane();
            if (column < HEAD_DIM) sums[d] = sums[d] * kept + p.partial_sums[at * HEAD_DIM + column] * share;
        }
    }
    const closed_row closed = close_row(total, sink_at(in, b, head, query));
    const i64 at = unit_of_rows * in.queries + query;
    const i64 softmax = PART == 0 ? at : (2 * unit_of_rows + (PART == 2)) * in.queries + query;
#pragma unroll
    for (int d = 0; d < (HEAD_DIM + 31) / 32; d++) {
        int column = 32 * d + lane();
        if (column >= HEAD_DIM) continue;
        real number = closed.factor == 0 ? (real)0 : sums[d] * closed.factor;
#if PART == 0
        p.out[at * HEAD_DIM + column] = narrow(number);
#else
        p.parts[softmax * HEAD_DIM + column] = number;
#endif
    }
    if (lane() == 0) {
        p.logsumexp[softmax] = closed.logsumexp;
        if (MASS) store_mass(p.mass + 3 * at, total, closed);
    }
}
