//! The C exchange API (`DLPack` 1.3): a tensor type carries a table of C functions, and one of them fills a plain tensor
//! that borrows from the Python object. No capsule, no reference counting, no Python call.

use super::structs::{Exchange, ExchangeHeader, Tensor, VERSION};
use pyo3::prelude::*;
use pyo3::types::PyType;
use pyo3::{ffi, intern};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{PoisonError, RwLock};

/// How many tensor types are remembered; more than any program has, and a bound on what the cache keeps alive.
const CACHED_TYPES: usize = 32;

/// A table of functions that lives as long as the process.
#[derive(Clone, Copy)]
struct Table(&'static Exchange);

// SAFETY: the protocol asks for one immutable, static table; its function is called with the GIL held.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// Tables by type. A type is kept alive by its entry, so its address cannot come to mean another one. Locked only with
/// the GIL held and never across a call into Python, so a fork cannot catch it locked.
static TABLES: RwLock<Vec<(Py<PyType>, Table)>> = RwLock::new(Vec::new());

/// What the object's type lends: `None` where it offers no exchange API.
///
/// The tensor, its shape and its strides belong to the object: they hold as long as the object lives unchanged.
pub(super) fn borrow(object: &Bound<'_, PyAny>) -> PyResult<Option<Tensor>> {
    let Some(Table(table)) = table_of(&object.get_type())? else { return Ok(None) };
    let Some(borrow) = table.borrow else { return Ok(None) };
    let mut tensor = MaybeUninit::<Tensor>::uninit();
    // SAFETY: the table was found on this object's type, which is what its functions take; the GIL is held.
    let status = unsafe { borrow(object.as_ptr().cast(), tensor.as_mut_ptr()) };
    if status != 0 {
        return Err(PyErr::fetch(object.py()));
    }
    // SAFETY: status 0 says that the tensor was filled.
    Ok(Some(unsafe { tensor.assume_init() }))
}

fn table_of(kind: &Bound<'_, PyType>) -> PyResult<Option<Table>> {
    let tables = TABLES.read().unwrap_or_else(PoisonError::into_inner);
    let known = tables.iter().find(|(known, _)| known.as_ptr() == kind.as_ptr()).map(|&(_, table)| table);
    drop(tables);
    if known.is_some() {
        return Ok(known);
    }
    let Some(table) = look_up(kind)? else { return Ok(None) };
    let mut tables = TABLES.write().unwrap_or_else(PoisonError::into_inner);
    if tables.len() < CACHED_TYPES {
        tables.push((kind.clone().unbind(), table));
    }
    Ok(Some(table))
}

/// The table of a type, from its `__dlpack_c_exchange_api__` capsule.
fn look_up(kind: &Bound<'_, PyType>) -> PyResult<Option<Table>> {
    let py = kind.py();
    let offered = kind.getattr_opt(intern!(py, "__dlpack_c_exchange_api__"))?;
    // A subclass that lies elsewhere than its parent says takes the table back by None.
    let Some(capsule) = offered.filter(|capsule| !capsule.is_none()) else { return Ok(None) };
    // SAFETY: the GIL is held; a capsule of another name, or no capsule at all, gives null and sets an exception.
    let pointer = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
    if pointer.is_null() {
        return Err(PyErr::fetch(py));
    }
    let mut header: *const ExchangeHeader = pointer.cast();
    // SAFETY: every version of the API starts with this header and chains to an older one; tables are static.
    while let Some(found) = unsafe { header.as_ref() } {
        if found.version.major == VERSION.major {
            // SAFETY: a table of our major version has this layout, and lives as long as the process.
            return Ok(unsafe { header.cast::<Exchange>().as_ref() }.map(Table));
        }
        header = found.previous;
    }
    debug_assert!(ptr::eq(header, ptr::null()));
    Ok(None)
}
