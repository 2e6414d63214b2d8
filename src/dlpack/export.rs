//! Our own memory on its way out: a shared buffer, handed out as managed tensors whose deleter lets go of it once.

use super::dtype::encode;
use super::structs::{CAPSULE, CAPSULE_VERSIONED, CPU, Device, Managed, ManagedVersioned, Tensor, VERSION};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::{count, print_shape};
use pyo3::ffi;
use pyo3::prelude::*;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

/// A cache line, and what the widest vector registers like.
const ALIGNMENT: usize = 64;

/// A contiguous tensor in memory of our own, shared between its Python object and everyone it was exported to.
#[derive(Debug, Clone)]
pub(crate) struct Owned {
    buffer: Arc<Buffer>,
    dtype: DType,
    shape: Arc<[i64]>,
    strides: Arc<[i64]>,
}

impl Owned {
    /// A tensor of zeros.
    pub(crate) fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
        let bytes = count(shape).and_then(|elements| elements.checked_mul(dtype.size()));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes.max(1), ALIGNMENT).ok());
        let Some(layout) = layout else {
            let (given, wanted) = (print_shape(shape), "sizes whose product fits in memory".to_owned());
            return Err(Error::Shape { argument: "shape", given, wanted });
        };
        // SAFETY: the layout has a size above zero.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) });
        let pointer = pointer.ok_or(Error::Allocation { bytes: layout.size(), what: "a tensor" })?;
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis].max(1) as i64;
        }
        let shape = shape.iter().map(|&size| size as i64).collect();
        Ok(Self { buffer: Arc::new(Buffer { pointer, layout }), dtype, shape, strides: strides.into() })
    }

    /// The dtype.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// How many hold the buffer: this tensor, its clones and those it was exported to.
    pub(crate) fn holders(&self) -> usize {
        Arc::strong_count(&self.buffer)
    }

    /// The plain tensor, whose shape and strides live as long as this (or a clone of it) does.
    fn tensor(&self) -> Tensor {
        Tensor {
            data: self.buffer.pointer.as_ptr().cast(),
            ctx: Device { device_type: CPU, device_id: 0 },
            ndim: self.shape.len() as i32,
            dtype: encode(self.dtype),
            shape: self.shape.as_ptr().cast_mut(),
            strides: self.strides.as_ptr().cast_mut(),
            byte_offset: 0,
        }
    }
}

/// Zeroed memory, freed when the last holder lets go.
#[derive(Debug)]
struct Buffer {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory; who reads and writes it answers for the order, as for any array.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) };
    }
}

/// Hands the tensor out in the form before `DLPack` 1.0.
pub(crate) fn old_capsule<'py>(py: Python<'py>, owned: &Owned) -> PyResult<Bound<'py, PyAny>> {
    let managed = managed(owned.clone());
    // SAFETY: the destructor belongs to a capsule of this name, and the pointer came from `managed`.
    unsafe { capsule(py, managed.cast(), CAPSULE, drop_old) }.inspect_err(|_| {
        // SAFETY: no capsule took it: still ours, deleted once.
        unsafe { delete_old(managed.as_ptr()) };
    })
}

/// Hands the tensor out in the versioned form.
pub(crate) fn versioned_capsule<'py>(py: Python<'py>, owned: &Owned) -> PyResult<Bound<'py, PyAny>> {
    let managed = managed_versioned(owned.clone());
    // SAFETY: the destructor belongs to a capsule of this name, and the pointer came from `managed_versioned`.
    unsafe { capsule(py, managed.cast(), CAPSULE_VERSIONED, drop_versioned) }.inspect_err(|_| {
        // SAFETY: no capsule took it: still ours, deleted once.
        unsafe { delete_versioned(managed.as_ptr()) };
    })
}

fn managed(owned: Owned) -> NonNull<Managed> {
    let tensor = owned.tensor();
    let manager_ctx = Box::into_raw(Box::new(owned)).cast();
    NonNull::from(Box::leak(Box::new(Managed { tensor, manager_ctx, deleter: Some(delete_old) })))
}

fn managed_versioned(owned: Owned) -> NonNull<ManagedVersioned> {
    let tensor = owned.tensor();
    let manager_ctx = Box::into_raw(Box::new(owned)).cast();
    let deleter = Some(delete_versioned as unsafe extern "C" fn(*mut ManagedVersioned));
    NonNull::from(Box::leak(Box::new(ManagedVersioned { version: VERSION, manager_ctx, deleter, flags: 0, tensor })))
}

/// # Safety
/// `managed` must come from [`managed`] and must not be used again.
unsafe extern "C" fn delete_old(managed: *mut Managed) {
    // SAFETY: both boxes were leaked by `managed`, and the caller gives them up.
    unsafe { drop(Box::from_raw(Box::from_raw(managed).manager_ctx.cast::<Owned>())) };
}

/// # Safety
/// `managed` must come from [`managed_versioned`] and must not be used again.
unsafe extern "C" fn delete_versioned(managed: *mut ManagedVersioned) {
    // SAFETY: both boxes were leaked by `managed_versioned`, and the caller gives them up.
    unsafe { drop(Box::from_raw(Box::from_raw(managed).manager_ctx.cast::<Owned>())) };
}

/// # Safety
/// `destructor` must be the one for capsules called `name`, whose pointers are like `managed`.
unsafe fn capsule<'py>(
    py: Python<'py>,
    managed: NonNull<c_void>,
    name: &'static CStr,
    destructor: unsafe extern "C" fn(*mut ffi::PyObject),
) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: the GIL is held, the name is static; a new reference or null with an exception set.
    unsafe {
        let capsule = ffi::PyCapsule_New(managed.as_ptr(), name.as_ptr(), Some(destructor));
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

/// Deletes what nobody took: a consumer renames the capsule, and then the tensor is the consumer's.
unsafe extern "C" fn drop_old(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this once, with the GIL held, on a capsule made by `old_capsule`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, CAPSULE.as_ptr()) == 1 {
            delete_old(ffi::PyCapsule_GetPointer(capsule, CAPSULE.as_ptr()).cast());
        }
    }
}

/// As [`drop_old`], for the versioned form.
unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this once, with the GIL held, on a capsule made by `versioned_capsule`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, CAPSULE_VERSIONED.as_ptr()) == 1 {
            delete_versioned(ffi::PyCapsule_GetPointer(capsule, CAPSULE_VERSIONED.as_ptr()).cast());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleter_lets_go_of_the_buffer_once() {
        let owned = Owned::zeros(DType::Float32, &[2, 3]).unwrap();
        let (old, new) = (managed(owned.clone()), managed_versioned(owned.clone()));
        assert_eq!(owned.holders(), 3);
        // SAFETY: each was just made and is deleted once, by the deleter it carries.
        unsafe {
            assert_eq!((old.as_ref().tensor.data, new.as_ref().tensor.data), {
                let data = owned.tensor().data;
                (data, data)
            });
            old.as_ref().deleter.unwrap()(old.as_ptr());
            assert_eq!(owned.holders(), 2);
            new.as_ref().deleter.unwrap()(new.as_ptr());
        }
        assert_eq!(owned.holders(), 1);
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        assert!(matches!(Owned::zeros(DType::Float64, &[1 << 50]), Err(Error::Allocation { .. })));
        assert!(matches!(Owned::zeros(DType::Float64, &[1 << 40, 1 << 40]), Err(Error::Shape { .. })));
    }
}
