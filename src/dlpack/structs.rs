//! The C structs of `DLPack` 1.3. The `dlpack` crate gives the plain tensor; the managed ones are declared here because
//! a deleter may be null, which the crate's type cannot say, and because it predates the versioned ones.

use std::ffi::c_void;
use std::mem::{offset_of, size_of};

pub(crate) use dlpack::{Context as Device, DataType, Tensor};

/// The version these structs are written to.
pub(crate) const VERSION: Version = Version { major: 1, minor: 3 };

/// `kDLCPU`.
pub(crate) const CPU: i32 = 1;
/// `kDLCUDA`.
pub(super) const CUDA: i32 = 2;
/// `kDLCUDAHost`: pinned, but plain memory to the CPU.
pub(super) const CUDA_HOST: i32 = 3;

/// `kDLCUDAManaged`: memory that both sides see, at an address of a CUDA device.
pub(super) const CUDA_MANAGED: i32 = 13;

/// Name of a fresh capsule with a [`Managed`].
pub(super) const CAPSULE: &std::ffi::CStr = c"dltensor";
/// The same, once somebody has taken the tensor.
pub(super) const CAPSULE_USED: &std::ffi::CStr = c"used_dltensor";
/// Name of a fresh capsule with a [`ManagedVersioned`].
pub(super) const CAPSULE_VERSIONED: &std::ffi::CStr = c"dltensor_versioned";
/// The same, once somebody has taken the tensor.
pub(super) const CAPSULE_VERSIONED_USED: &std::ffi::CStr = c"used_dltensor_versioned";

/// `DLPackVersion`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// `DLManagedTensor`: a tensor and how to let go of it, before `DLPack` 1.0.
#[repr(C)]
pub(super) struct Managed {
    pub(super) tensor: Tensor,
    pub(super) manager_ctx: *mut c_void,
    pub(super) deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLManagedTensorVersioned`: the same since 1.0. Of a foreign major version only `version` and `deleter` may be read.
#[repr(C)]
pub(super) struct ManagedVersioned {
    pub(super) version: Version,
    pub(super) manager_ctx: *mut c_void,
    pub(super) deleter: Option<unsafe extern "C" fn(*mut Self)>,
    pub(super) flags: u64,
    pub(super) tensor: Tensor,
}

impl ManagedVersioned {
    /// Bit of `flags`: the consumer must not write.
    pub(super) const READ_ONLY: u64 = 1;
}

/// `DLPackExchangeAPIHeader`
#[repr(C)]
pub(super) struct ExchangeHeader {
    pub(super) version: Version,
    pub(super) previous: *const Self,
}

/// `DLPackExchangeAPI`: what a tensor type offers to C callers. Only `borrow` is used; the others keep their place.
#[repr(C)]
pub(super) struct Exchange {
    pub(super) header: ExchangeHeader,
    pub(super) allocate: *const c_void,
    pub(super) managed_from_object: *const c_void,
    pub(super) object_from_managed: *const c_void,
    /// Fills a tensor that borrows from the Python object; 0, or -1 with a Python exception set.
    pub(super) borrow: Option<unsafe extern "C" fn(*mut c_void, *mut Tensor) -> i32>,
    pub(super) current_work_stream: *const c_void,
}

/// The layouts of a 64-bit platform, as the C header gives them.
#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Device>() == 8 && size_of::<DataType>() == 4 && size_of::<Version>() == 8);
    assert!(size_of::<Tensor>() == 48);
    assert!(offset_of!(Tensor, data) == 0 && offset_of!(Tensor, ctx) == 8 && offset_of!(Tensor, ndim) == 16);
    assert!(offset_of!(Tensor, dtype) == 20 && offset_of!(Tensor, shape) == 24);
    assert!(offset_of!(Tensor, strides) == 32 && offset_of!(Tensor, byte_offset) == 40);

    assert!(size_of::<Managed>() == size_of::<dlpack::ManagedTensor>() && size_of::<Managed>() == 64);
    assert!(offset_of!(Managed, tensor) == offset_of!(dlpack::ManagedTensor, dl_tensor));
    assert!(offset_of!(Managed, manager_ctx) == offset_of!(dlpack::ManagedTensor, manager_ctx));
    assert!(offset_of!(Managed, deleter) == offset_of!(dlpack::ManagedTensor, deleter));

    assert!(size_of::<ManagedVersioned>() == 80);
    assert!(offset_of!(ManagedVersioned, version) == 0 && offset_of!(ManagedVersioned, manager_ctx) == 8);
    assert!(offset_of!(ManagedVersioned, deleter) == 16 && offset_of!(ManagedVersioned, flags) == 24);
    assert!(offset_of!(ManagedVersioned, tensor) == 32);

    assert!(size_of::<ExchangeHeader>() == 16 && offset_of!(ExchangeHeader, previous) == 8);
    assert!(size_of::<Exchange>() == 56);
    assert!(offset_of!(Exchange, allocate) == 16 && offset_of!(Exchange, managed_from_object) == 24);
    assert!(offset_of!(Exchange, object_from_managed) == 32 && offset_of!(Exchange, borrow) == 40);
    assert!(offset_of!(Exchange, current_work_stream) == 48);
};
