//! Intermediate results of a plan: regions of one allocation that the caller makes.

/// Alignment of every region, that of a fresh allocation on a device.
const ALIGNMENT: usize = 256;

/// A region of the workspace, relative to its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub offset: usize,
    /// Length in bytes, as asked for.
    pub bytes: usize,
}

impl Region {
    /// Its address in a workspace that begins at `base`.
    pub const fn at(self, base: u64) -> u64 {
        base + self.offset as u64
    }
}

/// Lays regions one after the other; the plan asks for them always in the same order, so that the size it announces and
/// the addresses it uses agree.
#[derive(Debug, Clone, Default)]
pub struct Workspace {
    end: usize,
}

impl Workspace {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { end: 0 }
    }

    /// A region for so many elements of `size` bytes, 256-byte aligned.
    pub fn region(&mut self, count: usize, size: usize) -> Region {
        let region = Region { offset: self.end, bytes: count.saturating_mul(size) };
        self.end = self.end.saturating_add(region.bytes).checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        region
    }

    /// Bytes to allocate for all regions so far.
    pub const fn bytes(&self) -> usize {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_disjoint() {
        let mut workspace = Workspace::new();
        let (first, empty, last) = (workspace.region(3, 4), workspace.region(0, 8), workspace.region(257, 1));
        assert_eq!([first.offset, empty.offset, last.offset, workspace.bytes()], [0, 256, 256, 768]);
        assert_eq!(last.at(4096), 4352);
        assert_eq!(Workspace::new().bytes(), 0);
        assert_eq!(workspace.region(usize::MAX, 8).bytes, usize::MAX);
        assert_eq!(workspace.bytes(), usize::MAX);
    }
}
