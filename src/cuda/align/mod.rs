//! Plans of duplex alignment, of the modality ids and of the pseudo-scores.
