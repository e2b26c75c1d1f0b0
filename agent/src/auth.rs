//! Who is calling, as whom their requests go on, and what they go on with.
//!
//! `presented` (what a request shows) → `issuers` (whose tokens hold) and `workload` (where they hold) → `rule` (who goes
//! on as whom, in CEL: `expression`) → `policy` (one cluster's, all of it together; `impersonation` for clusters without
//! AWS, `role_session` for those with it) → `refused` (what the caller is told).

pub mod claims;
pub mod error;
pub mod expression;
#[cfg(test)]
mod expression_cost_tests;
#[cfg(test)]
mod expression_tests;
pub mod fetch;
pub(crate) mod impersonation;
pub mod issuers;
#[cfg(test)]
mod issuers_tests;
mod key_source;
pub mod keys;
mod policy;
#[cfg(test)]
pub(crate) mod policy_tests;
mod presented;
mod refused;
mod role_session;
mod rule;
#[cfg(test)]
pub(crate) mod signer;
#[cfg(test)]
pub(crate) mod site;
mod syntax;
pub mod token;
mod value;
mod workload;

pub use self::{
    error::TokenError,
    impersonation::{Right, effective_groups},
    issuers::{Issuers, IssuersError},
    policy::{
        Asked, Credential, Decision, OWN_EXTRA_PREFIX, OWN_EXTRAS, Onward, OwnCredential, Policy, Rules,
    },
    refused::{Kind, Refused},
    rule::{Considered, Origin, Question, Said, Subject},
};
