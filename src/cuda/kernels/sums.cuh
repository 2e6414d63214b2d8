// Products of panels in shared memory, which all of alignment is made of:
//
//   sums (ROWS x COLUMNS) += left (ROWS x DEPTH) right (DEPTH x COLUMNS)      by the THREADS of a block
//
// A panel holds `real`s in the order of device memory, four neighbours at a time: ACROSS, an outer row of DEPTH numbers after
// the other, or ALONG, a step of the depth after the other.
//
// float32 and float64 run on multiply-adds. bfloat16 and float16 run on tensor cores in tf32, whose 8 bits of exponent and 11
// of mantissa hold every number of either type EXACT; other numbers are ROUNDED to tf32 or SPLIT into two of them, which
// keeps 22 bits.

constexpr int THREADS = 256;
constexpr int DEPTH = sizeof(real) == 8 ? 16 : 32;

enum Order { ACROSS, ALONG };
enum Digits { EXACT, ROUNDED, SPLIT };

// Four neighbours.
struct alignas(16) Four {
    real at[4];
};

__device__ __forceinline__ Four zeros() { return Four{{0, 0, 0, 0}}; }

// A row of tensors is a multiple of 8 elements and begins at a multiple of 16 bytes.
#if DTYPE >= 2
__device__ __forceinline__ Four load_four(const element* source) {
    uint2 bits = *(const uint2*)source;
    return Four{{widen((element)bits.x), widen((element)(bits.x >> 16)), widen((element)bits.y), widen((element)(bits.y >> 16))}};
}
#endif
__device__ __forceinline__ Four load_four(const real* source) { return *(const Four*)source; }

// Distances of neighbours in a panel. Rows are padded so that what a warp reads at once lies in different banks.
template <Order ORDER, int OUTER>
struct Panel {
    static constexpr int PITCH = ORDER == ACROSS ? DEPTH + 4 : OUTER + 8;
    static constexpr int OUTER_STRIDE = ORDER == ACROSS ? PITCH : 1;
    static constexpr int DEPTH_STRIDE = ORDER == ACROSS ? 1 : PITCH;
    static constexpr int ROWS = ORDER == ACROSS ? OUTER : DEPTH;
    static constexpr int COLUMNS = ORDER == ACROSS ? DEPTH : OUTER;

    // What a thread brings of a panel.
    static constexpr int EACH = (ROWS * COLUMNS / 4 + THREADS - 1) / THREADS;
    struct Load {
        Four four[EACH];
    };

    // fetch(row, column) gives the four numbers that begin there.
    template <class Fetch>
    static __device__ __forceinline__ void fetch_into(Load& load, Fetch fetch) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = threadIdx.x + i * THREADS;
            if (at < ROWS * COLUMNS / 4) load.four[i] = fetch(at / (COLUMNS / 4), at % (COLUMNS / 4) * 4);
        }
    }

    static __device__ __forceinline__ void store(real* panel, const Load& load) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int at = threadIdx.x + i * THREADS;
            if (at < ROWS * COLUMNS / 4) *(Four*)(panel + at / (COLUMNS / 4) * PITCH + at % (COLUMNS / 4) * 4) = load.four[i];
        }
    }
};

// Room for the panels of a product, in either order.
template <int ROWS, int COLUMNS>
struct Panels {
    static __device__ constexpr int room(int outer) {
        return outer * (DEPTH + 4) > DEPTH * (outer + 8) ? outer * (DEPTH + 4) : DEPTH * (outer + 8);
    }
    alignas(16) real left[room(ROWS)];
    alignas(16) real right[room(COLUMNS)];
};

#if DTYPE >= 2

__device__ __forceinline__ u32 tf32(float x) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// The one or two tf32 numbers that stand for x.
template <Digits DIGITS>
__device__ __forceinline__ void digits(float x, u32& high, u32& low) {
    high = DIGITS == EXACT ? __float_as_uint(x) : tf32(x);
    if (DIGITS == SPLIT) low = tf32(x - __uint_as_float(high));
}

// sums (16 x 8) += a (16 x 8) b (8 x 8)
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Eight warps, two by four, each with T x N tiles of 16 x 8; of a tile, lane l holds rows l / 4 and l / 4 + 8 of columns
// 2 (l % 4) and the next.
template <int ROWS, int COLUMNS>
struct Sums {
    static constexpr int T = ROWS / 32, N = COLUMNS / 32;
    static constexpr int SHARERS = 16; // threads that hold parts of a row
    float value[T][N][4];

