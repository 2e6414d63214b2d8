// Element types. DTYPE says how tensors store their elements: 0 float32, 1 float64, 2 bfloat16, 3 float16.
// `element` is that type, `real` the one all arithmetic runs in: float, or double for float64.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#if DTYPE == 0
typedef float element;
typedef float real;
__device__ __forceinline__ real widen(element x) { return x; }
__device__ __forceinline__ element narrow(real x) { return x; }
#elif DTYPE == 1
typedef double element;
typedef double real;
__device__ __forceinline__ real widen(element x) { return x; }
__device__ __forceinline__ element narrow(real x) { return x; }
#elif DTYPE == 2
typedef u16 element;
typedef float real;
__device__ __forceinline__ real widen(element x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ element narrow(real x) {
    element bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#elif DTYPE == 3
typedef u16 element;
typedef float real;
__device__ __forceinline__ real widen(element x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}
__device__ __forceinline__ element narrow(real x) {
    element bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#else
#error "DTYPE must be 0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)"
#endif
