//! What is read of certificates in PEM, for the properties in `tests/properties`.
//!
//! Only a door: nothing is decided here, and the product does not come through it.

use rustls::pki_types::{CertificateDer, pem::PemObject as _};

/// The certificates of a PEM text, as far as they can be read.
pub fn chain(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).map_while(Result::ok).collect()
}
