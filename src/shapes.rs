//! The shape rules of the operators, on shapes alone: problems of every device are held to the same ones, in the same
//! words.

use crate::dtype::Real;
use crate::error::{Error, Result};
use crate::ids::MAX_MODALITIES;
use crate::layout::print_shape;
use crate::problem::{Combine, MassBy};

/// An option's value that cannot be right.
pub(crate) fn option(argument: &'static str, given: String, wanted: &str) -> Error {
    Error::Option { argument, given, wanted: wanted.to_owned() }
}

fn shape_error(argument: &'static str, given: &[usize], wanted: String) -> Error {
    Error::Shape { argument, given: print_shape(given), wanted }
}

fn expect(argument: &'static str, given: &[usize], wanted: &[usize], meaning: &str) -> Result<()> {
    if given == wanted {
        return Ok(());
    }
    Err(shape_error(argument, given, format!("{} = {meaning}", print_shape(wanted))))
}

/// Where results go must have exactly their shape.
fn fits<const R: usize>(argument: &'static str, given: [usize; R], wanted: [usize; R]) -> Result<()> {
    if given == wanted {
        return Ok(());
    }
    Err(shape_error(argument, &given, print_shape(&wanted)))
}

/// The same for what may be absent.
fn fits_where_given<const R: usize>(
    argument: &'static str,
    given: Option<[usize; R]>,
    wanted: [usize; R],
) -> Result<()> {
    given.map_or(Ok(()), |given| fits(argument, given, wanted))
}

/// What is there exactly where it is wanted, and then of the right shape.
fn fits_if<const R: usize>(
    argument: &'static str,
    given: Option<[usize; R]>,
    wanted: Option<[usize; R]>,
) -> Result<()> {
    let print = |shape: Option<[usize; R]>| shape.map_or_else(|| "nothing".to_owned(), |shape| print_shape(&shape));
    if given == wanted {
        return Ok(());
    }
    Err(Error::Shape { argument, given: print(given), wanted: print(wanted) })
}

/// Checks a given number of modalities, against the one of the bias table if there is one.
pub fn check_modalities(given: usize, table: Option<usize>) -> Result<()> {
    let wanted = match table {
        Some(m) if m != given => format!("{m}, the M of modality_bias"),
        None if !(1..=MAX_MODALITIES).contains(&given) => format!("1 to {MAX_MODALITIES}"),
        _ => return Ok(()),
    };
    Err(option("num_modalities", given.to_string(), &wanted))
}

/// The scale of the scores is a number.
pub(crate) fn check_scale<R: Real>(scale: R) -> Result<()> {
    if scale.is_finite() { Ok(()) } else { Err(option("scale", scale.to_string(), "a finite number")) }
}

/// The eps of unit keys is a number that takes nothing away.
pub(crate) fn check_eps<R: Real>(eps: R) -> Result<()> {
    let fits = eps >= R::ZERO && eps.is_finite();
    if fits { Ok(()) } else { Err(option("eps", eps.to_string(), "a finite number >= 0")) }
}

/// Shapes of an alignment problem.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AlignShapes {
    pub(crate) key: [usize; 4],
    pub(crate) value: [usize; 4],
    pub(crate) modality: [usize; 2],
    pub(crate) context: [usize; 2],
    pub(crate) keep: [usize; 3],
    pub(crate) mix: [usize; 3],
    pub(crate) basis: Option<[usize; 5]>,
}

impl AlignShapes {
    /// Checks every shape against the key's and the parameters'.
    pub(crate) fn check(&self) -> Result<()> {
        let [b, _, n, d] = self.key;
        let m = self.keep[0];
        expect("value", &self.value, &self.key, "the shape of key")?;
        expect("modality", &self.modality, &[b, n], "(B, N)")?;
        expect("context", &self.context, &[b, n], "(B, N)")?;
        if m == 0 || m > MAX_MODALITIES {
            let wanted = format!("(M, D, D) with M from 1 to {MAX_MODALITIES} and D = {d}");
            return Err(shape_error("keep", &self.keep, wanted));
        }
        expect("keep", &self.keep, &[m, d, d], "(M, D, D)")?;
        expect("mix", &self.mix, &[m, d, d], "(M, D, D), as keep")?;
        self.basis.map_or(Ok(()), |basis| expect("basis", &basis, &self.bases(), "(B, Hkv, M, D, D)"))
    }

