//! Who is calling: expressions over claims and requests.
//!
//! What connects this to requests (role rules, pods, upstream credentials) is not here.

pub mod expression;
#[cfg(test)]
mod expression_cost_tests;
#[cfg(test)]
mod expression_tests;
mod syntax;
mod value;
