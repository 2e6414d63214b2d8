//! The little linear algebra that the formulas need: rows are `Vec`s, a matrix is a `Vec` of rows.

use crate::dtype::{Element, Real};
use crate::view::{View, ViewMut};

/// A matrix as its rows.
pub(super) type Matrix<R> = Vec<Vec<R>>;

/// A matrix of zeros.
pub(super) fn zeros<R: Real>(rows: usize, columns: usize) -> Matrix<R> {
    vec![vec![R::ZERO; columns]; rows]
}

/// A matrix from its elements.
pub(super) fn matrix<R: Real>(rows: usize, columns: usize, element: impl Fn(usize, usize) -> R) -> Matrix<R> {
    (0..rows).map(|r| (0..columns).map(|c| element(r, c)).collect()).collect()
}

/// One head of a tensor (B, H, N, D), widened: a matrix N x D.
pub(super) fn head<T: Element>(tensor: &View<'_, T, 4>, b: usize, h: usize) -> Matrix<T::Acc> {
    let [_, _, n, d] = tensor.shape();
    matrix(n, d, |j, c| tensor.get([b, h, j, c]).widen())
}

/// x · y
pub(super) fn dot<R: Real>(x: &[R], y: &[R]) -> R {
    x.iter().zip(y).fold(R::ZERO, |sum, (&x, &y)| sum + x * y)
}

/// y += factor x
pub(super) fn add_scaled<R: Real>(y: &mut [R], factor: R, x: &[R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// A += x^T y
pub(super) fn add_outer<R: Real>(a: &mut Matrix<R>, x: &[R], y: &[R]) {
    for (row, &x) in a.iter_mut().zip(x) {
        add_scaled(row, x, y);
    }
}

/// A += B
pub(super) fn add_matrix<R: Real>(a: &mut Matrix<R>, b: &Matrix<R>) {
    for (a, b) in a.iter_mut().zip(b) {
        add_scaled(a, R::ONE, b);
    }
}

/// x A for a square A.
pub(super) fn row_times<R: Real>(x: &[R], a: &Matrix<R>) -> Vec<R> {
    let mut product = vec![R::ZERO; x.len()];
    for (&x, row) in x.iter().zip(a) {
        add_scaled(&mut product, x, row);
    }
    product
}

/// x A^T
pub(super) fn row_times_transposed<R: Real>(x: &[R], a: &Matrix<R>) -> Vec<R> {
    a.iter().map(|row| dot(x, row)).collect()
}

/// A B for a square B.
pub(super) fn product<R: Real>(a: &Matrix<R>, b: &Matrix<R>) -> Matrix<R> {
    a.iter().map(|row| row_times(row, b)).collect()
}

/// A B^T
pub(super) fn product_transposed<R: Real>(a: &Matrix<R>, b: &Matrix<R>) -> Matrix<R> {
    a.iter().map(|row| row_times_transposed(row, b)).collect()
}

/// x / ‖x‖₂ and ‖x‖₂; a zero x stays zero.
pub(super) fn normalised<R: Real>(x: &[R]) -> (Vec<R>, R) {
    let norm = dot(x, x).sqrt();
    let unit = if norm == R::ZERO { x.to_vec() } else { x.iter().map(|&x| x / norm).collect() };
    (unit, norm)
}

/// Gradient of x from that of [`normalised`]'s unit vector u = x / ‖x‖: (du - u (u · du)) / ‖x‖; zero for a zero x.
pub(super) fn normalised_backward<R: Real>(unit: &[R], norm: R, d_unit: &[R]) -> Vec<R> {
    if norm == R::ZERO {
        return vec![R::ZERO; unit.len()];
    }
    let along = dot(unit, d_unit);
    unit.iter().zip(d_unit).map(|(&u, &du)| (du - u * along) / norm).collect()
}

/// The contiguous block of a result under a leading index, to be written.
pub(super) fn block<'v, S: Copy, const R: usize, const L: usize>(
    tensor: &'v mut ViewMut<'_, S, R>,
    leading: [usize; L],
) -> &'v mut [S] {
    let shape = tensor.shape();
    let size: usize = shape[L..].iter().product();
    let index = leading.iter().zip(shape).fold(0, |index, (&at, size)| index * size + at);
    &mut tensor.as_mut_slice()[index * size..][..size]
}

/// Writes a row, rounded to what the tensor stores.
pub(super) fn write_row<T: Element>(target: &mut [T], row: &[T::Acc]) {
    for (target, &value) in target.iter_mut().zip(row) {
        *target = T::narrow(value);
    }
}

/// Writes a matrix, rounded to what the tensor stores, row after row.
pub(super) fn write_matrix<T: Element>(target: &mut [T], rows: &Matrix<T::Acc>) {
    for (target, &value) in target.iter_mut().zip(rows.iter().flatten()) {
        *target = T::narrow(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        let a = vec![vec![1.0, 2.0], vec![3.0, 4.0]];
        assert_eq!(row_times(&[1.0, 10.0], &a), [31.0, 42.0]);
        assert_eq!(row_times_transposed(&[1.0, 10.0], &a), [21.0, 43.0]);
        assert_eq!(product(&a, &a), [[7.0, 10.0], [15.0, 22.0]]);
        assert_eq!(product_transposed(&a, &a), [[5.0, 11.0], [11.0, 25.0]]);
        let mut sum = a.clone();
        add_outer(&mut sum, &[1.0, 2.0], &[10.0, 20.0]);
        add_matrix(&mut sum, &a);
        assert_eq!(sum, [[12.0, 24.0], [26.0, 48.0]]);
    }

    #[test]
    fn a_unit_vector_moves_only_across_itself() {
        let (unit, norm) = normalised(&[3.0f64, 4.0]);
        assert_eq!((unit.as_slice(), norm), (&[0.6, 0.8][..], 5.0));
        let along = normalised_backward(&unit, norm, &[0.6, 0.8]);
        assert!(along.iter().all(|x| x.abs() < 1e-16));
        let across = normalised_backward(&unit, norm, &[-0.8, 0.6]);
        assert!((across[0] + 0.16).abs() < 1e-16 && (across[1] - 0.12).abs() < 1e-16);
    }

    #[test]
    fn a_zero_vector_stays_zero_and_still() {
        let (unit, norm) = normalised(&[0.0, 0.0]);
        assert_eq!((unit.as_slice(), norm), (&[0.0, 0.0][..], 0.0));
        assert_eq!(normalised_backward(&unit, norm, &[1.0, 2.0]), [0.0, 0.0]);
    }

    #[test]
    fn a_block_is_what_lies_under_its_index() {
        let mut data: Vec<i32> = (0..12).collect();
        let mut tensor = ViewMut::from_slice(&mut data, [2, 3, 2]);
        assert_eq!(block(&mut tensor, [1, 2]), [10, 11]);
        assert_eq!(block(&mut tensor, [1]), [6, 7, 8, 9, 10, 11]);
    }
}