    static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * (16 * T) + threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 4 * (8 * N); }
    // Which of the sharers this thread is.
    static __device__ __forceinline__ int sharer() { return threadIdx.x / 32 % 4 * 4 + threadIdx.x % 4; }

    template <Order LEFT, Order RIGHT, Digits LEFT_DIGITS, Digits RIGHT_DIGITS>
    __device__ __forceinline__ void add(const float* left, const float* right) {
        using L = Panel<LEFT, ROWS>;
        using R = Panel<RIGHT, COLUMNS>;
        const float* from_left = left + first_row() * L::OUTER_STRIDE + threadIdx.x % 4 * L::DEPTH_STRIDE;
        const float* from_right = right + (warp_column() + threadIdx.x % 32 / 4) * R::OUTER_STRIDE + threadIdx.x % 4 * R::DEPTH_STRIDE;
#pragma unroll(COLUMNS > 128 ? 2 : 4) // wide tiles have no registers for more
        for (int k = 0; k < DEPTH; k += 8) {
            u32 a[T][4], a_low[T][4];
#pragma unroll
            for (int t = 0; t < T; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float x = from_left[(16 * t + e % 2 * 8) * L::OUTER_STRIDE + (k + e / 2 * 4) * L::DEPTH_STRIDE];
                    digits<LEFT_DIGITS>(x, a[t][e], a_low[t][e]);
                }
#pragma unroll
            for (int n = 0; n < N; n++) {
                u32 b[2], b_low[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float x = from_right[8 * n * R::OUTER_STRIDE + (k + 4 * e) * R::DEPTH_STRIDE];
                    digits<RIGHT_DIGITS>(x, b[e], b_low[e]);
                }
#pragma unroll
                for (int t = 0; t < T; t++) {
                    if (LEFT_DIGITS == SPLIT) multiply_tf32(value[t][n], a_low[t], b);
                    if (RIGHT_DIGITS == SPLIT) multiply_tf32(value[t][n], a[t], b_low);
                    multiply_tf32(value[t][n], a[t], b);
                }
            }
        }
    }

    // use(row, entries) for every row this thread has part in; entries(with) does with(column, sum) for its columns.
    template <class Use>
    __device__ __forceinline__ void each_row(Use use) {
#pragma unroll
        for (int t = 0; t < T; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                use(first_row() + 16 * t + 8 * half, [&](auto with) {
#pragma unroll
                    for (int n = 0; n < N; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            with(warp_column() + 8 * n + threadIdx.x % 4 * 2 + e, value[t][n][2 * half + e]);
                });
    }
};

#else

// 16 x 16 threads; each holds every sixteenth row and column.
template <int ROWS, int COLUMNS>
struct Sums {
    static constexpr int T = ROWS / 16, N = COLUMNS / 16;
    static constexpr int SHARERS = 16; // threads that hold parts of a row
    real value[T][N];

    static __device__ __forceinline__ int first_row() { return threadIdx.x / 16; }
    // Which of the sharers this thread is.
    static __device__ __forceinline__ int sharer() { return threadIdx.x % 16; }

    template <Order LEFT, Order RIGHT, Digits, Digits>
    __device__ __forceinline__ void add(const real* left, const real* right) {
        using L = Panel<LEFT, ROWS>;
        using R = Panel<RIGHT, COLUMNS>;
#pragma unroll 4
        for (int k = 0; k < DEPTH; k++) {
            real a[T];
#pragma unroll
            for (int t = 0; t < T; t++) a[t] = left[(first_row() + 16 * t) * L::OUTER_STRIDE + k * L::DEPTH_STRIDE];
#pragma unroll
            for (int n = 0; n < N; n++) {
                real b = right[(sharer() + 16 * n) * R::OUTER_STRIDE + k * R::DEPTH_STRIDE];
#pragma unroll
                for (int t = 0; t < T; t++) value[t][n] += a[t] * b;
            }
        }
    }

    // use(row, entries) for every row this thread has part in; entries(with) does with(column, sum) for its columns.
    template <class Use>
    __device__ __forceinline__ void each_row(Use use) {
#pragma unroll
        for (int t = 0; t < T; t++)
            use(first_row() + 16 * t, [&](auto with) {
#pragma unroll
                for (int n = 0; n < N; n++) with(sharer() + 16 * n, value[t][n]);
            });
    }
};

#endif

// use(row, column, sum) for every sum that this thread holds.
template <int ROWS, int COLUMNS, class Use>
__device__ __forceinline__ void each(Sums<ROWS, COLUMNS>& sums, Use use) {
    sums.each_row([&](int row, auto entries) {
        entries([&](int column, real& sum) { use(row, column, sum); });
    });
}

template <int ROWS, int COLUMNS>
__device__ __forceinline__ void clear(Sums<ROWS, COLUMNS>& sums) {
    each(sums, [](int, int, real& sum) { sum = 0; });
}

// sums += left right over a depth of any length: `left(row, column)` and `right(row, column)` give four neighbours in their
// order, zeros where there are none. The panels of the next step are fetched while those of this one are multiplied.
template <Order LEFT, Order RIGHT, Digits LEFT_DIGITS, Digits RIGHT_DIGITS, int ROWS, int COLUMNS, class Left, class Right>
__device__ __forceinline__ void add_product(Sums<ROWS, COLUMNS>& sums, Panels<ROWS, COLUMNS>& panels, int depth, Left left, Right right) {
    using L = Panel<LEFT, ROWS>;
    using R = Panel<RIGHT, COLUMNS>;
    typename L::Load from_left;
    typename R::Load from_right;
    auto fetch = [&](int first) {
        L::fetch_into(from_left, [&](int row, int column) { return LEFT == ACROSS ? left(row, first + column) : left(first + row, column); });
        R::fetch_into(from_right, [&](int row, int column) { return RIGHT == ACROSS ? right(row, first + column) : right(first + row, column); });
    };
    fetch(0);
    for (int first = 0; first < depth; first += DEPTH) {
        __syncthreads(); // the panels have been read
        L::store(panels.left, from_left);
        R::store(panels.right, from_right);
        __syncthreads();
        if (first + DEPTH < depth) fetch(first + DEPTH);
        sums.template add<LEFT, RIGHT, LEFT_DIGITS, RIGHT_DIGITS>(panels.left, panels.right);
    }
}

// Four numbers of a row of a D x D matrix, zeros outside.
__device__ __forceinline__ Four matrix_four(const real* matrix, int row, int column) {
    return row < HEAD_DIM && column < HEAD_DIM ? load_four(matrix + row * HEAD_DIM + column) : zeros();
}
