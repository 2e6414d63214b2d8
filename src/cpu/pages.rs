//! Large pages under what is about to be written. Memory that an allocator just got from the system is backed at its first
//! use, page by page: with pages of 4 KB that takes as long as a tenth of a forward that fills them.

use crate::view::ViewMut;

/// Size and alignment of a large page.
const LARGE: usize = 2 << 20;

/// [`prefer_large`] for a result.
pub(super) fn prefer_large_under<T: Copy, const R: usize>(result: &mut ViewMut<'_, T, R>) {
    let result = result.as_mut_slice();
    prefer_large(result.as_mut_ptr().cast(), size_of_val(result));
}

/// Asks for large pages where they lie wholly inside `bytes` of memory that the caller may write. Only a hint: memory that is
/// backed already stays as it is, and a system without large pages does not mind.
pub(super) fn prefer_large(pointer: *mut u8, bytes: usize) {
    let before = pointer.align_offset(LARGE);
    let length = bytes.saturating_sub(before) / LARGE * LARGE;
    if length > 0 {
        #[cfg(target_os = "linux")]
        // SAFETY: whole pages of the caller's memory; the advice does not change what they hold.
        unsafe {
            libc::madvise(pointer.wrapping_add(before).cast(), length, libc::MADV_HUGEPAGE);
        }
    }
}
