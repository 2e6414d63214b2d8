// Rows of queries against a tile of keys: masks and bias in the fragments of their scores.

constexpr int ROWS = 16 * ROW_TILES * WARPS;  // of a block

// A row: query of a head; query -1 where there is none.
struct row_of_queries {
    int head;
    int query;
};

// Turns products into scores, -inf where a pair is not visible. `row_at(row)` names a row of the warp. Of mixed pairs, bit 4 n + e
// of `cross` says whether query and key are of two modalities.
template <bool MIXED_PAIRS, int N, class RowAt>
__device__ __forceinline__ void mask_pairs(
    const attend_inputs& p, real (&scores)[ROW_TILES][N][4], real factor, real added, int b, int first_key, RowAt row_at,
    u32 (&cross)[ROW_TILES]
) {
    b = here(b);
    const u8* keys = codes_of(p.key_codes, b, p.keys) + first_key;
    const u8* queries = codes_of(p.query_codes, b, p.queries);
    const int key = first_key + fragment_column(0, here(0));
    u16 codes[N];  // of this lane's two columns each
#pragma unroll
    for (int n = 0; n < N; n++) codes[n] = *(const u16*)(keys + key - first_key + 8 * n);
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
        if (MIXED_PAIRS) cross[t] = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row_of_queries row = row_at(here(fragment_row(t, 2 * half)));
            int own = row.query < 0 ? PADDING : queries[row.query];
            int2 seen = own == PADDING ? make_int2(0, 0) : visible(p, b, row.query);
            seen.x -= key, seen.y -= key;
            const real* table = nullptr;
#if BIAS
            table = bias_of(p, b, row.head);
#endif
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    int other = codes[n] >> 8 * odd & 255, column = 8 * n + odd;
                    bool sees = other != PADDING && column >= seen.x && column < seen.y;
                    real& score = scores[t][n][2 * half + odd];
                    score = masked_score<MIXED_PAIRS>(p, score, factor, added, sees, table, own, other);
                    if (MIXED_PAIRS && own != other) cross[t] |= 1u << (4 * n + 2 * half + odd);
                }
        }
    }
}
