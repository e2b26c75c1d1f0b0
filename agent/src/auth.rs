//! Who is calling: expressions over claims and requests, bearer tokens, and the issuers that vouch for them.
//!
//! What connects this to requests (role rules, pods, upstream credentials) is not here.

pub mod claims;
pub mod error;
pub mod expression;
#[cfg(test)]
mod expression_cost_tests;
#[cfg(test)]
mod expression_tests;
pub mod fetch;
pub mod issuers;
#[cfg(test)]
mod issuers_tests;
mod key_source;
pub mod keys;
#[cfg(test)]
pub(crate) mod signer;
#[cfg(test)]
pub(crate) mod site;
mod syntax;
pub mod token;
mod value;
