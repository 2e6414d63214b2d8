// A second pass over the rows of queries, their logsumexp known: P = exp(s - L) needs no running maximum.
//
//   MASS 0:  dQ_i = scale sum_j dS_ij k_j,  dS = P (dP - delta);  with BIAS_SUMS also sums[i][m] = sum of dS_ij over keys of modality m
//   MASS 1:  sums[i][m] = sum of P_ij over keys of modality m, sums[i][M] = mass of the pseudo-scores
//
// A block takes ROWS query rows of one head and goes through the key tiles. Each row of `sums` is added to by one lane alone, in the
// order of the keys.
// Defines besides attend.cuh's: HEAD_DIM, WARPS, ROW_TILES, STAGES (tiles of keys in flight).

struct attend_rows_params {
    attend_inputs inputs;
    const element* out_gradient;  // (B, Hq, Nq, D)
    const real* logsumexp;        // (B, Hq, PARTS, Nq)
    const real* delta;            // (B, Hq, PARTS, Nq)
    element* query_gradient;      // (B, Hq, Nq, D) contiguous
    real* sums;                   // (B, Hq, Nq, columns) contiguous
    i64 out_gradient_strides[3];
    i64 columns;
};

constexpr int THREADS = 32 * WARPS;
#define SUMS (MASS || BIAS_SUMS)

// Sums over keys of one modality, kept in registers while tiles of that modality follow each other.
struct modality_run {
    int modality;
    real sums[ROW_TILES][2];
};

// `row_of_sums(row)` is where the sums of a row of the warp lie, null where there is no such row.
template <class RowOfSums>
__device__ __forceinline__ void add_to_rows(RowOfSums row_of_sums, int modality, const real (&sums)[ROW_TILES][2]) {
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            real sum = row_sum(sums[t][half]);
            real* row = row_of_sums(here(fragment_row(t, 2 * half)));
            if (row && lane() % 4 == 0) row[modality] += sum;
        }
}

template <class RowOfSums>
__device__ __forceinline__ void flush(RowOfSums row_of_sums, modality_run& run) {
    if (run.modality != PADDING) add_to_rows(row_of_sums, run.modality, run.sums);
    run = {PADDING, {}};
}

