// Gradients of key and value. With a the modality of token j, m the same where it feeds a basis:
//
//   dk^ = dk' X^a^T + w dG^m^T [+ k^ dG^m where w = k^],   dk = dk' keep_a^T + (dk^ - k^ (k^ . dk^)) / ||k + eps||,   dv = k^ dG^m
//
// A block for every tile of tokens. Padding keys passed through; a value that fed no basis has no gradient.
// GRAM: w is the unit key, else the value. COMPUTED: the bases came from these tokens.

struct token_gradients_params {
    const element* key;        // (B, H, N, D)
    const element* value;      // (B, H, N, D)
    const element* d_aligned;  // (B, H, N, D)
    const real* inverse;       // (B, H, N): 1 / ||k + eps||
    const real* keep;          // (M, D, D)
    const real* maps;          // (B, H, M, D, D)
    const real* d_bases;       // (B, H, M, D, D)
    const u8* codes;           // of every token
    const u8* sources;         // of the tokens that feed a basis
    element* d_key;            // (B, H, N, D) contiguous
    element* d_value;          // (B, H, N, D) contiguous
    i64 key_strides[3];
    i64 value_strides[3];
    i64 d_aligned_strides[3];
    i64 heads;                 // H
    i64 tokens;                // N
    i64 blocks;                // blocks of codes in a row
    i64 modalities;            // M
    i64 dim;                   // real components of a key
    double eps;
};

constexpr int SHARERS = Sums<ROWS, COLUMNS>::SHARERS;

extern "C" __global__ void __launch_bounds__(THREADS) token_gradients(const __grid_constant__ token_gradients_params p) {
    __shared__ union {
        Panels<ROWS, COLUMNS> panels;
        real along[ROWS][SHARERS];
    } shared;
    __shared__ alignas(4) u8 codes[ROWS], sources[ROWS];
    i64 tiles = (p.tokens + ROWS - 1) / ROWS;
    i64 head = blockIdx.x / tiles, first = blockIdx.x % tiles * ROWS, b = head / p.heads, h = head % p.heads;
    const element* key = p.key + b * p.key_strides[0] + h * p.key_strides[1] + first * p.key_strides[2];
    const element* value = p.value + b * p.value_strides[0] + h * p.value_strides[1] + first * p.value_strides[2];
    const element* d_aligned = p.d_aligned + b * p.d_aligned_strides[0] + h * p.d_aligned_strides[1] + first * p.d_aligned_strides[2];
    const real* inverse = p.inverse + head * p.tokens + first;
    Shift shift = {(real)p.eps, (int)p.dim};
    load_codes(codes, p.codes + b * p.blocks * TOKENS, first, p.blocks * TOKENS);
    load_codes(sources, p.sources + b * p.blocks * TOKENS, first, p.blocks * TOKENS);
    __syncthreads();
    auto of_head = [&](const real* matrices, int m) { return matrices + (head * p.modalities + m) * (HEAD_DIM * HEAD_DIM); };
    auto square_rows = [&](const real* matrix) { return [=](int row, int column) { return matrix_four(matrix, row, column); }; };
    auto upstream_of = [&](int a) {
        return [&, a](int row, int column) {
            return codes[row] == a && column < HEAD_DIM ? load_four(d_aligned + row * p.d_aligned_strides[2] + column) : zeros();
        };
    };
    auto value_of = [&](int m) {
        return [&, m](int row, int column) {
            return sources[row] == m && column < HEAD_DIM ? load_four(value + row * p.value_strides[2] + column) : zeros();
        };
    };
    auto unit_of = [&](int m) {
        return [&, m](int row, int column) {
            if (sources[row] != m || column >= HEAD_DIM) return zeros();
            return unit_four(key + row * p.key_strides[2], column, inverse[row], shift);
        };
    };

    // dk^
    Sums<ROWS, COLUMNS> sums;
    clear(sums);
    for (int a = next_modality(codes, -1); a != PADDING; a = next_modality(codes, a))
        add_product<ACROSS, ACROSS, EXACT, ROUNDED>(sums, shared.panels, HEAD_DIM, upstream_of(a), square_rows(of_head(p.maps, a)));
    for (int m = COMPUTED ? next_modality(sources, -1) : PADDING; m != PADDING; m = next_modality(sources, m)) {
        auto d_basis = square_rows(of_head(p.d_bases, m));
        if (GRAM) {
            add_product<ACROSS, ACROSS, ROUNDED, ROUNDED>(sums, shared.panels, HEAD_DIM, unit_of(m), d_basis);
            add_product<ACROSS, ALONG, ROUNDED, ROUNDED>(sums, shared.panels, HEAD_DIM, unit_of(m), d_basis);
        } else {
            add_product<ACROSS, ACROSS, EXACT, ROUNDED>(sums, shared.panels, HEAD_DIM, value_of(m), d_basis);
        }
    }

    // the part across k^, and what comes straight through keep
    auto unit = [&](int row, int column) { return (widen(key[row * p.key_strides[2] + column]) + shift(column)) * inverse[row]; };
    __syncthreads(); // the panels have been read
    sums.each_row([&](int row, auto entries) {
        real along = 0;
        if (codes[row] != PADDING)
            entries([&](int column, real& sum) {
                if (column < HEAD_DIM) along += unit(row, column) * sum;
            });
        shared.along[row][sums.sharer()] = along;
    });
    __syncthreads();
    sums.each_row([&](int row, auto entries) {
        real along = 0;
        for (int sharer = 0; sharer < SHARERS; sharer++) along += shared.along[row][sharer];
        bool real_token = codes[row] != PADDING;
        entries([&](int column, real& sum) {
            sum = real_token && column < HEAD_DIM ? (sum - unit(row, column) * along) * inverse[row] : 0;
        });
    });
    for (int a = next_modality(codes, -1); a != PADDING; a = next_modality(codes, a)) {
        const real* keep = p.keep + (i64)a * (HEAD_DIM * HEAD_DIM);
        add_product<ACROSS, ACROSS, EXACT, ROUNDED>(sums, shared.panels, HEAD_DIM, upstream_of(a), square_rows(keep));
    }
    element* d_key = p.d_key + (head * p.tokens + first) * HEAD_DIM;
    store_tokens(sums, shared.panels, d_key, p.tokens - first, [&](int row) {
        return codes[row] == PADDING ? d_aligned + row * p.d_aligned_strides[2] : nullptr;
    });

    clear(sums);
    if (COMPUTED && !GRAM)
        for (int m = next_modality(sources, -1); m != PADDING; m = next_modality(sources, m))
            add_product<ACROSS, ALONG, ROUNDED, ROUNDED>(sums, shared.panels, HEAD_DIM, unit_of(m), square_rows(of_head(p.d_bases, m)));
    element* d_value = p.d_value + (head * p.tokens + first) * HEAD_DIM;
    store_tokens(sums, shared.panels, d_value, p.tokens - first, [](int) -> const element* { return nullptr; });
}