    /// The shape (B, H, M, D, D) of the bases.
    fn bases(&self) -> [usize; 5] {
        let [b, h, _, d] = self.key;
        [b, h, self.keep[0], d, d]
    }

    /// Checks where forward writes.
    pub(crate) fn check_outputs(&self, aligned: [usize; 4], basis: Option<[usize; 5]>) -> Result<()> {
        fits("aligned", aligned, self.key)?;
        fits_where_given("basis", basis, self.bases())
    }

    /// Checks what backward starts from; the basis is always given then.
    pub(crate) fn check_upstream(&self, aligned: [usize; 4], basis: Option<[usize; 5]>) -> Result<()> {
        fits_if("basis", self.basis, Some(self.bases()))?;
        fits("d aligned", aligned, self.key)?;
        fits_where_given("d basis", basis, self.bases())
    }

    /// Checks where backward writes: the gradients of key and value, of keep and mix, of a given basis.
    pub(crate) fn check_gradients(
        &self,
        [key, value]: [[usize; 4]; 2],
        [keep, mix]: [[usize; 3]; 2],
        basis: Option<[usize; 5]>,
    ) -> Result<()> {
        fits("d key", key, self.key)?;
        fits("d value", value, self.key)?;
        fits("d keep", keep, self.keep)?;
        fits("d mix", mix, self.keep)?;
        fits_where_given("d basis", basis, self.bases())
    }
}

/// Shapes of an attention problem.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttendShapes {
    pub(crate) query: [usize; 4],
    pub(crate) key: [usize; 4],
    pub(crate) value: [usize; 4],
    pub(crate) modality: [usize; 2],
    pub(crate) query_modality: [usize; 2],
    /// (B|1, Hq|1, Nq, parts)
    pub(crate) sink: Option<[usize; 4]>,
    /// (B|1, Hq|1, M, M)
    pub(crate) bias: Option<[usize; 4]>,
    /// (B|1, Nq)
    pub(crate) key_range: Option<[usize; 2]>,
    pub(crate) combine: Combine,
    pub(crate) num_modalities: Option<usize>,
}

impl AttendShapes {
    /// Checks every shape. Sink and bias may have batch and heads of 1.
    pub(crate) fn check(&self) -> Result<()> {
        let [b, hq, nq, d] = self.query;
        let [_, hkv, nk, _] = self.key;
        expect("key", &self.key, &[b, hkv, nk, d], "(B, Hkv, Nk, D) with the B and D of query")?;
        expect("value", &self.value, &self.key, "the shape of key")?;
        if hkv == 0 && hq != 0 || hkv != 0 && !hq.is_multiple_of(hkv) {
            let wanted = format!("(B, Hq, Nq, D) with Hq a multiple of Hkv = {hkv}");
            return Err(shape_error("query", &self.query, wanted));
        }
        expect("modality", &self.modality, &[b, nk], "(B, Nk)")?;
        expect("query_modality", &self.query_modality, &[b, nq], "(B, Nq)")?;
        self.sink.map_or(Ok(()), |sink| self.check_sink(sink))?;
        self.bias.map_or(Ok(()), |bias| self.check_bias(bias))?;
        if let Some(m) = self.num_modalities {
            check_modalities(m, self.bias.map(|bias| bias[2]))?;
        }
        if let Some([rows, queries]) = self.key_range
            && ((rows != b && rows != 1) || queries != nq)
        {
            let wanted = format!("(B|1, Nq, 2) = ({b}|1, {nq}, 2)");
            return Err(shape_error("key_range", &[rows, queries, 2], wanted));
        }
        Ok(())
    }

    /// Whether the first two dimensions are the batch and the query heads, or 1.
    fn repeats(&self, given: [usize; 4]) -> bool {
        (0..2).all(|axis| given[axis] == self.query[axis] || given[axis] == 1)
    }

    fn check_sink(&self, sink: [usize; 4]) -> Result<()> {
        let [b, hq, nq, _] = self.query;
        if self.repeats(sink) && sink[2..] == [nq, self.combine.parts()] {
            return Ok(());
        }
        Err(match self.combine {
            Combine::Joint => shape_error("sink", &sink[..3], format!("(B|1, Hq|1, Nq) = ({b}|1, {hq}|1, {nq})")),
            Combine::Split => shape_error("sink", &sink, format!("(B|1, Hq|1, Nq, 2) = ({b}|1, {hq}|1, {nq}, 2)")),
        })
    }

