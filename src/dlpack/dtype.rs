//! `DLPack` type codes: the ones this crate computes with, and names for the others so that an error can say what came.

use super::structs::DataType;
use crate::dtype::DType;

const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const OPAQUE: u8 = 3;
const BFLOAT: u8 = 4;
const COMPLEX: u8 = 5;
const BOOL: u8 = 6;

/// Names of the codes from 7 on: 8-, 6- and 4-bit floats.
const SMALL_FLOATS: [&str; 11] = [
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float4_e2m1fn",
];

/// The dtype of a type code; what it would be called where it is none of ours.
pub(super) fn decode(code: DataType) -> Result<DType, String> {
    if code.lanes != 1 {
        let name = decode(DataType { lanes: 1, ..code }).map_or_else(|name| name, |dtype| dtype.name().to_owned());
        return Err(format!("{name} in vectors of {}", code.lanes));
    }
    Ok(match (code.code, code.bits) {
        (BOOL, 8) => DType::Bool,
        (INT, 8) => DType::Int8,
        (INT, 16) => DType::Int16,
        (INT, 32) => DType::Int32,
        (INT, 64) => DType::Int64,
        (UINT, 8) => DType::UInt8,
        (UINT, 16) => DType::UInt16,
        (UINT, 32) => DType::UInt32,
        (UINT, 64) => DType::UInt64,
        (FLOAT, 16) => DType::Float16,
        (BFLOAT, 16) => DType::BFloat16,
        (FLOAT, 32) => DType::Float32,
        (FLOAT, 64) => DType::Float64,
        _ => return Err(name(code)),
    })
}

fn name(DataType { code, bits, .. }: DataType) -> String {
    match code {
        INT => format!("int{bits}"),
        UINT => format!("uint{bits}"),
        FLOAT => format!("float{bits}"),
        OPAQUE => "an opaque handle".to_owned(),
        BFLOAT => format!("bfloat{bits}"),
        COMPLEX => format!("complex{bits}"),
        BOOL => format!("bool of {bits} bits"),
        _ => match SMALL_FLOATS.get(usize::from(code) - 7) {
            Some(&name) => name.to_owned(),
            None => format!("DLPack type code {code} with {bits} bits"),
        },
    }
}

/// The type code of a dtype.
pub(super) fn encode(dtype: DType) -> DataType {
    let code = match dtype {
        DType::Bool => BOOL,
        DType::Int8 | DType::Int16 | DType::Int32 | DType::Int64 => INT,
        DType::UInt8 | DType::UInt16 | DType::UInt32 | DType::UInt64 => UINT,
        DType::Float16 | DType::Float32 | DType::Float64 => FLOAT,
        DType::BFloat16 => BFLOAT,
    };
    DataType { code, bits: 8 * dtype.size() as u8, lanes: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_survives_the_round_trip() {
        use DType::*;
        for dtype in
            [Bool, Int8, Int16, Int32, Int64, UInt8, UInt16, UInt32, UInt64, Float16, BFloat16, Float32, Float64]
        {
            assert_eq!(decode(encode(dtype)), Ok(dtype));
        }
    }

    #[test]
    fn what_is_not_supported_has_a_name() {
        let name = |code, bits, lanes| decode(DataType { code, bits, lanes }).unwrap_err();
        assert_eq!(name(COMPLEX, 64, 1), "complex64");
        assert_eq!(name(10, 8, 1), "float8_e4m3fn");
        assert_eq!(name(12, 8, 1), "float8_e5m2");
        assert_eq!(name(17, 4, 1), "float4_e2m1fn");
        assert_eq!(name(FLOAT, 128, 1), "float128");
        assert_eq!(name(FLOAT, 32, 4), "float32 in vectors of 4");
        assert_eq!(name(99, 8, 1), "DLPack type code 99 with 8 bits");
    }
}
