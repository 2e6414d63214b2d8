//! When two results count as equal: one rule for every test.

use super::rng::widen;
use moda_attn::dtype::{DType, Element};

/// The relative errors allowed against a float64 evaluation: (outputs, gradients) of tensors stored as `T`.
pub(crate) fn tolerance<T: Element>() -> (f64, f64) {
    match T::DTYPE {
        DType::Float64 => (1e-12, 1e-11),
        DType::Float32 => (2e-6, 1e-5),
        DType::BFloat16 => (1e-2, 2e-2),
        DType::Float16 => (2e-3, 4e-3),
        other => unreachable!("{other:?} is no element type"),
    }
}

/// ‖got - truth‖ / max(‖truth‖, size). Infinite where one holds a NaN or an infinity that the other does not hold in the
/// same place.
///
/// `size` is that of the terms whose sum the result is: where they cancel (a gradient that is zero in theory), it is what
/// their rounding must be measured by.
pub(crate) fn relative_error<T: Element>(got: &[T], truth: &[f64], size: f64) -> f64 {
    assert_eq!(got.len(), truth.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &truth) in got.iter().zip(truth) {
        let got = widen(got);
        if got.is_finite() && truth.is_finite() {
            error += (got - truth).powi(2);
            norm += truth * truth;
        } else if got.to_bits() != truth.to_bits() && !(got.is_nan() && truth.is_nan()) {
            return f64::INFINITY;
        }
    }
    let size = norm.sqrt().max(size);
    if error == 0.0 { 0.0 } else { error.sqrt() / size }
}

/// Fails with the name and the error where the relative error exceeds the tolerance.
#[track_caller]
pub(crate) fn assert_close<T: Element>(name: &str, got: &[T], truth: &[f64], tolerance: f64) {
    assert_close_for_size(name, got, truth, tolerance, 0.0);
}

/// The same for a result that may be small beside the terms it is the sum of.
#[track_caller]
pub(crate) fn assert_close_for_size<T: Element>(name: &str, got: &[T], truth: &[f64], tolerance: f64, size: f64) {
    let error = relative_error(got, truth, size);
    assert!(error <= tolerance, "{name}: relative error {error:.3e}, allowed {tolerance:.1e}");
}

/// The same for every element on its own, beside 1 where it is small: for logarithms.
#[track_caller]
pub(crate) fn assert_each_close<T: Element>(name: &str, got: &[T], truth: &[f64], tolerance: f64) {
    assert_eq!(got.len(), truth.len());
    for (at, (&got, &truth)) in got.iter().zip(truth).enumerate() {
        let error = relative_error(&[got], &[truth], 1.0);
        let got = widen(got);
        assert!(
            error <= tolerance,
            "{name}[{at}] is {got:e}, not {truth:e}: error {error:.3e}, allowed {tolerance:.1e}"
        );
    }
}

/// df/dx at 0: central differences of three step sizes, extrapolated to an error of the sixth order (Richardson).
pub(crate) fn derivative(mut f: impl FnMut(f64) -> f64) -> f64 {
    let mut central = |h: f64| (f(h) - f(-h)) / (2.0 * h);
    let h = 2e-3;
    let (whole, half, quarter) = (central(h), central(h / 2.0), central(h / 4.0));
    let extrapolated = [(4.0 * half - whole) / 3.0, (4.0 * quarter - half) / 3.0];
    (16.0 * extrapolated[1] - extrapolated[0]) / 15.0
}
