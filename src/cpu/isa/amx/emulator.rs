//! AMX for machines that lack it: the machine code of [`super`] runs as it is, and every tile instruction, which such a
//! CPU refuses, is carried out here. Tests only: it is some thousand times slower than the real thing.

use half::bf16;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;

/// The tile registers of a thread.
struct Tiles {
    rows: [usize; 8],
    bytes: [usize; 8],
    data: [[[u8; 64]; 16]; 8],
}

thread_local! {
    static TILES: RefCell<Tiles> =
        const { RefCell::new(Tiles { rows: [0; 8], bytes: [0; 8], data: [[[0; 64]; 16]; 8] }) };
}

/// From here on a refused tile instruction is carried out.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid one; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_flags = libc::SA_SIGINFO;
            action.sa_sigaction = handle as *const () as usize;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, ptr::null_mut()), 0);
        }
    });
}

extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands a ucontext to a handler with SA_SIGINFO; nobody else has it.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // SAFETY: the instruction pointer is that of the refused instruction; none is longer than 15 bytes, and functions
    // are followed by more of the program.
    let code = unsafe { *(registers[libc::REG_RIP as usize] as *const [u8; 15]) };
    match TILES.with_borrow_mut(|tiles| tiles.execute(&code, registers)) {
        Some(length) => registers[libc::REG_RIP as usize] += length as i64,
        // Really an illegal instruction.
        // SAFETY: the default action ends the process as soon as the instruction is tried again.
        None => unsafe {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        },
    }
}

/// The numbers of general registers in the order in which instructions name them.
const GENERAL: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// A memory operand: where it begins, the register scaled as row stride, and the bytes it takes in the instruction.
struct Memory {
    base: usize,
    stride: usize,
    length: usize,
}

/// Reads the operand behind a VEX prefix and an opcode; `code` begins at the ModRM byte.
fn memory(code: &[u8], vex: u8, registers: &[i64; 23]) -> Memory {
    let general =
        |number: u8, extended: bool| registers[GENERAL[usize::from(number) + 8 * usize::from(extended)] as usize];
    let (mode, rm) = (code[0] >> 6, code[0] & 7);
    let (no_index, no_base) = (vex & 0x40 != 0, vex & 0x20 != 0);
    let (mut length, mut base, mut stride) = (1, 0, 0);
    if rm == 4 {
        let (scale, index, from) = (code[1] >> 6, code[1] >> 3 & 7, code[1] & 7);
        length = 2;
        assert!(mode != 0 || from != 5, "an address without a base register");
        base += general(from, !no_base);
        if index != 4 || !no_index {
            stride = general(index, !no_index) << scale;
        }
    } else {
        assert!(mode != 0 || rm != 5, "an address relative to the instruction");
        base += general(rm, !no_base);
    }
    if mode == 1 {
        base += i64::from(code[length].cast_signed());
        length += 1;
    } else if mode == 2 {
        base += i64::from(i32::from_le_bytes(code[length..length + 4].try_into().expect("four bytes")));
        length += 4;
    }
    Memory { base: base as usize, stride: stride as usize, length }
}

impl Tiles {
    /// Carries out one instruction and says how long it was; `None` for any other than those of AMX in use.
    fn execute(&mut self, code: &[u8; 15], registers: &[i64; 23]) -> Option<usize> {
        let [0xc4, vex, last, opcode, operands, ..] = *code else { return None };
        // Map 0F38, 128 bits, W 0.
        if vex & 0x1f != 2 || last & 0x84 != 0 {
            return None;
        }
        let (prefix, plain) = (last & 3, operands >> 6 == 3);
        let target = usize::from(operands >> 3 & 7);
        match (opcode, prefix, plain) {
            (0x49, 0, false) => {
                let memory = memory(&code[4..], vex, registers);
                // SAFETY: the operand of LDTILECFG is 64 readable bytes.
                self.configure(unsafe { &*(memory.base as *const [u8; 64]) });
                return Some(4 + memory.length);
            }
            (0x49, 0, true) => *self = Self { rows: [0; 8], bytes: [0; 8], data: [[[0; 64]; 16]; 8] },
            (0x49, 3, true) => self.data[target] = [[0; 64]; 16],
            // TILELOADD and TILELOADDT1
            (0x4b, 3 | 1, false) => {
                let memory = memory(&code[4..], vex, registers);
                self.data[target] = [[0; 64]; 16];
                for row in 0..self.used(target) {
                    let from = (memory.base + row * memory.stride) as *const u8;
                    // SAFETY: the program asked for these bytes of every configured row.
                    unsafe { from.copy_to_nonoverlapping(self.data[target][row].as_mut_ptr(), self.bytes[target]) };
                }
                return Some(4 + memory.length);
            }
            (0x4b, 2, false) => {
                let memory = memory(&code[4..], vex, registers);
                for row in 0..self.used(target) {
                    let to = (memory.base + row * memory.stride) as *mut u8;
                    // SAFETY: as above, to be written.
                    unsafe { to.copy_from_nonoverlapping(self.data[target][row].as_ptr(), self.bytes[target]) };
                }
                return Some(4 + memory.length);
            }
            (0x5c, 2, true) => self.dot(target, usize::from(operands & 7), usize::from(!(last >> 3) & 7)),
            _ => return None,
        }
        Some(5)
    }

    fn configure(&mut self, configuration: &[u8; 64]) {
        assert_eq!(configuration[..2], [1, 0], "palette and first row");
        for tile in 0..8 {
            let bytes = [configuration[16 + 2 * tile], configuration[17 + 2 * tile]];
            (self.bytes[tile], self.rows[tile]) =
                (usize::from(u16::from_le_bytes(bytes)), usize::from(configuration[48 + tile]));
            assert!((1..=64).contains(&self.bytes[tile]) && (1..=16).contains(&self.rows[tile]), "tile {tile}");
            self.data[tile] = [[0; 64]; 16];
        }
    }

    /// Rows of a tile; the real instruction faults where none are configured.
    fn used(&self, tile: usize) -> usize {
        assert!(self.rows[tile] > 0, "tile {tile} is not configured");
        self.rows[tile]
    }

    fn number(&self, tile: usize, row: usize, column: usize) -> f32 {
        let bytes = &self.data[tile][row];
        bf16::from_le_bytes([bytes[2 * column], bytes[2 * column + 1]]).to_f32()
    }

    /// TDPBF16PS: sums of products of pairs.
    fn dot(&mut self, sum: usize, left: usize, right: usize) {
        assert_eq!(self.used(sum), self.used(left), "rows of the sums and of the left operand");
        assert_eq!(self.bytes[left] / 4, self.used(right), "pairs along the depth");
        for row in 0..self.rows[sum] {
            for column in 0..self.bytes[sum] / 4 {
                let place = 4 * column..4 * column + 4;
                let mut total = f32::from_le_bytes(self.data[sum][row][place.clone()].try_into().expect("four bytes"));
                for p in 0..self.rows[right] {
                    for half in 0..2 {
                        total += self.number(left, row, 2 * p + half) * self.number(right, p, 2 * column + half);
                    }
                }
                self.data[sum][row][place].copy_from_slice(&total.to_le_bytes());
            }
        }
    }
}
