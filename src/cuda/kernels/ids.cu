// Codes and summaries (ids.cuh) of a tensor of modality ids (B, N). A token outside the context counts as padding.
// A block of threads for every block of tokens.

struct encode_ids_params {
    const void* ids;         // (B, N), any integer dtype
    const u8* context;       // (B, N) bool; null: every token is in the context
    u8* codes;
    u16* summaries;
    u64* record;             // the first offender
    i64 ids_strides[2];
    i64 context_strides[2];
    i64 tokens;              // N
    i64 blocks;              // of a row
    int kind;                // of the ids, as read_integer takes it
    int modalities;          // M
    int argument;            // 0 modality, 1 query_modality
    int unused;
};

extern "C" __global__ void __launch_bounds__(TOKENS) encode_ids(const __grid_constant__ encode_ids_params p) {
    __shared__ u8 codes[TOKENS];
    i64 b = blockIdx.x / p.blocks, j = blockIdx.x % p.blocks * TOKENS + threadIdx.x;
    int code = PADDING;
    if (j < p.tokens) {
        i64 id = read_integer(p.ids, b * p.ids_strides[0] + j * p.ids_strides[1], p.kind);
        code = checked_modality(id, p.modalities, p.record, p.argument, b, j);
        if (p.context && !p.context[b * p.context_strides[0] + j * p.context_strides[1]]) code = PADDING;
    }
    p.codes[(i64)blockIdx.x * TOKENS + threadIdx.x] = code;
    codes[threadIdx.x] = code;
    __syncthreads();
    if (threadIdx.x == 0) {
        int modality = PADDING, padded = 0;
        for (int token = 0; token < TOKENS; token++) {
            modality = together(modality, codes[token]);
            if (codes[token] == PADDING) padded = PADDED;
        }
        p.summaries[blockIdx.x] = modality | padded;
    }
}
