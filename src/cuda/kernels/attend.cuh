// What every attention kernel shares: its inputs, which pairs of query and key are visible, and what is added to their scores.
//
//   s_ij = scale q_i . k_j + bias[m(i), m(j)]      in powers of two: times log2 e
//
// Defines: CAUSAL, BIAS (a table is given), RANGE (key ranges are given), PART (0 every key, 1 self keys, 2 cross keys; forward does
// the two softmaxes of "split" one after the other), PARTS (softmaxes of a row; backward does both at once), and KEYS, the keys of a
// tile, a divisor of TOKENS. A tile of pairs is judged once by the summaries of its tokens; only tiles with padding,
// a boundary or several modalities look at single tokens.

#ifndef BIAS
#define BIAS 0
#endif
#ifndef KEYS
#define KEYS TOKENS
#endif
#ifndef MASS
#define MASS 0
#endif
#ifndef PART
#define PART 0
#endif
#ifndef SPLIT
#define SPLIT 0
#endif
#ifndef PARTS
#define PARTS 1
#endif
#define TABLES (SPLIT && BIAS)  // whether the rows of a block have bias tables of their own

#define INFINITE ((real)__int_as_float(0x7f800000))
constexpr real LOG2_E = 1.4426950408889634;
constexpr real LN_2 = 0.6931471805599453;

struct attend_inputs {
    const element* query;        // (B, Hq, Nq, D)
    const element* key;          // (B, Hkv, Nk, D)
    const element* value;        // (B, Hkv, Nk, D)
    const real* sink;            // (B, Hq, Nq, parts) or null
    const real* bias;            // (B, Hq, M, M)
    const u8* query_codes;       // ids.cuh
    const u8* key_codes;
    const u16* query_summaries;
    const u16* key_summaries;
    const int2* ranges;          // (B|1, Nq): first key and one past the last
    const int4* spans;           // (B|1, blocks of queries): ranges.cu
    i64 query_strides[3];
    i64 key_strides[3];
    i64 value_strides[3];
    i64 sink_strides[4];
    i64 bias_strides[4];
    double scale;
    int heads;                   // Hq
    int key_heads;               // Hkv
    int group;                   // query heads that read one key head
    int queries;                 // Nq
    int keys;                    // Nk
    int range_rows;              // batch rows of ranges
    int unused[2];
};

// One past the last key that the causal limit leaves a query.
__device__ __forceinline__ int limit(const attend_inputs& p, int query) {
#if CAUSAL
    return max(0, min(p.keys, query + 1 + p.keys - p.queries));
#else
    return p.keys;
#endif
}

// The keys first .. last that a query may see, but for padding, part and bias.
__device__ __forceinline__ int2 visible(const attend_inputs& p, int b, int query) {
    int2 seen = make_int2(0, limit(p, query));
#if RANGE
    int2 range = p.ranges[(i64)(p.range_rows == 1 ? 0 : b) * p.queries + query];
    seen = make_int2(range.x, min(seen.y, range.y));
#endif
    return seen;
}

// Of the queries first .. last: x .. y the keys that any of them may see, z .. w those that all of them do.
__device__ __forceinline__ int4 reach(const attend_inputs& p, int b, int first, int last) {
    int4 keys = make_int4(0, limit(p, last - 1), 0, limit(p, first));
#if RANGE
    const int4* spans = p.spans + (i64)(p.range_rows == 1 ? 0 : b) * blocks_of(p.queries);
    int4 all = spans[first / TOKENS];
    for (int block = first / TOKENS + 1; block * TOKENS < last; block++) {
        int4 next = spans[block];
        all = make_int4(min(all.x, next.x), max(all.y, next.y), max(all.z, next.z), min(all.w, next.w));
    }
    keys = make_int4(all.x, min(keys.y, all.y), all.z, min(keys.w, all.w));
#endif
    return keys;
}

// The modality of the queries first .. last.
__device__ __forceinline__ int query_modality(const attend_inputs& p, int b, int first, int last) {
    const u16* summaries = p.query_summaries + (i64)b * blocks_of(p.queries);
    int modality = modality_of(summaries[first / TOKENS]);
    for (int block = first / TOKENS + 1; block * TOKENS < last; block++) {
        modality = together(modality, modality_of(summaries[block]));
    }
    return modality;
}

#if BIAS
__device__ __forceinline__ const real* bias_of(const attend_inputs& p, int b, int head) {
    return p.bias + b * p.bias_strides[0] + head * p.bias_strides[1];
}

__device__ __forceinline__ real bias_at(const attend_inputs& p, const real* table, int own, int other) {
    return __ldg(table + own * p.bias_strides[2] + other * p.bias_strides[3]) * LOG2_E;
}
#endif

__device__ __forceinline__ real sink_at(const attend_inputs& p, int b, int head, int query, int part = PART == 2) {
    if (!p.sink) return -INFINITE;
    const i64* strides = p.sink_strides;
    return p.sink[b * strides[0] + head * strides[1] + query * strides[2] + part * strides[3]];
}

// Whether a pair of modalities belongs to the part that is computed.
__device__ __forceinline__ bool admits(int own, int other) { return PART == 0 || (own == other) == (PART == 1); }

// A tile of pairs of some queries with KEYS keys.
struct tile_of_pairs {
    bool hidden;   // no pair is visible
    bool padded;   // some keys are padding or past the end
    bool masked;   // some pairs may not be visible: every one has to be looked at
    bool mixed;    // part, bias or mass may differ from pair to pair
    bool is_self;  // of a tile that is not mixed: whether its pairs are of one modality
    int modality;  // that of the keys
    real added;    // bias of a tile that is not mixed
};

__device__ __forceinline__ tile_of_pairs judge(const attend_inputs& p, int b, int head, int own, int4 reached, int first_key) {
    int summary = p.key_summaries[(i64)b * blocks_of(p.keys) + first_key / TOKENS];
    tile_of_pairs tile;
    tile.modality = modality_of(summary);
    int last_key = first_key + KEYS;
    tile.hidden = own == PADDING || tile.modality == PADDING || first_key >= reached.y || last_key <= reached.x;
    tile.padded = summary & PADDED;
    tile.masked = tile.padded || first_key < reached.z || last_key > reached.w;
    tile.mixed = own == MIXED || tile.modality == MIXED || TABLES;
    tile.is_self = own == tile.modality;
    tile.added = 0;
    if (!tile.mixed) {
        tile.hidden |= !admits(own, tile.modality);
#if BIAS
        if (!tile.hidden) {
            tile.added = bias_at(p, bias_of(p, b, head), own, tile.modality);
            tile.hidden = tile.added == -INFINITE;
        }
#endif
    } else {
        tile.masked |= PART != 0 || PARTS == 2 || BIAS || MASS;
    }
    return tile;
}

// 2^(score - base), the score being product * factor + added.
__device__ __forceinline__ real weight_of(real product, real factor, real added, real base) {
#if DTYPE >= 2
    return power2(product * factor + (added - base));
#else
    // Subtracted last: near the base that is exact, while a sum with the bias rounds for the whole row.
    return power2(product * factor + added - base);
#endif
}

// A score from the product of a query and a key, -inf where the query does not see the key.
template <bool MIXED_PAIRS>
__device__ __forceinline__ real masked_score(
    const attend_inputs& p, real product, real factor, real added, bool seen, const real* table, int own, int other
) {
    if (MIXED_PAIRS) {
        seen = seen && admits(own, other);
#if BIAS
        added = seen ? bias_at(p, table, own, other) : -INFINITE;
        seen = added != -INFINITE;
#endif
    }
    return seen ? product * factor + added : -INFINITE;
}
