// Gradients of keys and values: dV_j = sum_i P_ij dO_i,  dK_j = scale sum_i dS_ij q_i,  dS = P (dP - delta),  P = exp(s - L).
//
// A block takes KEYS keys of one key head and goes through the queries of all heads that read it, in a fixed order: no atomics, the
// same bits every time. Scores are computed transposed (keys x queries), so that probabilities are at once the left operand of the
// next product and never leave the registers.
// Defines besides attend.cuh's: HEAD_DIM, WARPS (KEYS = 16 WARPS), QUERIES (of a tile), STAGES (tiles of queries in flight), and
// OUTPUT (1 dV, 2 dK, 3 both: where the registers do not hold both sums there is a launch for each).

struct attend_keys_params {
    attend_inputs inputs;
    const element* out_gradient;  // (B, Hq, Nq, D)
    const real* logsumexp;        // (B, Hq, PARTS, Nq)
    const real* delta;            // (B, Hq, PARTS, Nq)
    element* key_gradient;        // (B, Hkv, Nk, D) contiguous
    element* value_gradient;      // (B, Hkv, Nk, D) contiguous
    i64 out_gradient_strides[3];
};

constexpr int THREADS = 32 * WARPS;
static_assert(KEYS == 16 * WARPS, "a warp owns 16 keys");

// A tile of queries: what the products read, and L in powers of two and delta of each softmax.
struct query_stage {
    element* query;
    element* out_gradient;
    real* logsumexp;  // (PARTS, QUERIES)
    real* delta;
};

extern "C" __global__ void __launch_bounds__(THREADS) attend_keys(const __grid_constant__ attend_keys_params p) {
    extern __shared__ __align__(16) u8 memory[];
    element* key_tile = (element*)memory;
    element* value_tile = key_tile + KEYS * PITCH;
    element* stages = value_tile + KEYS * PITCH;
    real* numbers = (real*)(stages + STAGES * 2 * QUERIES * PITCH);
    auto stage_at = [&](int stage) -> query_stage {
        element* tile = stages + stage * 2 * QUERIES * PITCH;
        real* rows = numbers + stage * 2 * PARTS * QUERIES;
        return {tile, tile + QUERIES * PITCH, rows, rows + PARTS * QUERIES};
    };
    const attend_inputs& in = p.inputs;
    const int b = blockIdx.x / in.key_heads, key_head = blockIdx.x % in.key_heads;
    const int first_key = blockIdx.y * KEYS, warp_key = threadIdx.x / 32 * 16;
    const u8* key_codes = codes_of(in.key_codes, b, in.keys) + first_key;
    const u8* query_codes = codes_of(in.query_codes, b, in.queries);
    const bool keys_padded = in.key_summaries[(i64)b * blocks_of(in.keys) + first_key / TOKENS] & PADDED;
    const real factor = (real)in.scale * LOG2_E;

    // Tiles of queries, head by head.
    const int tiles = (in.queries + QUERIES - 1) / QUERIES;
    int index = -1, head = 0, first = 0;
    tile_of_pairs pairs;
    auto advance = [&] {
        do {
            if (++index >= in.group * tiles) return;
            head = key_head * in.group + index / tiles, first = index % tiles * QUERIES;
            const int last = min(in.queries, first + QUERIES);
            pairs = judge(in, b, head, query_modality(in, b, first, last), reach(in, b, first, last), first_key);
        } while (pairs.hidden);
    };
    auto load_stage = [&](query_stage to) {
        const int last = in.queries - first;
        auto there = [&](int row) { return row < last && query_codes[first + row] != PADDING; };
        const i64* strides = in.query_strides;
        load_rows<QUERIES, THREADS>(
            to.query, in.query + b * strides[0] + head * strides[1] + first * strides[2], strides[2], there
        );
        strides = p.out_gradient_strides;
        load_rows<QUERIES, THREADS>(
            to.out_gradient, p.out_gradient + b * strides[0] + head * strides[1] + first * strides[2], strides[2], there
        );
        for (int row = threadIdx.x; row < PARTS * QUERIES; row += THREADS) {
            const int part = row / QUERIES, query = first + row % QUERIES;
            const i64 at = (((i64)b * in.heads + head) * PARTS + part) * in.queries + query;
            to.logsumexp[row] = query < in.queries ? p.logsumexp[at] * LOG2_E : INFINITE;
            to.delta[row] = query < in.queries ? p.delta[at] : 0;
        }
    };

    real key_sums[1][DIM / 8][4], value_sums[1][DIM / 8][4];
    clear(key_sums);
    clear(value_sums);
    advance();
    if (index < in.group * tiles) {
        auto there = [&](int row) { return !keys_padded || key_codes[row] != PADDING; };
        const i64* strides = in.key_strides;
        load_rows<KEYS, THREADS>(
            key_tile, in.key + b * strides[0] + key_head * strides[1] + first_key * strides[2], strides[2], there
        );
        strides = in.value_strides;
        load_rows<KEYS, THREADS>(
            value_tile, in.value + b * strides[0] + key_head * strides[1] + first_key * strides[2], strides[2], there
        );
        load_stage(stage_at(0));
        commit();
    }
    int stage = 0;
    while (index < in.group * tiles) {
        const tile_of_pairs now = pairs;
        const int now_head = head, now_first = first;
        const query_stage rows = stage_at(stage);
        advance();
        const bool more = index < in.group * tiles;
        if (STAGES == 2) {
            if (more) load_stage(stage_at(stage ^ 1));
            commit();
            wait<1>();
        } else {
            wait<0>();
        }
        __syncthreads();

        real weights[1][QUERIES / 8][4];
        clear(weights);
        dots(weights, key_tile + warp_key * PITCH, rows.query);
        real scale = factor, added = now.added;
        u32 cross = now.is_self ? 0 : EVERY;  // bit 4 n + e: whether that pair is of two modalities
        if (now.masked) {
            cross = now.mixed
                ? mask_columns<true>(in, weights[0], factor, added, b, now_head, now_first, first_key + warp_key)
                : mask_columns<false>(in, weights[0], factor, added, b, now_head, now_first, first_key + warp_key) | cross;
            scale = 1, added = 0;
        }
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int part = PARTS == 2 && cross >> (4 * n + e) & 1;
                const real base = rows.logsumexp[part * QUERIES + fragment_column(n, e)];
                weights[0][n][e] = weight_of(weights[0][n][e], scale, added, base);
            }
        if (OUTPUT & 1) weighted(value_sums, weights, rows.out_gradient);
        if (OUTPUT & 2) {
            real gradients[1][QUERIES / 8][4];
            clear(gradients);
            dots(gradients, value_tile + warp_key * PITCH, rows.out_gradient);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int part = PARTS == 2 && cross >> (4 * n + e) & 1;
                    const real delta = rows.delta[part * QUERIES + fragment_column(n, e)];
                    gradients[0][n][e] = weights[0][n][e] * (gradients[0][n][e] - delta);
                }
            weighted(key_sums, gradients, rows.query);
        }
        __syncthreads();
        if (STAGES == 2) {
            stage ^= 1;
        } else if (more) {
            load_stage(stage_at(0));
            commit();
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = first_key + warp_key + fragment_row(0, 2 * half);
        if (key >= in.keys) continue;
        const i64 at = ((i64)blockIdx.x * in.keys + key) * HEAD_DIM;
        if (OUTPUT & 1) store_row(p.value_gradient + at, value_sums[0], half, (real)1);
        if (OUTPUT & 2) store_row(p.key_gradient + at, key_sums[0], half, (real)in.scale);
    }
}
