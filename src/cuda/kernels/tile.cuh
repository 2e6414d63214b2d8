// Tiles in shared memory: rows of HEAD_DIM elements, filled by asynchronous copies of 16 bytes.
//
//   element (row, column) lies at row * PITCH + column
//
// A row takes an odd number of 16-byte units, so 8 rows at the same column lie in 8 different groups of 4 banks: ldmatrix
// and 16-byte loads down a column are free of conflicts, and every address is a base and a constant.

constexpr int UNIT = 16 / sizeof(element);             // elements of a 16-byte copy
constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;         // columns of a tile: the head dim in whole steps of the products
constexpr int PITCH = DIM + UNIT;

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

// Copies ROWS rows by all THREADS of the block. `there(row)` says which rows exist; the others, and columns past HEAD_DIM,
// become zeros.
template <int ROWS, int THREADS, class There>
__device__ __forceinline__ void load_rows(element* tile, const element* source, i64 stride, There there) {
    constexpr int UNITS = DIM / UNIT;
#pragma unroll
    for (int at = 0; at < ROWS * UNITS; at += THREADS) {
        int index = at + threadIdx.x;
        int row = index / UNITS, column = index % UNITS * UNIT;
        if (ROWS * UNITS % THREADS != 0 && index >= ROWS * UNITS) break;
        bool copied = there(row) && (HEAD_DIM == DIM || column < HEAD_DIM);
        copy_async(tile + row * PITCH + column, copied ? source + row * stride + column : source, copied);
    }
}
