//! Plans of modular attention.
//!
//! | kernel | what |
//! |---|---|
//! | `attend_forward` | softmax and weighted values of blocks of query rows, or of shares of the keys where queries are few |
//! | `attend_combine` | the shares of the keys joined |
//! | `attend_sum` | the two softmaxes of "split" added |
//! | `attend_delta` | delta = dO . o and the gradient of the sinks |
//! | `attend_keys` | gradients of keys and values |
//! | `attend_rows` | gradients of queries, or attention mass by modality |
//! | `attend_bias` | gradient of the bias table from the rows' sums |

mod backward;
mod forward;
mod inputs;
mod rows;
mod sum;

pub use backward::{BiasParams, DeltaParams, KeysParams, backward, backward_workspace};
pub use forward::{CombineParams, ForwardParams, forward, forward_workspace};
pub use inputs::{AttendInputs, EncodeRangesParams};
pub use rows::RowsParams;
pub use sum::{SumParams, sum};
