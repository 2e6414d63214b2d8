//! Shapes, strides and how they are printed.

/// A shape as Python prints it: `(2, 8, 1024, 128)`, `(3,)`, `()`.
pub fn print_shape(shape: &[usize]) -> String {
    match shape {
        [one] => format!("({one},)"),
        _ => format!("({})", shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// Row-major strides of a shape, in elements.
pub fn contiguous_strides<const R: usize>(shape: [usize; R]) -> [isize; R] {
    let mut strides = [1; R];
    for axis in (1..R).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1) as isize;
    }
    strides
}

/// Number of elements; `None` where it does not fit a `usize`.
pub fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

/// Every index of a shape, in row-major order.
pub fn for_each_index<const N: usize>(shape: [usize; N], mut visit: impl FnMut([usize; N])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = [0; N];
    loop {
        visit(index);
        let Some(axis) = (0..N).rev().find(|&axis| index[axis] + 1 < shape[axis]) else { return };
        index[axis] += 1;
        index[axis + 1..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_print_as_python_tuples() {
        assert_eq!(print_shape(&[]), "()");
        assert_eq!(print_shape(&[3]), "(3,)");
        assert_eq!(print_shape(&[2, 5]), "(2, 5)");
    }

    #[test]
    fn strides_of_a_row_major_tensor() {
        assert_eq!(contiguous_strides([2, 3, 4]), [12, 4, 1]);
        assert_eq!(contiguous_strides([2, 0, 4]), [4, 4, 1]);
        assert_eq!(count(&[2, 0, 4]), Some(0));
        assert_eq!(count(&[usize::MAX, 2]), None);
    }

    #[test]
    fn indices_run_row_major() {
        let mut seen = Vec::new();
        for_each_index([2, 3], |index| seen.push(index));
        assert_eq!(seen, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]);
        for_each_index([2, 0], |_| panic!("nothing to visit"));
    }
}