    fn check_bias(&self, bias: [usize; 4]) -> Result<()> {
        let ([b, hq, ..], m) = (self.query, bias[2]);
        if self.repeats(bias) && bias[3] == m && (1..=MAX_MODALITIES).contains(&m) {
            return Ok(());
        }
        Err(shape_error("modality_bias", &bias, format!("(B|1, Hq|1, M, M) = ({b}|1, {hq}|1, M, M)")))
    }

    /// The shape (B, Hq, parts, Nq) of the logsumexp.
    fn logsumexp(&self) -> [usize; 4] {
        let [b, hq, nq, _] = self.query;
        [b, hq, self.combine.parts(), nq]
    }

    /// The shape (B, Hq, 2, Nq, D) of the two outputs of "split".
    fn both(&self) -> [usize; 5] {
        let [b, hq, nq, d] = self.query;
        [b, hq, 2, nq, d]
    }

    /// Checks where forward writes, on `modalities` of them.
    pub(crate) fn check_outputs(
        &self,
        out: [usize; 4],
        logsumexp: Option<[usize; 4]>,
        parts: Option<[usize; 5]>,
        mass: Option<(MassBy, [usize; 4])>,
        modalities: usize,
    ) -> Result<()> {
        let [b, hq, nq, _] = self.query;
        fits("out", out, self.query)?;
        fits_where_given("logsumexp", logsumexp, self.logsumexp())?;
        fits_where_given("parts", parts, self.both())?;
        mass.map_or(Ok(()), |(by, given)| fits("mass", given, [b, hq, nq, by.columns(modalities)]))
    }

    /// Checks what backward starts from.
    pub(crate) fn check_upstream(
        &self,
        [out_gradient, out, logsumexp]: [[usize; 4]; 3],
        parts: Option<[usize; 5]>,
    ) -> Result<()> {
        fits("d out", out_gradient, self.query)?;
        fits("out", out, self.query)?;
        fits("logsumexp", logsumexp, self.logsumexp())?;
        fits_if("parts", parts, (self.combine == Combine::Split).then(|| self.both()))
    }

    /// Checks where backward writes: the gradients of query, key and value, of the sink and the bias table.
    pub(crate) fn check_gradients(
        &self,
        [query, key, value]: [[usize; 4]; 3],
        sink: Option<[usize; 4]>,
        bias: Option<[usize; 4]>,
        modalities: usize,
    ) -> Result<()> {
        let [b, hq, nq, _] = self.query;
        fits("d query", query, self.query)?;
        fits("d key", key, self.key)?;
        fits("d value", value, self.key)?;
        fits_where_given("d sink", sink, [b, hq, nq, self.combine.parts()])?;
        fits_where_given("d bias", bias, [b, hq, modalities, modalities])
    }
}

/// Shapes of a problem of pseudo-scores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SinkShapes {
    pub(crate) position: [usize; 2],
    pub(crate) query_modality: [usize; 2],
    pub(crate) decay: [usize; 2],
    pub(crate) base: [usize; 2],
}

impl SinkShapes {
    /// Checks every shape, and the span.
    pub(crate) fn check(&self, span: i64) -> Result<()> {
        expect("query_modality", &self.query_modality, &self.position, "(B, Nq), the shape of position")?;
        expect("base", &self.base, &self.decay, "(M, Hq), the shape of decay")?;
        if span < 0 {
            return Err(option("span", span.to_string(), "a number of tokens >= 0"));
        }
        Ok(())
    }

    /// The shape (B, Hq, Nq) of the sink.
    pub(crate) const fn sink(&self) -> [usize; 3] {
        [self.position[0], self.decay[1], self.position[1]]
    }

    /// Checks where forward writes.
    pub(crate) fn check_outputs(&self, sink: [usize; 3]) -> Result<()> {
        fits("sink", sink, self.sink())
    }

    /// Checks what backward starts from and where it writes.
    pub(crate) fn check_gradients(&self, sink: [usize; 3], [decay, base]: [[usize; 2]; 2]) -> Result<()> {
        fits("d sink", sink, self.sink())?;
        fits("d decay", decay, self.decay)?;
        fits("d base", base, self.decay)
    }
}