// Adds the values of one tile to the sums of their rows.
template <class RowOfSums>
__device__ __forceinline__ void add_by_modality(
    RowOfSums row_of_sums, modality_run& run, const real (&values)[ROW_TILES][KEYS / 8][4], int modality,
    const u8* codes
) {
    if (modality != MIXED) {
        if (modality != run.modality) flush(row_of_sums, run);
        run.modality = modality;
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) run.sums[t][e / 2] += values[t][n][e];
        return;
    }
    flush(row_of_sums, run);
    // The modalities among the keys, from the smallest on; each lane looks after two keys.
    int left[2];
    for (int i = 0; i < 2; i++) left[i] = 32 * i + lane() < KEYS ? codes[32 * i + lane()] : PADDING;
    while (true) {
        int present = min(left[0], left[1]);
        for (int other = 16; other > 0; other /= 2) present = min(present, __shfl_xor_sync(EVERY, present, other));
        if (present == PADDING) return;
        real sums[ROW_TILES][2] = {};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                if (codes[fragment_column(n, odd)] != present) continue;
#pragma unroll
                for (int t = 0; t < ROW_TILES; t++) sums[t][0] += values[t][n][odd], sums[t][1] += values[t][n][2 + odd];
            }
        add_to_rows(row_of_sums, present, sums);
        for (int i = 0; i < 2; i++) left[i] = left[i] == present ? PADDING : left[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_rows(const __grid_constant__ attend_rows_params p) {
    extern __shared__ __align__(16) u8 memory[];
    element* query_tile = (element*)memory;
    element* gradient_tile = query_tile + ROWS * PITCH;
    element* stages = gradient_tile + (MASS ? 0 : ROWS * PITCH);
    auto key_tile = [&](int stage) { return stages + stage * (MASS ? 1 : 2) * KEYS * PITCH; };
    auto value_tile = [&](int stage) { return key_tile(stage) + KEYS * PITCH; };
    const attend_inputs& in = p.inputs;
    const int b = blockIdx.x / in.heads, head = blockIdx.x % in.heads, key_head = head / in.group;
    const int first = (gridDim.y - 1 - blockIdx.y) * ROWS, last = min(in.queries, first + ROWS);
    const int warp_row = threadIdx.x / 32 * 16 * ROW_TILES;
    auto row_at = [&](int row) -> row_of_queries { return {head, first + warp_row + row < last ? first + warp_row + row : -1}; };
    const int own = query_modality(in, b, first, last);
    const int4 reached = reach(in, b, first, last);
    const u8* key_codes = codes_of(in.key_codes, b, in.keys);
    const u8* query_codes = codes_of(in.query_codes, b, in.queries);
    const real factor = (real)in.scale * LOG2_E;

    int tile = -1;
    const int tiles = (in.keys + KEYS - 1) / KEYS;
    tile_of_pairs pairs;
    auto advance = [&] {
        do {
            if (++tile >= tiles) return;
            pairs = judge(in, b, head, own, reached, tile * KEYS);
        } while (pairs.hidden);
    };
    auto load_stage = [&](int stage) {
        const int first_key = tile * KEYS;
        auto there = [&](int row) { return !pairs.padded || key_codes[first_key + row] != PADDING; };
        const i64* strides = in.key_strides;
        load_rows<KEYS, THREADS>(
            key_tile(stage), in.key + b * strides[0] + key_head * strides[1] + first_key * strides[2], strides[2], there
        );
        if (MASS) return;
        strides = in.value_strides;
        load_rows<KEYS, THREADS>(
            value_tile(stage), in.value + b * strides[0] + key_head * strides[1] + first_key * strides[2], strides[2], there
        );
    };

    auto row_of_sums = [&](int row) -> real* {
        const int query = row_at(row).query;
        return query >= 0 ? p.sums + ((i64)blockIdx.x * in.queries + query) * p.columns : nullptr;
    };
    real logsumexp[PARTS][ROW_TILES][2], delta[PARTS][ROW_TILES][2];  // in powers of two
    bool seen[PARTS][ROW_TILES][2] = {};
    modality_run run = {PADDING, {}};
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = row_at(fragment_row(t, 2 * half)).query;
            const i64 unit_of_rows = blockIdx.x;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const i64 at = (unit_of_rows * PARTS + part) * in.queries + query;
                logsumexp[part][t][half] = query >= 0 ? p.logsumexp[at] * LOG2_E : INFINITE;
                delta[part][t][half] = query >= 0 && !MASS ? p.delta[at] : 0;
            }
            if (SUMS && query >= 0 && lane() % 4 == 0) {
                for (int column = 0; column < p.columns; column++) row_of_sums(fragment_row(t, 2 * half))[column] = 0;
            }
        }
    real sums[ROW_TILES][DIM / 8][4];
    clear(sums);

    advance();
    if (tile < tiles) {
        auto there = [&](int row) { return first + row < last && query_codes[first + row] != PADDING; };
        const i64* strides = in.query_strides;
        load_rows<ROWS, THREADS>(
            query_tile, in.query + b * strides[0] + head * strides[1] + first * strides[2], strides[2], there
        );
        strides = p.out_gradient_strides;
        if (!MASS) {
            load_rows<ROWS, THREADS>(
                gradient_tile, p.out_gradient + b * strides[0] + head * strides[1] + first * strides[2], strides[2], there
            );
        }
        load_stage(0);
        commit();
    }
    int stage = 0;
    while (tile < tiles) {
        const tile_of_pairs now = pairs;
        const int first_key = tile * KEYS, now_stage = stage;
        advance();
        if (STAGES == 2) {
            if (tile < tiles) load_stage(stage ^= 1);
            commit();
            wait<1>();
        } else {
            wait<0>();
        }
        __syncthreads();

        real weights[ROW_TILES][KEYS / 8][4];
        clear(weights);
        dots(weights, query_tile + warp_row * PITCH, key_tile(now_stage));
        real scale = factor, added = now.added;
        u32 cross[ROW_TILES];  // bit 4 n + e: whether that pair is of two modalities
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) cross[t] = now.is_self ? 0 : EVERY;
        if (now.masked) {
            if (now.mixed) {
                mask_pairs<true>(in, weights, factor, added, b, first_key, row_at, cross);
            } else {
                mask_pairs<false>(in, weights, factor, added, b, first_key, row_at, cross);
            }
            scale = 1, added = 0;
        }
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const bool second = PARTS == 2 && cross[t] >> (4 * n + e) & 1;
                    if (MASS) (second ? seen[PARTS - 1] : seen[0])[t][e / 2] |= weights[t][n][e] != -INFINITE;
                    const real base = second ? logsumexp[PARTS - 1][t][e / 2] : logsumexp[0][t][e / 2];
                    weights[t][n][e] = weight_of(weights[t][n][e], scale, added, base);
                }
#if !MASS
        real gradients[ROW_TILES][KEYS / 8][4];
        clear(gradients);
        dots(gradients, gradient_tile + warp_row * PITCH, value_tile(now_stage));
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const bool second = PARTS == 2 && cross[t] >> (4 * n + e) & 1;
                    const real mean = second ? delta[PARTS - 1][t][e / 2] : delta[0][t][e / 2];
                    weights[t][n][e] *= gradients[t][n][e] - mean;
                }
        weighted(sums, weights, key_tile(now_stage));
#endif
        if (SUMS) add_by_modality(row_of_sums, run, weights, now.modality, key_codes + first_key);
        __syncthreads();
        if (STAGES == 1 && tile < tiles) {
            load_stage(0);
            commit();
        }
    }

    if (SUMS) flush(row_of_sums, run);
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = row_at(fragment_row(t, 2 * half)).query;
#if MASS
            real pseudo = 0;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const bool any = __ballot_sync(EVERY, seen[part][t][half]) >> (lane() & 28) & 15;
                if (!any || query < 0) continue;
                const real z = sink_at(in, b, head, query, part) * LOG2_E;
                // L is +inf where an infinite sink took it all.
                pseudo += z == logsumexp[part][t][half] ? (real)1 : power2(z - logsumexp[part][t][half]);
            }
            if (query >= 0 && lane() % 4 == 0) row_of_sums(fragment_row(t, 2 * half))[p.columns - 1] = pseudo;
#else
            if (query < 0) continue;
            store_row(p.query_gradient + ((i64)blockIdx.x * in.queries + query) * HEAD_DIM, sums[t], half, (real)in.scale);
#endif
        }
}
