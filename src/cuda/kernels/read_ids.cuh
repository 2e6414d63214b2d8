// Modality ids of the caller's tensors, checked. What comes of them is in ids.cuh.

// An integer of a tensor of any integer dtype; `kind` is its size in bytes, negative where it is unsigned.
__device__ __forceinline__ i64 read_integer(const void* data, i64 at, int kind) {
    switch (kind) {
        case 1: return ((const signed char*)data)[at];
        case -1: return ((const u8*)data)[at];
        case 2: return ((const short*)data)[at];
        case -2: return ((const u16*)data)[at];
        case 4: return ((const int*)data)[at];
        case -4: return ((const u32*)data)[at];
        case 8: return ((const i64*)data)[at];
    }
    u64 value = ((const u64*)data)[at];
    return value >> 63 ? 0x7fffffffffffffffLL : (i64)value; // beyond every modality either way
}

__device__ __forceinline__ i64 clamped(i64 value, i64 least, i64 most) {
    return value < least ? least : value > most ? most : value;
}

// The modality of an id, PADDING for -1. One that is no modality counts as padding and is reported: the record keeps the
// smallest (argument, batch, token) with what was given there, so the first offender wins in whatever order threads run.
// Bits from the top: argument 1, batch 14, token 24, id + 2^16 17, M 8; a number too large for its field is the largest one
// the field holds.
__device__ __forceinline__ int checked_modality(i64 id, int modalities, u64* record, int argument, i64 batch, i64 token) {
    if (id >= 0 && id < modalities) return (int)id;
    if (id != -1) {
        u64 place = (u64)argument << 63 | (u64)clamped(batch, 0, (1 << 14) - 1) << 49 | (u64)clamped(token, 0, (1 << 24) - 1) << 25;
        u64 given = (u64)(clamped(id, -(1 << 16), (1 << 16) - 1) + (1 << 16));
        atomicMin(record, place | given << 8 | (u64)modalities);
    }
    return PADDING;
}
