//! Codes, summaries and the record of ids out of range.

use crate::device::record;
use crate::emulator::{Gpu, Plain};
use moda_attn::cuda::ids::{Codes, TOKENS};
use moda_attn::cuda::problem::{IdsArgument, IdsRecord, Offender};
use moda_attn::cuda::{DeviceTensor, Workspace};
use moda_attn::dtype::DType;

const PADDING: u8 = 255;
const MIXED: u16 = 254;
const PADDED: u16 = 256;

/// Codes, summaries and what was reported.
fn encode<T: Plain>(values: &[T], tensor: DeviceTensor<2>, context: Option<&[u8]>) -> (Vec<u8>, Vec<u16>, IdsRecord) {
    let (mut gpu, mut workspace) = (Gpu::new(), Workspace::new());
    let codes = Codes::new(&mut workspace, tensor.shape);
    let record = record(&mut gpu);
    let base = gpu.output::<u8>(workspace.bytes());
    let ids = DeviceTensor { pointer: gpu.buffer(values) + tensor.pointer, ..tensor };
    let context = context.map(|flags| DeviceTensor::contiguous(gpu.buffer(flags), DType::Bool, tensor.shape));
    let launch = codes.encode((IdsArgument::Modality, ids), context, 3, (record, base));
    gpu.run(&[launch.unwrap()]);
    let bytes: Vec<Option<u8>> = gpu.read_written(base);
    let region = |at: u64, length: usize| -> Vec<u8> {
        bytes[(at - base) as usize..][..length].iter().map(|byte| byte.unwrap()).collect()
    };
    let blocks = tensor.shape[0] * codes.blocks();
    let summaries = region(codes.summaries(base), 2 * blocks);
    let summaries = summaries.chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    (region(codes.codes(base), blocks * TOKENS), summaries, IdsRecord(gpu.read(record)[0]))
}

#[test]
fn blocks_are_summarised() {
    // One modality; one and padding; several; padding alone; the end of the row.
    let mut row = vec![1i16; TOKENS];
    row.extend((0..TOKENS).map(|at| if at == 9 { -1 } else { 2 }));
    row.extend((0..TOKENS).map(|at| (at % 3) as i16));
    row.extend([-1; TOKENS]);
    row.extend([0; 5]);
    let tensor = DeviceTensor::contiguous(0, DType::Int16, [1, row.len()]);
    let (codes, summaries, record) = encode(&row, tensor, None);
    assert_eq!(summaries, [1, 2 | PADDED, MIXED, u16::from(PADDING) | PADDED, PADDED]);
    let wanted = row.iter().map(|&id| if id < 0 { PADDING } else { id as u8 });
    assert_eq!(codes, wanted.chain([PADDING; TOKENS - 5]).collect::<Vec<_>>());
    assert_eq!(record, IdsRecord::NONE);
}

#[test]
fn any_integer_dtype_and_strides_are_read() {
    fn check<T: Plain + TryFrom<i64>>(dtype: DType) {
        // (3, 2) transposed and every second column: tokens two apart.
        let values: Vec<T> = [0, 9, 1, 9, 2, 9].into_iter().map(|id| T::try_from(id).ok().unwrap()).collect();
        let tensor = DeviceTensor { pointer: 0, dtype, shape: [1, 3], strides: [6, 2] };
        let (codes, _, record) = encode(&values, tensor, Some(&[1, 0, 7]));
        assert_eq!((&codes[..4], record), (&[0, PADDING, 2, PADDING][..], IdsRecord::NONE), "{dtype:?}");
    }
    check::<i8>(DType::Int8);
    check::<u8>(DType::UInt8);
    check::<i16>(DType::Int16);
    check::<u16>(DType::UInt16);
    check::<i32>(DType::Int32);
    check::<u32>(DType::UInt32);
    check::<i64>(DType::Int64);
    check::<u64>(DType::UInt64);
}

#[test]
fn the_first_id_out_of_range_is_reported_and_counts_as_padding() {
    let mut ids = vec![0i64; 2 * 130];
    (ids[130 + 128], ids[130 + 3], ids[130 + 64]) = (-2, 70, i64::MAX);
    let tensor = DeviceTensor::contiguous(0, DType::Int64, [2, 130]);
    let (codes, _, record) = encode(&ids, tensor, None);
    let offender = Offender { argument: IdsArgument::Modality, batch: 1, token: 3, given: 70, largest: 2 };
    assert_eq!(record.offender(), Some(offender));
    let second = &codes[3 * TOKENS..];
    assert_eq!([second[3], second[64], second[128], second[127]], [PADDING, PADDING, PADDING, 0]);
    let (codes, _, record) = encode(&[u64::MAX], DeviceTensor::contiguous(0, DType::UInt64, [1, 1]), None);
    assert_eq!((codes[0], record.offender().unwrap().given), (PADDING, 65535));
}
