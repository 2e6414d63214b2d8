// Key ranges as the attention kernels read them, from a tensor (B|1, Nq, 2) of any integer dtype.
//
//   ranges  int2 (B|1, Nq)      first key and one past the last, clamped to 0 .. Nk
//   spans   int4 (B|1, blocks)  of every TOKENS queries: x .. y the keys that any of them sees, z .. w those that all of them see

struct encode_ranges_params {
    const void* given;
    int2* ranges;
    int4* spans;
    i64 strides[3];
    i64 queries;
    i64 keys;
    i64 kind;  // of the integers, as read_integer takes it
};

extern "C" __global__ void __launch_bounds__(TOKENS) encode_ranges(const __grid_constant__ encode_ranges_params p) {
    __shared__ int4 spans[TOKENS];
    const i64 blocks = (p.queries + TOKENS - 1) / TOKENS, b = blockIdx.x / blocks;
    const i64 query = blockIdx.x % blocks * TOKENS + threadIdx.x;
    // Past the end: nobody, who does not count.
    int4 span = make_int4(p.keys, 0, 0, p.keys);
    if (query < p.queries) {
        int bounds[2];
        for (int side = 0; side < 2; side++) {
            i64 bound = read_integer(p.given, b * p.strides[0] + query * p.strides[1] + side * p.strides[2], p.kind);
            bounds[side] = bound < 0 ? 0 : bound > p.keys ? p.keys : bound;
        }
        p.ranges[b * p.queries + query] = make_int2(bounds[0], bounds[1]);
        // Who sees nothing is no reason to load a key, and none to go without masks.
        span = bounds[0] < bounds[1] ? make_int4(bounds[0], bounds[1], bounds[0], bounds[1]) : make_int4(p.keys, 0, p.keys, 0);
    }
    spans[threadIdx.x] = span;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < TOKENS; other++) {
            int4 next = spans[other];
            span = make_int4(min(span.x, next.x), max(span.y, next.y), max(span.z, next.z), min(span.w, next.w));
        }
        p.spans[blockIdx.x] = span;
    }
}
