// Pseudo-scores of the modular mask (paper, equation 10): log Z = base + f(decay, e) with e masked positions behind a
// query and f(d, e) = log of the sum of exp(-t d) over t = 0 .. e-1. All of it in float64.

struct pseudo_sink_params {
    const void* position;    // (B, Nq), any integer dtype
    const void* modality;    // (B, Nq), any integer dtype
    const real* decay;       // (M, Hq)
    const real* base;        // (M, Hq)
    real* sink;              // (B, Hq, Nq)
    u64* record;             // the first offender among the ids
    i64 position_strides[2];
    i64 modality_strides[2];
    i64 decay_strides[2];
    i64 base_strides[2];
    i64 batch, heads, queries;
    i64 span;
    int position_kind;
    int modality_kind;
    int modalities;          // M
    int unused;
};

struct pseudo_sink_backward_params {
    const void* position;    // (B, Nq)
    const void* modality;    // (B, Nq)
    const real* decay;       // (M, Hq)
    const real* d_sink;      // (B, Hq, Nq)
    real* d_decay;           // (M, Hq)
    real* d_base;            // (M, Hq)
    u64* record;
    i64 position_strides[2];
    i64 modality_strides[2];
    i64 decay_strides[2];
    i64 d_sink_strides[3];
    i64 batch, heads, queries;
    i64 span;
    int position_kind;
    int modality_kind;
    int modalities;
    int unused;
};

// A closed form of the geometric sum; expm1 keeps it accurate where d is tiny. For d < 0 the sum is turned around: its
// largest term is the last one.
__device__ double log_sum(double decay, double e) {
    if (decay == 0) return log(e);
    double d = fabs(decay);
    double forward = log(expm1(-d * e) / expm1(-d));
    return decay < 0 ? forward + d * (e - 1) : forward;
}

// g(x) = x / expm1(x)
__device__ double bernoulli_quotient(double x) {
    return isinf(x) ? 0 : x / expm1(x);
}

// df/dd = e / expm1(d e) - 1 / expm1(d) = (g(d e) - g(d)) / d: a difference of nearly equal numbers where d e is small;
// there the series g(x) = 1 - x/2 + B2/2! x^2 + B4/4! x^4 + .. is subtracted term by term.
__device__ double log_sum_slope(double decay, double e) {
    double d = fabs(decay), x = d * e, slope;
    if (x < 0.1) {
        const double bernoulli[5] = {1.0 / 12, -1.0 / 720, 1.0 / 30240, -1.0 / 1209600, 1.0 / 47900160};
        double x_power = x * e, d_power = d; // d^(2k-1) e^2k and d^(2k-1)
        slope = -0.5 * (e - 1);
#pragma unroll
        for (int k = 0; k < 5; k++) {
            slope += bernoulli[k] * (x_power - d_power);
            x_power *= x * x;
            d_power *= d * d;
        }
    } else {
        slope = (bernoulli_quotient(x) - bernoulli_quotient(d)) / d;
    }
    return decay < 0 ? -(e - 1) - slope : slope;
}

// e of a query, 0 where there are no pseudo-scores, and its modality.
template <class Params>
__device__ i64 masked_positions(const Params& p, i64 b, i64 i, int& modality) {
    i64 id = read_integer(p.modality, b * p.modality_strides[0] + i * p.modality_strides[1], p.modality_kind);
    modality = checked_modality(id, p.modalities, p.record, 1, b, i);
    i64 position = read_integer(p.position, b * p.position_strides[0] + i * p.position_strides[1], p.position_kind);
    return modality == PADDING || position >= p.span - 1 ? 0 : p.span - 1 - position;
}

// A thread for every (b, h, i).
extern "C" __global__ void __launch_bounds__(256) pseudo_sink(const __grid_constant__ pseudo_sink_params p) {
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x;
    if (at >= p.batch * p.heads * p.queries) return;
    i64 i = at % p.queries, h = at / p.queries % p.heads, b = at / p.queries / p.heads;
    int m;
    i64 e = masked_positions(p, b, i, m);
    double z = -__longlong_as_double(0x7ff0000000000000LL);
    if (e > 0) {
        double decay = p.decay[m * p.decay_strides[0] + h * p.decay_strides[1]];
        z = (double)p.base[m * p.base_strides[0] + h * p.base_strides[1]] + log_sum(decay, (double)e);
    }
    p.sink[at] = (real)z;
}

// A block for every (m, h); a thread adds the rows it meets in order, then the threads' sums are added in order.
extern "C" __global__ void __launch_bounds__(256) pseudo_sink_backward(const __grid_constant__ pseudo_sink_backward_params p) {
    __shared__ double sums[2][256];
    i64 h = blockIdx.x % p.heads;
    int m = (int)(blockIdx.x / p.heads);
    double decay = p.decay[m * p.decay_strides[0] + h * p.decay_strides[1]], d_decay = 0, d_base = 0;
    for (i64 row = threadIdx.x; row < p.batch * p.queries; row += 256) {
        i64 b = row / p.queries, i = row % p.queries;
        int modality;
        i64 e = masked_positions(p, b, i, modality);
        if (e > 0 && modality == m) {
            double upstream = p.d_sink[b * p.d_sink_strides[0] + h * p.d_sink_strides[1] + i * p.d_sink_strides[2]];
            d_decay += upstream * log_sum_slope(decay, (double)e);
            d_base += upstream;
        }
    }
    sums[0][threadIdx.x] = d_decay;
    sums[1][threadIdx.x] = d_base;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[0][threadIdx.x] += sums[0][threadIdx.x + half];
            sums[1][threadIdx.x] += sums[1][threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        p.d_decay[blockIdx.x] = (real)sums[0][0];
        p.d_base[blockIdx.x] = (real)sums[1][0];
    }
}
