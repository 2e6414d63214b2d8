// Unit keys k^ = (k + eps) / ||k + eps||. Only the first `dim` components of a key are real ones and get eps; those from there
// to HEAD_DIM are zeros that fill its row up.

struct Shift {
    real eps;
    int dim;

    __device__ __forceinline__ real operator()(int column) const { return column < dim ? eps : 0; }
};

// Four components that begin at `column`; `inverse` is 1 / ||k + eps||.
__device__ __forceinline__ Four unit_four(const element* key, int column, real inverse, Shift shift) {
    Four four = load_four(key + column);
#pragma unroll
    for (int e = 0; e < 4; e++) four.at[e] = (four.at[e] + shift(column + e)) * inverse;
    return four;
}
