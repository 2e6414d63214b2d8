// Forward (paper, equations 7 to 10): o_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(z_i)), tile by tile of keys with a running
// maximum (FlashAttention-2).
//
// A block takes ROWS query rows of one head, a warp 16 ROW_TILES of them: with 32 rows a warp, what a tile costs in shared memory
// stays below what it costs in products. Queries stay in shared memory, sums in registers. Copies run one product ahead: the values
// of a tile come in while its scores are computed, the keys of the next one while the softmax and the weighted sum are.
//
// With SPLIT, for few queries: rows are all queries of all heads that read one key head, a block takes a share of the key tiles and
// leaves its running softmax to `attend_combine`.
// Defines besides attend.cuh's: HEAD_DIM, WARPS, ROW_TILES, MASS (keep self and cross apart), SPLIT.

struct attend_forward_params {
    attend_inputs inputs;
    element* out;          // (B, Hq, Nq, D) contiguous; PART 0
    real* parts;           // (B, Hq, 2, Nq, D) contiguous; PART 1 and 2
    real* logsumexp;       // (B, Hq, parts, Nq)
    real* mass;            // (B, Hq, Nq, 3); MASS
    real* partial_sums;    // (B, Hkv, splits, rows, D); SPLIT
    real* partial_totals;  // (B, Hkv, splits, rows, 3): row_total; SPLIT
    i64 tiles;             // key tiles of a split; SPLIT
};

constexpr int THREADS = 32 * WARPS;

