//! The operators on CUDA tensors: each imports its tensors, checks the problem, has torch allocate the workspace and
//! launches the plan on torch's stream. Nothing waits for the device.
//!
//! What forward and backward of an operator both read comes as one tuple.

mod align;
mod attend;
mod info;
mod sink;

pub(super) use align::{cuda_align_backward, cuda_align_forward};
pub(super) use attend::{cuda_attend_backward, cuda_attend_forward};
pub(super) use info::{cuda_check, cuda_info, cuda_look_in, describe};
pub(super) use sink::{cuda_sink_backward, cuda_sink_forward};

use super::call::compute;
use crate::cuda::driver::Gpu;
use crate::cuda::{DeviceTensor, Launch};
use crate::dlpack::OnDevice;
use crate::error::{Error, Result};
use pyo3::prelude::*;

/// One call: its device, what it imported, its stream and how it gets a workspace.
struct Call<'py> {
    py: Python<'py>,
    gpu: &'static Gpu,
    ordinal: usize,
    /// The argument that says which device it is.
    first: &'static str,
    /// What must live until the launches are made.
    kept: Vec<OnDevice>,
    stream: u64,
    allocate: Bound<'py, PyAny>,
}

impl<'py> Call<'py> {
    /// A call on the device of its first tensor, which it reads. Raises what an earlier call on it could not.
    fn new<const R: usize>(
        first: &'static str,
        tensor: &Bound<'py, PyAny>,
        wanted: &str,
        (stream, allocate): Place<'py>,
    ) -> PyResult<(Self, DeviceTensor<R>)> {
        let imported = OnDevice::new(first, tensor, || "cuda".to_owned())?;
        let ordinal = imported.ordinal();
        let gpu = compute(allocate.py(), || Gpu::get(ordinal))?;
        gpu.check_record()?;
        let mut kept = Vec::with_capacity(16);
        let tensor = imported.tensor(first, wanted)?;
        kept.push(imported);
        Ok((Self { py: allocate.py(), gpu, ordinal, first, kept, stream, allocate }, tensor))
    }

    fn import(&self, argument: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<OnDevice> {
        let wanted = |ordinal| format!("cuda:{ordinal}, the device of {}", self.first);
        let tensor = OnDevice::new(argument, tensor, || wanted(self.ordinal))?;
        if tensor.ordinal() == self.ordinal {
            return Ok(tensor);
        }
        Err(Error::Device { argument, given: format!("cuda:{}", tensor.ordinal()), wanted: wanted(self.ordinal) }
            .into())
    }

    /// A tensor to read.
    fn read<const R: usize>(
        &mut self,
        argument: &'static str,
        tensor: &Bound<'py, PyAny>,
        wanted: &str,
    ) -> PyResult<DeviceTensor<R>> {
        let imported = self.import(argument, tensor)?;
        let tensor = imported.tensor(argument, wanted)?;
        self.kept.push(imported);
        Ok(tensor)
    }

    /// A tensor to read that may be absent.
    fn read_if<const R: usize>(
        &mut self,
        argument: &'static str,
        tensor: Option<&Bound<'py, PyAny>>,
        wanted: &str,
    ) -> PyResult<Option<DeviceTensor<R>>> {
        tensor.map(|tensor| self.read(argument, tensor, wanted)).transpose()
    }

    /// A tensor to write.
    fn write<const R: usize>(
        &mut self,
        argument: &'static str,
        tensor: &Bound<'py, PyAny>,
        wanted: &str,
    ) -> PyResult<DeviceTensor<R>> {
        let tensor = self.read(argument, tensor, wanted)?;
        self.kept.last().map_or(Ok(()), |imported| imported.check_writable(argument))?;
        Ok(tensor)
    }

    /// A tensor to write that may be absent.
    fn write_if<const R: usize>(
        &mut self,
        argument: &'static str,
        tensor: Option<&Bound<'py, PyAny>>,
        wanted: &str,
    ) -> PyResult<Option<DeviceTensor<R>>> {
        tensor.map(|tensor| self.write(argument, tensor, wanted)).transpose()
    }

    /// Has the caller allocate so many bytes, makes the plan for them and launches it.
    fn run(self, bytes: usize, plan: impl FnOnce(u64) -> Result<Vec<Launch>> + Send) -> PyResult<()> {
        let held = (bytes > 0).then(|| self.allocate.call1((bytes,))).transpose()?;
        let workspace = match &held {
            None => 0,
            Some(object) => {
                let imported = self.import("workspace", object)?;
                let DeviceTensor { pointer, dtype, shape: [count], .. } = imported.tensor("workspace", "(bytes,)")?;
                if count * dtype.size() < bytes || !pointer.is_multiple_of(16) {
                    let given = format!("{} bytes at {pointer:#x}", count * dtype.size());
                    let wanted = format!("{bytes} bytes, aligned as allocations are");
                    return Err(Error::Option { argument: "workspace", given, wanted }.into());
                }
                pointer
            }
        };
        let (gpu, stream) = (self.gpu, self.stream);
        // SAFETY: the tensors are alive, as every caller of an operator promises, and what torch frees it reuses in the
        // order of its stream, which the launches are on. Their addresses were checked against the problem.
        compute(self.py, || plan(workspace).and_then(|launches| unsafe { gpu.run(&launches, stream) }))
    }
}

/// A stream's handle, and a function from a number of bytes to a tensor of that many, allocated for this stream.
type Place<'py> = (u64, Bound<'py, PyAny>);
