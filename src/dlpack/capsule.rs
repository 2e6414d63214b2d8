//! `__dlpack__` capsules: asked for in the versioned form first, taken over once, deleted once.

use super::structs::{
    CAPSULE, CAPSULE_USED, CAPSULE_VERSIONED, CAPSULE_VERSIONED_USED, Managed, ManagedVersioned, Tensor, VERSION,
};
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDictMethods};
use pyo3::{ffi, intern};
use std::ptr::NonNull;

/// A managed tensor that is ours: dropping it calls the producer's deleter, which is why it is dropped with the GIL held.
#[derive(Debug)]
pub(super) enum Taken {
    Old(NonNull<Managed>),
    Versioned(NonNull<ManagedVersioned>),
}

impl Taken {
    /// The tensor inside, borrowed from this guard.
    pub(super) fn tensor(&self) -> &Tensor {
        match self {
            // SAFETY: a taken tensor stays valid until its deleter runs, which is in `drop`.
            Self::Old(managed) => unsafe { &managed.as_ref().tensor },
            // SAFETY: as above; its major version was checked before it was wrapped.
            Self::Versioned(managed) => unsafe { &managed.as_ref().tensor },
        }
    }

    /// Whether the producer forbids writing. The old form cannot say.
    pub(super) fn is_read_only(&self) -> bool {
        match self {
            Self::Old(_) => false,
            // SAFETY: as in `tensor`.
            Self::Versioned(managed) => unsafe { managed.as_ref().flags & ManagedVersioned::READ_ONLY != 0 },
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        match *self {
            Self::Old(managed) => {
                // SAFETY: ours since the capsule was renamed, and dropped once; a null deleter means nothing to do.
                unsafe { managed.as_ref().deleter.map(|delete| delete(managed.as_ptr())) };
            }
            Self::Versioned(managed) => {
                // SAFETY: as above; the fields up to the deleter have their place in every major version.
                unsafe { managed.as_ref().deleter.map(|delete| delete(managed.as_ptr())) };
            }
        }
    }
}

/// For [`take`]: the producer need not order anything. What uses the tensor runs on the stream that made it.
#[cfg(feature = "cuda")]
pub(super) const NO_SYNC: i64 = -1;

/// Asks an object for its tensor, on a stream in the protocol's encoding; `None` where it has no `__dlpack__`.
pub(super) fn take(object: &Bound<'_, PyAny>, stream: Option<i64>) -> PyResult<Option<Taken>> {
    let py = object.py();
    let Some(export) = object.getattr_opt(intern!(py, "__dlpack__"))? else { return Ok(None) };
    let known = stream.map(|stream| (intern!(py, "stream"), stream)).into_py_dict(py)?;
    let wish = known.copy()?;
    wish.set_item(intern!(py, "max_version"), (VERSION.major, 0))?;
    match export.call((), Some(&wish)) {
        Ok(capsule) => open(&capsule).map(Some),
        // A producer from before 1.0 does not know the argument.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => open(&export.call((), Some(&known))?).map(Some),
        Err(error) => Err(error),
    }
}

/// Takes the tensor out of a fresh capsule and marks the capsule used, so that nobody else deletes it.
fn open(capsule: &Bound<'_, PyAny>) -> PyResult<Taken> {
    let (py, pointer) = (capsule.py(), capsule.as_ptr());
    // SAFETY: the GIL is held; any object may be asked, and a wrong one is simply not valid.
    let versioned = unsafe { ffi::PyCapsule_IsValid(pointer, CAPSULE_VERSIONED.as_ptr()) } == 1;
    let (name, used) = if versioned { (CAPSULE_VERSIONED, CAPSULE_VERSIONED_USED) } else { (CAPSULE, CAPSULE_USED) };
    // SAFETY: the GIL is held; a capsule of another name, or no capsule at all, gives null and sets an exception.
    let managed = unsafe { ffi::PyCapsule_GetPointer(pointer, name.as_ptr()) };
    let managed = NonNull::new(managed).ok_or_else(|| PyErr::fetch(py))?;
    // SAFETY: it is a capsule, and the name is static.
    if unsafe { ffi::PyCapsule_SetName(pointer, used.as_ptr()) } != 0 {
        return Err(PyErr::fetch(py));
    }
    if !versioned {
        return Ok(Taken::Old(managed.cast()));
    }
    let managed = managed.cast::<ManagedVersioned>();
    let taken = Taken::Versioned(managed);
    // SAFETY: the version comes first in every major version.
    let version = unsafe { managed.as_ref().version };
    if version.major != VERSION.major {
        let message = format!("a DLPack tensor of version {}.{}; wanted major version 1", version.major, version.minor);
        return Err(PyBufferError::new_err(message));
    }
    Ok(taken)
}
