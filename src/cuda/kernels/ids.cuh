// Modality ids as the kernels read them. `ids.cu` writes them from the caller's tensors, once a call.
//
//   codes      u8   (B, blocks TOKENS)   the modality of every token; PADDING for padding and past the end of the row
//   summaries  u16  (B, blocks)          what a block of TOKENS tokens holds, blocks = ceil(N / TOKENS):
//                low byte: the modality of its real tokens, MIXED where they have several, PADDING where there are none
//                PADDED bit: one of its tokens at least is padding or past the end

constexpr int TOKENS = 64;
constexpr int MIXED = 254;  // so there are at most 254 modalities, 0 .. 253
constexpr int PADDING = 255;
constexpr int PADDED = 256;

__device__ __forceinline__ int blocks_of(int tokens) { return (tokens + TOKENS - 1) / TOKENS; }

// The codes of batch row b.
__device__ __forceinline__ const u8* codes_of(const u8* codes, int b, int tokens) {
    return codes + (i64)b * blocks_of(tokens) * TOKENS;
}

__device__ __forceinline__ int modality_of(int summary) { return summary & 255; }

// The modality of two neighbouring blocks taken together.
__device__ __forceinline__ int together(int a, int b) { return a == b || b == PADDING ? a : a == PADDING ? b : MIXED; }
