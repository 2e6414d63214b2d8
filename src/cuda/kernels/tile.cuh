// Tiles in shared memory: rows of HEAD_DIM elements, filled by asynchronous copies of 16 bytes.
//
//   element (row, column) lies at row * PITCH + column
//
// A row takes an odd number of 16-byte units, so 8 rows at the same column lie in 8 different groups of 4 banks: ldmatrix
// and 16-byte loads down a column are free of conflicts, and every address is a base and a constant.

constexpr int UNIT = 16 / sizeof(element);             // elements of a 16-byte copy
constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;         // columns of a tile: the head dim in whole steps of the products
constexpr int PITCH = DIM + UNIT;

struct alignas(16) unit { element at[UNIT]; };
struct alignas(2 * sizeof(element)) pair { element at[2]; };

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes into shared memory, zeros where `there` is false. The address must be a valid one even then.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(there ? 16 : 0)
                 : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last PENDING groups of this thread are under way. A barrier must follow before others' copies are read.
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Copies ROWS rows, `stride` elements apart, by all THREADS of the block; rows that are not there, and columns past HEAD_DIM,
// become zeros. Up to 8 neighbouring threads share a row. One running address: a table of them would fill the registers.
template <int ROWS, int THREADS, class There>
__device__ __forceinline__ void load_rows(element* tile, const element* source, i64 stride, There there) {
    constexpr int UNITS = DIM / UNIT, SHARE = UNITS >= 8 ? 8 : UNITS >= 4 ? 4 : 2, STEP = THREADS / SHARE;
    int row = threadIdx.x / SHARE;
    const int first = threadIdx.x % SHARE * UNIT;
    const element* from = source + row * stride + first;
    element* to = tile + row * PITCH + first;
#pragma unroll
    for (int step = 0; step < ROWS; step += STEP) {
        if (ROWS % STEP == 0 || row < ROWS) {
            const bool copied = there(row);
#pragma unroll
            for (int column = 0; column < DIM; column += SHARE * UNIT) {
                if (UNITS % SHARE != 0 && column + first >= DIM) continue;
                const bool inside = copied && (HEAD_DIM == DIM || column + first < HEAD_DIM);
                copy_async(to + column, inside ? from + column : source, inside);
            }
        }
        row += STEP, from += STEP * stride, to += STEP * PITCH;
    }
}