// Rows with a number that is not finite become NaN throughout, whatever the keys; all of them change sign where the scale is
// negative, so that the highest product is the highest score.
__device__ __forceinline__ void prepare_queries(element* tile, bool negative) {
    for (int row = threadIdx.x; row < ROWS; row += THREADS) {
        unit* units = (unit*)(tile + row * PITCH);
        real zero = 0;
        for (int at = 0; at < DIM / UNIT; at++) {
            unit numbers = units[at];
#pragma unroll
            for (int u = 0; u < UNIT; u++) zero += widen(numbers.at[u]) * 0;
        }
        if (zero == 0 && !negative) continue;
        for (int d = 0; d < DIM; d++) tile[row * PITCH + d] = narrow((negative ? -1 : 1) * widen(tile[row * PITCH + d]) + zero);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_forward(const __grid_constant__ attend_forward_params p) {
    extern __shared__ __align__(16) u8 memory[];
    element* query_tile = (element*)memory;
    element* key_tile = query_tile + ROWS * PITCH;
    element* value_tile = key_tile + KEYS * PITCH;
    const attend_inputs& in = p.inputs;
    const int warp_row = threadIdx.x / 32 * 16 * ROW_TILES;

#if SPLIT
    const int b = blockIdx.x / in.key_heads, key_head = blockIdx.x % in.key_heads, head = key_head * in.group;
    const int first_row = blockIdx.y * ROWS, rows = in.group * in.queries;
    const int first = 0, last = in.queries;
    auto row_at = [&](int row) -> row_of_queries {
        int at = first_row + row;
        return at < rows ? row_of_queries{head + at / in.queries, at % in.queries} : row_of_queries{head, -1};
    };
    const int begin = blockIdx.z * (int)p.tiles, end = min((in.keys + KEYS - 1) / KEYS, begin + (int)p.tiles);
#else
    const int b = blockIdx.x / in.heads, head = blockIdx.x % in.heads, key_head = head / in.group;
    // With a causal limit the last queries see the most keys: they go first.
    const int first = (gridDim.y - 1 - blockIdx.y) * ROWS, last = min(in.queries, first + ROWS);
    auto row_at = [&](int row) -> row_of_queries { return {head, first + row < last ? first + row : -1}; };
    const int begin = 0, end = (in.keys + KEYS - 1) / KEYS;
#endif
    auto warp_row_at = [&](int row) { return row_at(warp_row + row); };

    const int own = query_modality(in, b, first, last);
    const int4 reached = reach(in, b, first, last);
    const u8* key_codes = codes_of(in.key_codes, b, in.keys);
    const element* keys = in.key + b * in.key_strides[0] + key_head * in.key_strides[1];
    const element* values = in.value + b * in.value_strides[0] + key_head * in.value_strides[1];
    const real factor = (real)fabs(in.scale) * LOG2_E;

    int tile = begin - 1;
    tile_of_pairs pairs;
    // The next tile in which any pair is visible.
    auto advance = [&] {
        do {
            if (++tile >= end) return;
            pairs = judge(in, b, head, own, reached, tile * KEYS);
        } while (pairs.hidden);
    };
    auto load_tile = [&](element* target, const element* source, i64 stride) {
        const int first_key = tile * KEYS;
        load_rows<KEYS, THREADS>(target, source + first_key * stride, stride, [&](int row) {
            return !pairs.padded || key_codes[first_key + row] != PADDING;
        });
        commit();
    };

    real sums[ROW_TILES][DIM / 8][4];
    row_total totals[ROW_TILES][2];  // own and cross of this lane's columns only, until the end
    clear(sums);
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) totals[t][0] = totals[t][1] = {-INFINITE, 0, 0};

    advance();
    if (tile < end) {
        const element* queries = in.query + b * in.query_strides[0] + head * in.query_strides[1];
#if SPLIT
        for (int unit_at = threadIdx.x; unit_at < ROWS * DIM / UNIT; unit_at += THREADS) {
            const int row = unit_at / (DIM / UNIT), column = unit_at % (DIM / UNIT) * UNIT;
            const row_of_queries at = row_at(row);
            const bool there = at.query >= 0 && column < HEAD_DIM;
            const element* source = queries + (at.head - head) * in.query_strides[1] + at.query * in.query_strides[2] + column;
            copy_async(query_tile + row * PITCH + column, there ? source : queries, there);
        }
#else
        load_rows<ROWS, THREADS>(query_tile, queries + first * in.query_strides[2], in.query_strides[2], [&](int row) {
            return first + row < last;
        });
#endif
        commit();
        load_tile(key_tile, keys, in.key_strides[2]);
        wait<1>();
        __syncthreads();
        prepare_queries(query_tile, in.scale < 0);
        wait<0>();
        __syncthreads();
    }
    while (tile < end) {
        load_tile(value_tile, values, in.value_strides[2]);
        real scores[ROW_TILES][KEYS / 8][4];
        clear(scores);
        dots(scores, query_tile + warp_row * PITCH, key_tile);
        const tile_of_pairs now = pairs;
        const int first_key = tile * KEYS;
        advance();
        wait<0>();
        __syncthreads();
        if (tile < end) load_tile(key_tile, keys, in.key_strides[2]);

        real scale = factor, added = now.added;
        u32 cross[ROW_TILES];
        if (now.masked) {
            if (now.mixed) {
                mask_pairs<true>(in, scores, factor, added, b, first_key, warp_row_at, cross);
            } else {
                mask_pairs<false>(in, scores, factor, added, b, first_key, warp_row_at, cross);
            }
            scale = 1, added = 0;
        }
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_total& total = totals[t][half];
                real top = -INFINITE;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    top = larger(top, larger(scores[t][n][2 * half], scores[t][n][2 * half + 1]));
                top = larger(top, __shfl_xor_sync(EVERY, top, 1));
                top = larger(top, __shfl_xor_sync(EVERY, top, 2));
                top = larger(total.top, top * scale + added);
                const real base = top == -INFINITE ? (real)0 : top;
                const real kept = power2(total.top - base);
                total = {top, total.own * kept, total.cross * kept};
#pragma unroll
                for (int d = 0; d < DIM / 8; d++) sums[t][d][2 * half] *= kept, sums[t][d][2 * half + 1] *= kept;
                real sum = 0;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int odd = 0; odd < 2; odd++) {
                        real& score = scores[t][n][2 * half + odd];
                        score = weight_of(score, scale, added, base);
                        sum += score;
                    }
                if (!MASS || PART != 0) {
                    (PART == 2 ? total.cross : total.own) += sum;
                } else if (!now.mixed) {
                    (now.is_self ? total.own : total.cross) += sum;
                }
            }
        if (MASS && PART == 0 && now.mixed) {
#pragma unroll
            for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        row_total& total = totals[t][e / 2];
                        (cross[t] >> (4 * n + e) & 1 ? total.cross : total.own) += scores[t][n][e];
                    }
        }
        weighted(sums, scores, value_tile);
        wait<0>();
        __syncthreads();
    }

#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row_total& total = totals[t][half];
            total.own = row_sum(total.own), total.cross = row_sum(total.cross);
            const row_of_queries row = warp_row_at(fragment_row(t, 2 * half));
            if (row.query < 0) continue;
#if SPLIT
            const i64 at = (blockIdx.x * gridDim.z + blockIdx.z) * (i64)rows + first_row + warp_row + fragment_row(t, 2 * half);
            store_row(p.partial_sums + at * HEAD_DIM, sums[t], half, (real)1);
            if (lane() % 4 == 0) ((row_total*)p.partial_totals)[at] = total;
#else
            if (codes_of(in.query_codes, b, in.queries)[row.query] == PADDING) total = {-INFINITE, 0, 0};
            const closed_row closed = close_row(total, sink_at(in, b, head, row.query));
            const i64 at = (i64)blockIdx.x * in.queries + row.query;
#if PART == 0
            store_row(p.out + at * HEAD_DIM, sums[t], half, closed.factor);
            i64 softmax = at;
#else
            i64 softmax = (2 * (i64)blockIdx.x + (PART == 2)) * in.queries + row.query;
            store_row(p.parts + softmax * HEAD_DIM, sums[t], half, closed.factor);
#endif
            if (lane() % 4 == 0) {
                p.logsumexp[softmax] = closed.logsumexp;
                if (MASS) store_mass(p.mass + 3 * at, total, closed);
            }
#endif
        }
}
