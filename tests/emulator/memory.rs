//! Global memory: buffers that know their bounds, who may write them, what was written, and who touched it last.

use super::touch::{Place, Touch};

/// Every buffer begins in a span of addresses of its own, so that no offset leads from one into another.
const SPAN: u32 = 36;
/// Where in its span a buffer begins: aligned to 16 bytes and to no more, as a view of a tensor may be.
const START: u64 = 16;
/// The windows of generic addresses that are not global, far above every buffer.
pub(crate) const SHARED_WINDOW: u64 = 1 << 56;
pub(crate) const LOCAL_WINDOW: u64 = 2 << 56;
pub(crate) const PARAM_WINDOW: u64 = 3 << 56;

/// What an access may go wrong with.
pub(crate) type Checked<T> = Result<T, String>;

struct Buffer {
    name: String,
    bytes: Vec<u8>,
    written: Vec<bool>,
    writable: bool,
    /// How each byte was last written, and read.
    writes: Vec<Touch>,
    reads: Vec<Touch>,
}

/// All buffers of a device.
#[derive(Default)]
pub(crate) struct Global {
    buffers: Vec<Buffer>,
    /// The block that runs, numbered over all launches from 1, and the first one of its launch.
    block: u32,
    first: u32,
}

impl Global {
    /// A buffer with contents, read-only unless `writable`; returns its address.
    pub(crate) fn add(&mut self, name: &str, bytes: Vec<u8>, writable: bool) -> u64 {
        let written = vec![true; bytes.len()];
        self.push(name, bytes, written, writable)
    }

    /// A buffer to be written: reading what was not is an error.
    pub(crate) fn add_unwritten(&mut self, name: &str, length: usize) -> u64 {
        self.push(name, vec![0xff; length], vec![false; length], true)
    }

    fn push(&mut self, name: &str, bytes: Vec<u8>, written: Vec<bool>, writable: bool) -> u64 {
        let touches = if writable { vec![Touch::default(); bytes.len()] } else { Vec::new() };
        let (writes, reads) = (touches.clone(), touches);
        self.buffers.push(Buffer { name: name.to_owned(), bytes, written, writable, writes, reads });
        (self.buffers.len() as u64) << SPAN | START
    }

    pub(crate) fn begin_launch(&mut self) {
        self.first = self.block + 1;
    }

    pub(crate) fn begin_block(&mut self) {
        self.block += 1;
    }

    /// The buffer and the range in it that an access of a size touches.
    fn locate(&self, address: u64, size: usize) -> Checked<(usize, usize)> {
        if !address.is_multiple_of(size as u64) {
            return Err(format!("global address {address:#x} is not aligned to the {size} bytes of the access"));
        }
        let at = (address >> SPAN) as usize;
        let Some(buffer) = at.checked_sub(1).and_then(|at| self.buffers.get(at)) else {
            return Err(format!("global address {address:#x} is in no buffer"));
        };
        let offset = (address & ((1 << SPAN) - 1)) as i64 - START as i64;
        if offset < 0 || offset as usize + size > buffer.bytes.len() {
            // The upper half of a span lies before the next buffer.
            let before = self.buffers.get(at).filter(|_| offset >= 1 << (SPAN - 1));
            let (buffer, offset) = before.map_or((buffer, offset), |next| (next, offset - (1 << SPAN)));
            return Err(format!("{size} bytes at byte {offset} of {}, which has {}", buffer.name, buffer.bytes.len()));
        }
        Ok((at - 1, offset as usize))
    }

    pub(crate) fn load(&mut self, place: Place, address: u64, into: &mut [u8]) -> Checked<()> {
        let (at, offset) = self.locate(address, into.len())?;
        let (now, first) = (Touch::new(self.block, place), self.first);
        let buffer = &mut self.buffers[at];
        let range = offset..offset + into.len();
        if !buffer.written[range.clone()].iter().all(|&written| written) {
            return Err(format!("byte {offset} of {} is read and was never written", buffer.name));
        }
        if buffer.writable {
            for (write, read) in buffer.writes[range.clone()].iter().zip(&mut buffer.reads[range.clone()]) {
                if let Some(other) = write.clash(now, first, "wrote") {
                    return Err(format!("byte {offset} of {} is read, which {other}", buffer.name));
                }
                *read = read.and(now, first);
            }
        }
        into.copy_from_slice(&buffer.bytes[range]);
        Ok(())
    }

    pub(crate) fn store(&mut self, place: Place, address: u64, from: &[u8]) -> Checked<()> {
        let (at, offset) = self.locate(address, from.len())?;
        let (now, first) = (Touch::new(self.block, place), self.first);
        let buffer = &mut self.buffers[at];
        if !buffer.writable {
            return Err(format!("byte {offset} of {} is written, which is an input", buffer.name));
        }
        let range = offset..offset + from.len();
        for (write, read) in buffer.writes[range.clone()].iter_mut().zip(&buffer.reads[range.clone()]) {
            let clash = write.clash(now, first, "wrote").or_else(|| read.clash(now, first, "read"));
            if let Some(other) = clash {
                return Err(format!("byte {offset} of {} is written, which {other}", buffer.name));
            }
            *write = now;
        }
        buffer.written[range.clone()].fill(true);
        buffer.bytes[range].copy_from_slice(from);
        Ok(())
    }

    /// Changes a place atomically: blocks may meet there. Returns what was there.
    pub(crate) fn change(&mut self, address: u64, size: usize, change: impl Fn(u64) -> u64) -> Checked<u64> {
        let (at, offset) = self.locate(address, size)?;
        let buffer = &mut self.buffers[at];
        let range = offset..offset + size;
        if !buffer.writable {
            return Err(format!("byte {offset} of {} is written, which is an input", buffer.name));
        }
        if !buffer.written[range.clone()].iter().all(|&written| written) {
            return Err(format!("byte {offset} of {} is changed and was never written", buffer.name));
        }
        let old = number(&buffer.bytes[range.clone()]);
        buffer.bytes[range].copy_from_slice(&change(old).to_le_bytes()[..size]);
        Ok(old)
    }

    /// What a buffer holds, for the host: an error names the first byte never written.
    pub(crate) fn contents(&self, address: u64) -> Checked<&[u8]> {
        let buffer = &self.buffers[(address >> SPAN) as usize - 1];
        match buffer.written.iter().position(|&written| !written) {
            Some(byte) => {
                Err(format!("byte {byte} of {} ({} bytes) was never written", buffer.name, buffer.bytes.len()))
            }
            None => Ok(&buffer.bytes),
        }
    }

    /// What a buffer holds, and which bytes of it were written.
    pub(crate) fn raw(&self, address: u64) -> (&[u8], &[bool]) {
        let buffer = &self.buffers[(address >> SPAN) as usize - 1];
        (&buffer.bytes, &buffer.written)
    }
}

/// Up to eight bytes as a number.
pub(crate) fn number(bytes: &[u8]) -> u64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(wide)
}
