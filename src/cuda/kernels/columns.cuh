// Columns of queries against rows of keys: masks and bias in the transposed fragments of backward.

// Turns products (16 keys x 8 N queries) into scores, -inf where a pair is not visible. Returns a bit for each of the lane's
// pairs, 4 n + e, set where query and key are of two modalities; only for mixed pairs.
template <bool MIXED_PAIRS, int N>
__device__ __forceinline__ u32 mask_columns(
    const attend_inputs& p, real (&scores)[N][4], real factor, real added, int b, int head, int first_query, int first_key
) {
    const u8* keys = codes_of(p.key_codes, b, p.keys);
    const u8* queries = codes_of(p.query_codes, b, p.queries);
    const real* table = nullptr;
#if BIAS
    table = bias_of(p, b, head);
#endif
    int key[2], other[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        key[half] = first_key + fragment_row(0, here(2 * half));
        other[half] = keys[key[half]];
    }
    u32 cross = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int query = first_query + fragment_column(n, odd);
            const int own = queries[query];
            const int2 seen = own == PADDING ? make_int2(0, 0) : visible(p, b, query);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int e = 2 * half + odd;
                const bool sees = other[half] != PADDING && key[half] >= seen.x && key[half] < seen.y;
                scores[n][e] = masked_score<MIXED_PAIRS>(p, scores[n][e], factor, added, sees, table, own, other[half]);
                if (MIXED_PAIRS && own != other[half]) cross |= 1u << (4 * n + e);
            }
        }
    return cross;
}
