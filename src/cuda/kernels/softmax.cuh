// The end of a row's softmax: the sink joins, then logsumexp, mass and the factor on the weighted values.

// A row's keys: top is the highest score in powers of two, own and cross the sums of 2^(score - top) over self and cross keys
// (all of them in own where mass is not wanted).
struct row_total {
    real top;
    real own;
    real cross;
};

struct closed_row {
    real factor;     // on sums relative to the top of the keys
    real logsumexp;  // natural, +inf for a row that sees nothing
    real pseudo;     // mass of the sink
};

// The maximum of keys and sink is what the exponentials are taken relative to, so none overflows wherever the sink lies.
__device__ __forceinline__ closed_row close_row(row_total row, real sink) {
    real keys = row.own + row.cross;
    if (keys == 0) return {0, INFINITE, 0};
    real z = sink * LOG2_E;
    real top = larger(row.top, z);
    // inf - inf is no number: what equals the maximum weighs 1.
    real kept = row.top == top ? (real)1 : power2(row.top - top);
    real weight = z == -INFINITE ? (real)0 : z == top ? (real)1 : power2(z - top);
    real sum = keys * kept + weight;
    // A sink that is the maximum stays as it was given: far from 0 a round trip through powers of two would change exp(z - L).
#if DTYPE >= 2
    real logsumexp = (z == top ? sink : top * LN_2) + logf(sum);
#else
    // Backward takes every probability from this number: it is rounded once.
    real logsumexp = (real)((z == top ? (double)sink : (double)top * 0.6931471805599453) + log((double)sum));
#endif
    return {kept / sum, logsumexp, weight / sum};
}

// Mass (self, cross, pseudo) of a row; that of the second softmax of "split" adds to the first's.
__device__ __forceinline__ void store_mass(real* mass, row_total row, closed_row closed) {
    real before[3] = {0, 0, 0};
    if (PART == 2) {
        for (int column = 0; column < 3; column++) before[column] = mass[column];
    }
    mass[0] = before[0] + row.own * closed.factor;
    mass[1] = before[1] + row.cross * closed.factor;
    mass[2] = before[2] + closed.pseudo;
}
