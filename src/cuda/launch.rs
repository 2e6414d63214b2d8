//! What a plan is made of: kernels and how they are launched. Pure data; the driver and the tests' interpreter run it.

use super::source::Source;

/// A kernel of one source, specialised by its defines. Equal values are the same compiled code.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The text.
    pub source: Source,
    /// Name of the `extern "C" __global__` function.
    pub entry: &'static str,
    /// Macros set when the text is compiled: `-D NAME=VALUE`, always in the same order.
    pub defines: Vec<(&'static str, i64)>,
}

/// One launch of a kernel. Launches of a plan run one after the other on one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// What runs.
    pub kernel: Kernel,
    /// Blocks in x, y and z. Never 0: a plan leaves out what has nothing to do.
    pub grid: [u32; 3],
    /// Threads of a block, all in x.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The kernel's one argument, a struct by value.
    pub params: Vec<u8>,
}

/// A `#[repr(C)]` struct that a kernel takes by value; [`parameters!`](crate::parameters) makes one.
///
/// # Safety
/// The type has no padding: every one of its bytes is part of a field.
pub unsafe trait Parameters: Copy {
    /// Name of each field with its offset in bytes.
    const FIELDS: &'static [(&'static str, usize)];

    /// The bytes, as the kernel reads them.
    fn bytes(&self) -> Vec<u8> {
        let first: *const u8 = std::ptr::from_ref(self).cast();
        // SAFETY: a live value of this size, and no byte of it is padding.
        unsafe { std::slice::from_raw_parts(first, size_of::<Self>()) }.to_vec()
    }
}

/// Declares a struct that a kernel takes by value, the mirror of the one in its CUDA text. A layout with padding does not
/// compile: order the fields by size, 8 bytes before 4.
///
/// ```
/// moda_attn::parameters! {
///     /// out[i] = value
///     pub struct FillParams {
///         /// Address of out.
///         pub out: u64,
///         /// Its length.
///         pub count: i64,
///         /// What to write.
///         pub value: [f32; 2],
///     }
/// }
/// assert_eq!(moda_attn::cuda::Parameters::bytes(&FillParams { out: 1, count: 2, value: [0.0; 2] }).len(), 24);
/// ```
#[macro_export]
macro_rules! parameters {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy)]
        #[repr(C)]
        $vis struct $name { $($(#[$field_meta])* $field_vis $field: $type),* }

        const _: () = assert!(0 $(+ ::std::mem::size_of::<$type>())* == ::std::mem::size_of::<$name>(), "padding between the fields");

        // SAFETY: the sizes of the fields add up to the size of the struct, so there is no padding; the fields are numbers.
        unsafe impl $crate::cuda::Parameters for $name {
            const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), ::std::mem::offset_of!($name, $field))),*];
        }
    };
}

/// Blocks of `size` that cover `count`, as a grid dimension.
pub fn blocks(count: usize, size: usize) -> u32 {
    u32::try_from(count.div_ceil(size)).unwrap_or(u32::MAX)
}
