// The two products every kernel is made of, over tiles in shared memory and fragments in registers:
//
//   dots:      scores (rows x columns) += A (rows x DIM) B (columns x DIM)^T
//   weighted:  sums   (rows x DIM)     += weights (rows x columns) B (columns x DIM)
//
// bfloat16 and float16 run on tensor cores (mma m16n8k16, float32 sums); float32 and float64 on plain multiply-adds, the same
// registers holding the same elements, so that everything between the products is written once.
//
// A warp owns 16 T rows. Of a fragment [T][N][4], lane l holds
//
//   element e of tile (t, n):  row 16 t + l / 4 + 8 (e / 2),  column 8 n + 2 (l % 4) + e % 2

constexpr u32 EVERY = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }
__device__ __forceinline__ int fragment_row(int t, int e) { return 16 * t + lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int fragment_column(int n, int e) { return 8 * n + lane() % 4 * 2 + e % 2; }

// x, computed here and not ahead of a loop: what is needed now and then shall not hold registers all the time.
__device__ __forceinline__ int here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ real row_sum(real x) {
    x += __shfl_xor_sync(EVERY, x, 1);
    return x + __shfl_xor_sync(EVERY, x, 2);
}

#if DTYPE == 1
__device__ __forceinline__ real larger(real a, real b) { return fmax(a, b); }
#else
__device__ __forceinline__ real larger(real a, real b) { return fmaxf(a, b); }
#endif

#if DTYPE == 0
__device__ __forceinline__ real power2(real x) { return exp2f(x); }
#elif DTYPE == 1
__device__ __forceinline__ real power2(real x) { return exp2(x); }
#else
__device__ __forceinline__ real power2(real x) {
    real y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

template <class Number>
__device__ __forceinline__ Number convert(real x);
template <>
__device__ __forceinline__ real convert<real>(real x) { return x; }
#if DTYPE >= 2
template <>
__device__ __forceinline__ element convert<element>(real x) { return narrow(x); }
#endif

// Row e / 2 of a fragment's tile of rows times a factor, into a row of HEAD_DIM numbers; zeros where the factor is 0.
template <class Number, int N>
__device__ __forceinline__ void store_row(Number* target, const real (&sums)[N][4], int half, real factor) {
    struct alignas(2 * sizeof(Number)) two { Number at[2]; };
#pragma unroll
    for (int n = 0; n < N; n++) {
        int column = fragment_column(n, 0);
        if (HEAD_DIM != DIM && column >= HEAD_DIM) continue;
        two numbers;
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            real number = factor == 0 ? (real)0 : sums[n][2 * half + odd] * factor;
            numbers.at[odd] = convert<Number>(number);
        }
        *(two*)(target + column) = numbers;
    }
}

template <int T, int N>
__device__ __forceinline__ void clear(real (&fragment)[T][N][4]) {
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) fragment[t][n][e] = 0;
}

#if DTYPE >= 2

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const element* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(u32 (&r)[4], const element* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if DTYPE == 2
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers as a register of two elements, `low` first in memory.
__device__ __forceinline__ u32 packed(float low, float high) {
    u32 both;
#if DTYPE == 2
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// `a` points at the warp's first row.
template <int T, int N>
__device__ __forceinline__ void dots(float (&scores)[T][N][4], const element* a, const element* b) {
    static_assert(N % 2 == 0, "columns come in steps of 16");
    const element* a_row = a + lane() % 16 * PITCH + lane() / 16 * 8;
    const element* b_row = b + (lane() % 8 + lane() / 16 * 8) * PITCH + lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < DIM; k += 16) {
        u32 left[T][4];
#pragma unroll
        for (int t = 0; t < T; t++) load_matrices(left[t], a_row + 16 * t * PITCH + k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrices(right, b_row + 8 * n * PITCH + k);
#pragma unroll
            for (int t = 0; t < T; t++) {
                multiply(scores[t][n], left[t], right[0], right[1]);
                multiply(scores[t][n + 1], left[t], right[2], right[3]);
            }
        }
    }
}

// The weights are rounded to elements.
template <int T, int N>
__device__ __forceinline__ void weighted(float (&sums)[T][DIM / 8][4], const float (&weights)[T][N][4], const element* b) {
    const element* b_row = b + lane() % 16 * PITCH + lane() / 16 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 left[T][4];
#pragma unroll
        for (int t = 0; t < T; t++) {
            left[t][0] = packed(weights[t][n][0], weights[t][n][1]);
            left[t][1] = packed(weights[t][n][2], weights[t][n][3]);
            left[t][2] = packed(weights[t][n + 1][0], weights[t][n + 1][1]);
            left[t][3] = packed(weights[t][n + 1][2], weights[t][n + 1][3]);
        }
#pragma unroll
        for (int d = 0; d < DIM / 8; d += 2) {
            u32 right[4];
            load_transposed(right, b_row + 8 * n * PITCH + 8 * d);
#pragma unroll
            for (int t = 0; t < T; t++) {
                multiply(sums[t][d], left[t], right[0], right[1]);
                multiply(sums[t][d + 1], left[t], right[2], right[3]);
            }
        }
    }
}

#else

template <int T, int N>
__device__ __forceinline__ void dots(real (&scores)[T][N][4], const element* a, const element* b) {
#pragma unroll 2
    for (int k = 0; k < DIM; k += UNIT) {
        unit left[T][2];
#pragma unroll
        for (int t = 0; t < T; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                left[t][half] = *(const unit*)(a + fragment_row(t, 2 * half) * PITCH + k);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                unit right = *(const unit*)(b + fragment_column(n, odd) * PITCH + k);
#pragma unroll
                for (int t = 0; t < T; t++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
#pragma unroll
                        for (int u = 0; u < UNIT; u++)
                            scores[t][n][2 * half + odd] += left[t][half].at[u] * right.at[u];
            }
    }
}

// A row's weights lie with four lanes; each is handed round to the other three.
template <int T, int N>
__device__ __forceinline__ void weighted(real (&sums)[T][DIM / 8][4], const real (&weights)[T][N][4], const element* b) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll 1
        for (int owner = 0; owner < 4; owner++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                real weight[T][2];
#pragma unroll
                for (int t = 0; t < T; t++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        weight[t][half] = __shfl_sync(EVERY, weights[t][n][2 * half + odd], (lane() & 28) + owner);
                const element* row = b + (8 * n + 2 * owner + odd) * PITCH + lane() % 4 * 2;
#pragma unroll
                for (int d = 0; d < DIM / 8; d++) {
                    pair right = *(const pair*)(row + 8 * d);
#pragma unroll
                    for (int t = 0; t < T; t++)
#pragma unroll
                        for (int e = 0; e < 4; e++) sums[t][d][e] += weight[t][e / 2] * right.at[e % 2];
                }
            }
}

#endif
